"""Train a GPT from scratch with each way to its loss, on the prose of a Python installation.

    python tests/benchmarks/training.py text TOKENS.npz
    python tests/benchmarks/training.py run TOKENS.npz RESULT.json --arm unbiased --seed 0
    python tests/benchmarks/training.py speed TOKENS.npz SPEED.json
    python tests/benchmarks/training.py draw PICTURE.svg RESULT.json ... SPEED.json

The text is the docstrings of the standard library and of all installed packages, in a byte-pair
encoding learnt from them; no network is needed. Which packages are installed decides how much text
there is: `text` says so, and results name a checksum of it. For one seed, all arms start from the
same weights and see the same batches in the same order. Validation is the exact cross-entropy of
documents held out, formed from logits for every arm. Runs may share a GPU, which says nothing of
their speed then: `speed` times a few steps of each arm, in turns and alone. `draw` also prints the
table.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from records import read_record, write_record
from torch import nn
from torch.nn import functional

import cce_cupy

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "unfiltered": {"gradient_filter": None},
    "unbiased": {},
    "threshold": {"gradient_filter": "threshold", "filter_eps": 2.0**-12},
}
HELD_OUT = 25  # one document of so many


class Setting(NamedTuple):
    """What all arms share."""

    vocab: int
    dim: int = 512
    layers: int = 6
    heads: int = 8
    length: int = 512
    batch: int = 16
    steps: int = 1000
    learning_rate: float = 1e-3
    validation_batches: int = 8


def prepare_text(path: Path, vocab: int) -> None:
    """Write the tokens of training and of held-out documents."""
    import sysconfig

    from cce_cupy.commands.corpus import learn_corpus, read_documents

    def report(done: int, total: int) -> None:
        if done % 2000 == 0 or done == total:
            print(f"{done} of {total} files", file=sys.stderr)

    documents: dict[str, None] = dict.fromkeys(read_documents(report))
    for name in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        documents.update(dict.fromkeys(read_documents(report, Path(name))))
    write_tokens(path, list(documents), vocab, learn_corpus)


def write_tokens(path: Path, documents: list[str], vocab: int, learn: Any) -> None:
    """Encode documents, shuffled and cut into those to train on and those held out."""
    order = np.random.default_rng(0).permutation(len(documents))
    corpus = learn([documents[number] for number in order], vocab)
    ends = np.flatnonzero(corpus.ids == 0) + 1  # the end of a document is the first token learnt
    starts = np.concatenate([[0], ends[:-1]])
    held = np.arange(len(ends)) % HELD_OUT == 0
    pieces = [corpus.ids[first:last] for first, last in zip(starts, ends, strict=True)]
    parts = {
        "training": np.concatenate([p for p, h in zip(pieces, held, strict=True) if not h]),
        "validation": np.concatenate([p for p, h in zip(pieces, held, strict=True) if h]),
    }
    np.savez_compressed(path, vocab=corpus.vocab, **parts)
    print(
        f"{corpus.documents} documents, {corpus.characters} characters; tokens: "
        + ", ".join(f"{len(ids)} {name}" for name, ids in parts.items())
    )


class Block(nn.Module):
    """Attention and a layer, each added to what came in."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim, bias=False) for _ in range(2)])
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return (batch, length, dim)."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Gpt(nn.Module):
    """A GPT with tied embeddings; it returns hidden states."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embed = nn.Embedding(setting.vocab, setting.dim)
        self.position = nn.Embedding(setting.length, setting.dim)
        self.blocks = nn.ModuleList(
            [Block(setting.dim, setting.heads) for _ in range(setting.layers)]
        )
        self.norm = nn.LayerNorm(setting.dim, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * setting.layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take (batch, length), return (batch, length, dim)."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss from logits, in float32 as usual."""
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def loss_of(arm: str, model: Gpt, batch: torch.Tensor) -> torch.Tensor:
    """The arm's loss of the next token."""
    hidden, targets = model(batch[:, :-1]), batch[:, 1:]
    options = ARMS[arm]
    if options is None:
        return plain_loss(hidden, model.embed.weight, targets)
    return cce_cupy.linear_cross_entropy(hidden, model.embed.weight, targets, **options)


def cut(ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Stretches of length + 1 tokens."""
    return ids[starts[:, None] + torch.arange(length + 1)].long()


def validate(model: Gpt, ids: torch.Tensor, setting: Setting, device: str) -> float:
    """Exact loss, in nats, of the same held-out stretches each time."""
    size = setting.batch * setting.validation_batches
    starts = torch.linspace(0, len(ids) - setting.length - 1, size).long()
    losses = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for some in starts.split(setting.batch):
            batch = cut(ids, some, setting.length).to(device)
            losses.append(plain_loss(model(batch[:, :-1]), model.embed.weight, batch[:, 1:]))
    return float(torch.stack(losses).mean())


def validation_steps(steps: int) -> list[int]:
    """Dense at the start, where filters differ most."""
    first = [0, 1, 2, 5, 10, 25, 50, 75]
    return sorted({step for step in [*first, *range(100, steps, 100)] if step < steps} | {steps})


class Trainer:
    """One arm and seed: a model, its optimizer, and the batches to come.

    Parameters
    ----------
    arm : str
    seed : int
    text : dict of str to Tensor
    setting : Setting
    device : str
    """

    def __init__(
        self, arm: str, seed: int, text: dict[str, torch.Tensor], setting: Setting, device: str
    ) -> None:
        self.arm, self.ids, self.setting, self.device = arm, text["training"], setting, device
        torch.manual_seed(seed)
        self.model = Gpt(setting).to(device)
        parameters = list(self.model.parameters())
        decayed = [p for p in parameters if p.dim() > 1]
        others = [p for p in parameters if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=setting.learning_rate,
            betas=(0.9, 0.95),
            fused=device == "cuda",
        )
        self.order = torch.Generator().manual_seed(seed)
        self.step = 0

    def advance(self) -> torch.Tensor:
        """Take a step, and return the loss before it."""
        setting, number = self.setting, self.step
        warmup = max(min(100, setting.steps // 10), 1)
        rate = min((number + 1) / warmup, 1.0)
        rate *= 0.55 + 0.45 * math.cos(math.pi * number / setting.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = setting.learning_rate * rate
        starts = torch.randint(
            len(self.ids) - setting.length - 1, (setting.batch,), generator=self.order
        )
        batch = cut(self.ids, starts, setting.length).to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            loss = loss_of(self.arm, self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()


def train(
    arm: str,
    seed: int,
    text: dict[str, torch.Tensor],
    setting: Setting,
    device: str,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Train one arm, and keep at each validation what is recorded of it until there."""
    trainer = Trainer(arm, seed, text, setting, device)
    curve, losses = [], []
    record = {
        "arm": arm,
        "seed": seed,
        "options": ARMS[arm],
        "setting": setting._asdict(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **_circumstances(device),
        "text": {name: len(ids) for name, ids in text.items()} | {"sha256": _digest(text)},
    }
    for stop in validation_steps(setting.steps):
        while trainer.step < stop:
            losses.append(trainer.advance())
        curve.append((stop, validate(trainer.model, text["validation"], setting, device)))
        print(f"{arm} {seed}: step {stop}, validation {curve[-1][1]:.4f}", file=sys.stderr)
        trained = [round(float(value), 4) for value in losses]
        keep(record | {"validation": curve, "training": trained})


def measure_speed(
    text: dict[str, torch.Tensor], setting: Setting, device: str, steps: int
) -> dict[str, Any]:
    """Return tokens a second and peak memory of each arm, alone on the GPU and in turns."""
    found: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(3):
        for arm in ARMS:
            gc.collect()  # what is left of the arm before would count as this one's
            trainer = Trainer(arm, 0, text, setting, device)
            for _ in range(10):  # the first steps load kernels
                trainer.advance()
            _wait(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            for _ in range(steps):
                trainer.advance()
            _wait(device)
            rounds[arm].append(time.perf_counter() - started)
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
            speed = steps * setting.batch * setting.length / statistics.median(rounds[arm])
            found[arm] = {"tokens_per_second": speed, "peak_bytes": peak}
            del trainer
    return {"setting": setting._asdict(), **_circumstances(device), "steps": steps, "speed": found}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _circumstances(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cce_cupy": cce_cupy.__version__,
        "date": date.today().isoformat(),
    }


def _digest(text: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in text.values())).hexdigest()


def load_text(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tokens, and the size of their vocabulary."""
    with np.load(path) as file:
        text = {name: torch.from_numpy(file[name]) for name in ("training", "validation")}
        return text, int(file["vocab"])


def finished(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that came to their end."""
    runs = [result for result in results if "arm" in result]
    return [run for run in runs if run["validation"][-1][0] == run["setting"]["steps"]]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: final losses with their spread over seeds, speed and memory."""
    lines = [
        "| loss | seeds | final validation loss: mean (range) | tokens/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    speeds = [result["speed"] for result in results if "speed" in result]
    for arm in ARMS:
        runs = [run for run in finished(results) if run["arm"] == arm]
        if not runs:
            continue
        final = [run["validation"][-1][1] for run in runs]
        speed, peak = "-", "-"
        if speeds:
            speed = f"{speeds[-1][arm]['tokens_per_second']:,.0f}"
            if speeds[-1][arm]["peak_bytes"]:
                peak = f"{speeds[-1][arm]['peak_bytes'] / 2**20:,.0f} MiB"
        lines.append(
            f"| {arm} | {len(runs)} | {statistics.mean(final):.4f} "
            f"({min(final):.4f} to {max(final):.4f}) | {speed} | {peak} |"
        )
    return "\n".join(lines)


def curves_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: validation losses on the way, means over the seeds."""
    runs = finished(results)
    if not runs:
        return ""
    steps = [step for step, _ in runs[0]["validation"]]
    shown = [step for step in steps if step in (0, 1, 5, 10, 25, 50, 100, 200, 500)]
    lines = [
        "| loss | " + " | ".join(f"step {step}" for step in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for arm in ARMS:
        curves = [dict(map(tuple, run["validation"])) for run in runs if run["arm"] == arm]
        if curves:
            means = [statistics.mean(curve[step] for curve in curves) for step in shown]
            lines.append(f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    plain = [dict(map(tuple, run["validation"])) for run in runs if run["arm"] == "plain"]
    if len(plain) > 1:
        widths = [max(c[step] for c in plain) - min(c[step] for c in plain) for step in shown]
        cells = " | ".join(f"{width:.3f}" for width in widths)
        lines.append(f"| spread of plain's seeds | {cells} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the validation curves, and their differences from the plain loss of the same seed."""
    from matplotlib.figure import Figure

    results = [result for result in results if "arm" in result]
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    plain = {r["seed"]: dict(map(tuple, r["validation"])) for r in results if r["arm"] == "plain"}
    for number, arm in enumerate(ARMS):
        runs = [result for result in results if result["arm"] == arm]
        for run in runs:
            steps, losses = zip(*run["validation"], strict=True)
            style = {"color": f"C{number}", "linewidth": 1.0}
            label = {"label": arm} if run is runs[0] else {}
            upper.plot(steps, losses, **style, **label)
            if arm != "plain" and run["seed"] in plain:
                of_plain = plain[run["seed"]]
                both = [step for step in steps if step in of_plain]
                pairs = zip(both, losses, strict=False)
                lower.plot(both, [loss - of_plain[step] for step, loss in pairs], **style)
    if len(plain) > 1:
        steps = sorted(set.intersection(*map(set, plain.values())))
        at = [[losses[step] for losses in plain.values()] for step in steps]
        spread = [max(losses) - min(losses) for losses in at]
        least, label = [-width for width in spread], "spread of plain's seeds"
        lower.fill_between(steps, least, spread, color="C0", alpha=0.2, label=label)
        lower.legend(fontsize="small")
    upper.set_ylabel("validation loss, nats")
    lower.set_ylabel("difference from plain, same seed")
    lower.set_xlabel("step")
    lower.set_xscale("symlog", linthresh=1)
    lower.set_yscale("symlog", linthresh=0.01)
    upper.legend(fontsize="small")
    first = results[0]
    figure.suptitle(
        f"{first['parameters'] / 1e6:.0f} M parameters, V = {first['setting']['vocab']}, "
        f"{first['setting']['batch'] * first['setting']['length']} tokens a step, "
        f"{first['device']}, {first['date']}",
        fontsize="medium",
    )
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="collect and encode the text")
    text.add_argument("tokens", type=Path)
    text.add_argument("--vocab", type=int, default=32768)
    run = commands.add_parser("run", help="train one arm")
    speed = commands.add_parser("speed", help="time a few steps of each arm")
    for command in (run, speed):
        command.add_argument("tokens", type=Path)
        command.add_argument("result", type=Path)
        command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
        for name, default in Setting._field_defaults.items():
            option = f"--{name.replace('_', '-')}"
            command.add_argument(option, type=type(default), default=default)
    run.add_argument("--arm", choices=ARMS, required=True)
    run.add_argument("--seed", type=int, default=0)
    speed.add_argument("--timed-steps", type=int, default=40)
    picture = commands.add_parser("draw", help="draw results, and print their tables")
    picture.add_argument("picture", type=Path)
    picture.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "text":
        prepare_text(options.tokens, options.vocab)
        return
    if options.command == "draw":
        results = [read_record(path) for path in options.results]
        draw(results, options.picture)
        print(table(results), curves_table(results), sep="\n\n")
        return
    tokens, vocab = load_text(options.tokens)
    chosen = {name: getattr(options, name) for name in Setting._field_defaults}
    setting = Setting(vocab, **chosen)
    if options.command == "speed":
        found = measure_speed(tokens, setting, options.device, options.timed_steps)
        write_record(options.result, found)
        print({arm: round(figures["tokens_per_second"]) for arm, figures in found["speed"].items()})
    else:

        def keep(found: dict[str, Any]) -> None:
            write_record(options.result, found)

        train(options.arm, options.seed, tokens, setting, options.device, keep)


if __name__ == "__main__":
    main()
