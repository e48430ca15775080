"""A small language model trained in JAX with this loss and with optax's, seed by seed.

All see the same parameters at the start and the same batches; ours runs as it is and without its
gradient filter. Curves are compared by what the seeds differ by among themselves:

    python tests/benchmarks/jax_training.py --results training.json --picture training.svg

The text is Python's own documentation, so nothing is downloaded; its words are the vocabulary.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cce_cupy
from cce_cupy.commands.corpus import read_documents

OURS = {"cce_cupy": {}, "cce_cupy, no filter": {"gradient_filter": None}}
LOSSES = ("optax", *OURS)
COLORS = ("#f2b179", "#1f4e79", "#7fa8cf")


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
    if loss in OURS:
        return cce_cupy.linear_cross_entropy(hidden, head, targets, **OURS[loss])
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

    def draw(first: int, last: int, source: np.random.Generator) -> np.ndarray:
        starts = source.integers(first, last - sizes.length - 1, sizes.batch)
        return tokens[starts[:, None] + np.arange(sizes.length + 1)]

    trained, judged = [], {}
    for number in range(sizes.steps):
        rows = draw(held_out, len(tokens), rng)
        parameters, state, value = take_step(parameters, state, rows, sizes=sizes, loss=loss)
        trained.append(value)
        if (number + 1) % max(sizes.steps // 10, 1) == 0:
            source = np.random.default_rng(12345)
            some = [
                judge(parameters, draw(0, held_out, source), heads=sizes.heads) for _ in range(4)
            ]
            judged[number + 1] = float(np.mean(some))
    return {
        "loss": loss,
        "seed": seed,
        "trained": [float(value) for value in trained],
        "held_out": judged,
    }


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the mean held-out curves of ours with optax's, by what the seeds differ by.

    The spread is the standard deviation over seeds of one seed's held-out loss with optax's; a
    difference of two means of n independent seeds has sqrt(2 / n) of it.
    """
    curves = {
        name: np.array([list(run["held_out"].values()) for run in runs if run["loss"] == name])
        for name in LOSSES
    }
    found: dict[str, Any] = {"at_step": [int(step) for step in runs[0]["held_out"]]}
    spread = None
    if len(curves["optax"]) > 1:
        spread = curves["optax"].std(axis=0, ddof=1)
        found["seed_spread"] = spread.tolist()
    for name in OURS:
        difference = curves[name].mean(0) - curves["optax"].mean(0)
        found[name] = {
            "difference_of_means": difference.tolist(),
            "largest_difference_of_one_seed": float(np.abs(curves[name] - curves["optax"]).max()),
        }
        if spread is not None:
            found[name]["in_spreads"] = (difference / spread).tolist()
    return found


def draw_picture(record: dict[str, Any], path: Path) -> None:
    """Draw the curves, each seed's pale, and the differences below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for name, color in zip(LOSSES, COLORS, strict=True):
        curves = np.array([run["trained"] for run in record["runs"] if run["loss"] == name])
        for curve in curves:
            above.plot(curve, color=color, alpha=0.2, linewidth=0.5)
        above.plot(curves.mean(0), color=color, label=name, linewidth=1)
    above.set_ylabel("training loss, nats a token")
    above.legend()
    comparison = record["comparison"]
    steps = comparison["at_step"]
    for name, color in zip(OURS, COLORS[1:], strict=True):
        difference = comparison[name]["difference_of_means"]
        below.plot(steps, difference, "o-", color=color, label=f"{name} - optax")
    if "seed_spread" in comparison:
        spread = np.array(comparison["seed_spread"])
        below.fill_between(steps, -spread, spread, color="#dddddd", label="spread of the seeds")
    below.set_ylabel("held-out loss")
    below.set_xlabel("step")
    below.legend()
    sizes = record["sizes"]
    figure.suptitle(
        f"{record['device']}, JAX {record['jax']}: V {sizes['vocab']}, D {sizes['dim']}, "
        f"{sizes['batch'] * sizes['length']} tokens a step, {record['seeds']} seeds",
        fontsize="medium",
    )
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    defaults = {
        "vocab": 16384, "dim": 384, "layers": 4, "heads": 6, "batch": 16, "length": 256,
        "steps": 400,
    }  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(given, name) for name in Sizes._fields})
    tokens = read_tokens(sizes.vocab)
    known = int(tokens.max()) + 1
    if known < sizes.vocab:
        parser.error(f"--vocab {sizes.vocab}: the text has {known} different words")
    runs = []
    for seed in range(given.seeds):
        for loss in LOSSES:
            runs.append(train(sizes, tokens, seed, loss))
            print(f"seed {seed}  {loss:20}  held out {list(runs[-1]['held_out'].values())[-1]:.4f}")
    record = {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "sizes": sizes._asdict(),
        "tokens_of_text": len(tokens),
        "seeds": given.seeds,
        "comparison": compare(runs),
        "runs": runs,
    }
    given.results.write_text(json.dumps(record, indent=1) + "\n")
    if given.picture is not None:
        draw_picture(record, given.picture)


if __name__ == "__main__":
    main()
