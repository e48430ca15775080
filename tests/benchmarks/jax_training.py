"""A small language model trained in JAX with this loss and with optax's, seed by seed.

All see the same parameters at the start and the same batches; ours runs as it is and without its
gradient filter. Curves are compared by what the seeds differ by among themselves:

    python tests/benchmarks/jax_training.py --results training.json --picture training.svg

The text is Python's own documentation, so nothing is downloaded; its words are the vocabulary.
The record is written after every run. `--draw` only draws one, and prints its table.
"""

from __future__ import annotations

import argparse
import collections
import platform
import re
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_tables import LOSSES, compare, draw, table
from records import read_record, write_record

import cce_cupy
from cce_cupy.commands.corpus import read_documents

OPTIONS = {"cce_cupy": {}, "cce_cupy, no filter": {"gradient_filter": None}}


class Sizes(NamedTuple):
    """The model and its training."""

    vocab: int
    dim: int
    layers: int
    heads: int
    batch: int
    length: int
    steps: int
    rate: float


def read_tokens(vocab: int) -> np.ndarray:
    """Return the text as word numbers, the most frequent first; 0 is for all others."""
    text = "\n\n".join(read_documents(lambda done, total: None))
    words = re.findall(r" ?\w+|[^\w\s]|\s+", text)
    ranked = [word for word, _ in collections.Counter(words).most_common(vocab - 1)]
    number = {word: k for k, word in enumerate(ranked, start=1)}
    return np.array([number.get(word, 0) for word in words], np.int32)


def new_parameters(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Return float32 parameters; those of the blocks are stacked."""
    vocab, dim, layers = sizes.vocab, sizes.dim, sizes.layers
    shapes = {
        "embedding": (vocab, dim),
        "position": (sizes.length, dim),
        "head": (vocab, dim),
        "blocks": {
            "mix": (layers, dim, 3 * dim),
            "out": (layers, dim, dim),
            "up": (layers, dim, 4 * dim),
            "down": (layers, 4 * dim, dim),
        },
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.02 * jax.random.normal(key, s) for key, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def normalized(x: Any) -> Any:
    """Return rows of mean square one."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)


def hidden_states(parameters: dict[str, Any], tokens: Any, heads: int) -> Any:
    """Return what the classifier is applied to, shape (batch, length, dim), in bfloat16."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters)
    x = half["embedding"][tokens] + half["position"]

    @jax.checkpoint
    def block(x: Any, weights: Any) -> tuple[Any, None]:
        mixed = (normalized(x) @ weights["mix"]).reshape(*x.shape[:2], 3, heads, -1)
        query, key, value = jnp.moveaxis(mixed, 2, 0)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + seen.reshape(x.shape) @ weights["out"]
        return x + jax.nn.gelu(normalized(x) @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(block, x, half["blocks"])
    return normalized(x)


def loss_of(parameters: dict[str, Any], rows: Any, heads: int, loss: str) -> Any:
    """Return the mean loss over rows of tokens, shape (batch, length + 1)."""
    hidden = hidden_states(parameters, rows[:, :-1], heads)
    head = parameters["head"].astype(jnp.bfloat16)
    targets = rows[:, 1:]
    if loss in OPTIONS:
        return cce_cupy.linear_cross_entropy(hidden, head, targets, **OPTIONS[loss])
    logits = jnp.einsum("bld,vd->blv", hidden, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


judge = jax.jit(partial(loss_of, loss="optax"), static_argnames="heads")
"""The held-out loss is optax's for all, so that it compares the models."""


def optimizer_of(sizes: Sizes) -> optax.GradientTransformation:
    """Return AdamW with a schedule."""
    rate = optax.warmup_cosine_decay_schedule(0.0, sizes.rate, sizes.steps // 20, sizes.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


@partial(jax.jit, static_argnames=("sizes", "loss"), donate_argnums=(0, 1))
def take_step(
    parameters: Any, state: Any, rows: Any, sizes: Sizes, loss: str
) -> tuple[Any, Any, Any]:
    """Return the next parameters and state, and the loss before."""
    value, gradients = jax.value_and_grad(loss_of)(parameters, rows, sizes.heads, loss)
    updates, state = optimizer_of(sizes).update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, value


def train(sizes: Sizes, tokens: np.ndarray, seed: int, loss: str) -> dict[str, Any]:
    """Train once; return the loss of each step, and the held-out loss at some of them."""
    parameters = new_parameters(sizes, seed)
    state = optimizer_of(sizes).init(parameters)
    held_out = len(tokens) // 20
    rng = np.random.default_rng(seed)

    def batch(first: int, last: int, source: np.random.Generator) -> np.ndarray:
        starts = source.integers(first, last - sizes.length - 1, sizes.batch)
        return tokens[starts[:, None] + np.arange(sizes.length + 1)]

    trained, judged = [], {}
    for number in range(sizes.steps):
        rows = batch(held_out, len(tokens), rng)
        parameters, state, value = take_step(parameters, state, rows, sizes=sizes, loss=loss)
        trained.append(value)
        if (number + 1) % max(sizes.steps // 10, 1) == 0:
            source = np.random.default_rng(12345)
            some = [
                judge(parameters, batch(0, held_out, source), heads=sizes.heads) for _ in range(4)
            ]
            judged[number + 1] = float(np.mean(some))
    return {
        "loss": loss,
        "seed": seed,
        "trained": [float(value) for value in trained],
        "held_out": judged,
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw", action="store_true", help="draw results that are there already")
    parser.add_argument("--seeds", type=int, default=3)
    defaults = {
        "vocab": 16384, "dim": 384, "layers": 4, "heads": 6, "batch": 16, "length": 256,
        "steps": 400,
    }  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args(arguments)
    if given.draw:
        record = read_record(given.results)
    else:
        sizes = Sizes(**{name: getattr(given, name) for name in Sizes._fields})
        tokens = read_tokens(sizes.vocab)
        known = int(tokens.max()) + 1
        if known < sizes.vocab:
            parser.error(f"--vocab {sizes.vocab}: the text has {known} different words")
        record = train_all(sizes, tokens, given.seeds, given.results)
    if given.picture is not None and record["comparison"] is not None:
        draw(record, given.picture)
    print(table(record))


def train_all(sizes: Sizes, tokens: np.ndarray, seeds: int, path: Path) -> dict[str, Any]:
    """Train with every loss, seed by seed; return what is recorded, and write it on the way."""
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "cce_cupy": cce_cupy.__version__,
        "sizes": sizes._asdict(),
        "tokens_of_text": len(tokens),
        "comparison": None,
        "runs": [],
    }
    for seed in range(seeds):
        for loss in LOSSES:
            run = train(sizes, tokens, seed, loss)
            record["runs"].append(run)
            print(f"seed {seed}  {loss:20}  held out {list(run['held_out'].values())[-1]:.4f}")
            record["comparison"] = compare(record["runs"])
            write_record(path, record)
    return record


if __name__ == "__main__":
    main()
