"""``cce-cupy demo``: train a language model twice and compare the loss heads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .agreement import Agreement, Curve, compare_curves
from .corpus import Corpus, check_tokenizers, learn_corpus, read_documents
from .language_model import Sizes
from .loss_heads import LossHead, cut_cross_entropy, full_softmax
from .picture import Comparison, check_picture, draw
from .progress import WorkProgress
from .training import Schedule, Training

MIB = 2**20

STEPS_AVERAGED = 10
"""The final loss is the mean over the last steps: that of one step is mostly luck."""


@dataclass
class Run:
    """One training and what was measured.

    Attributes
    ----------
    name : str
    head : callable
    losses : list of float
        In nats a token.
    seconds : float
        In training steps.
    memory : int
        Peak bytes that the loss head allocates.
    """

    name: str
    head: LossHead
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def curve(self) -> Curve:
        """The losses as an array."""
        return np.array(self.losses, np.float64)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps."""
        return float(self.curve[-STEPS_AVERAGED:].mean())


def run(steps: int, seed: int, out: Path, vocab: int) -> int:
    """Train, compare, print a table and draw a picture.

    Parameters
    ----------
    steps : int
        Training steps, at least 1.
    seed : int
        Of the model's start and the order of the text.
    out : Path
        Picture to write; its suffix says the format.
    vocab : int
        Byte-pair tokens to learn.

    Returns
    -------
    int
        Exit status: 0, or 1 when the loss curves differ by more than rounding.

    Raises
    ------
    CommandError
        When a library, the text or the picture's folder is missing.
    """
    began = time.monotonic()
    check_tokenizers()
    check_picture(out)
    schedule = Schedule()
    with WorkProgress() as progress:
        corpus = _prepare(vocab, progress)
        sizes = Sizes(corpus.vocab)
        plain, cut = _train(corpus, sizes, schedule, steps, seed, progress)
    comparison = Comparison(
        names=(plain.name, cut.name),
        curves=(plain.curve, cut.curve),
        memory=(plain.memory, cut.memory),
        gradient_bytes=4 * (schedule.tokens * sizes.dim + sizes.vocab * (sizes.dim + 1)),
        agreement=compare_curves(plain.curve, cut.curve, schedule.tokens, sizes.dim, sizes.vocab),
        unigram_entropy=corpus.unigram_entropy,
        tokens=schedule.tokens,
        dim=sizes.dim,
        vocab=sizes.vocab,
    )
    draw(comparison, out)

    console = Console()
    _print_table(console, comparison, plain, cut)
    _print_verdict(console, comparison.agreement)
    seconds = time.monotonic() - began
    _say(console, f"Picture: {out}. Total time: {seconds:.0f} s.")
    return 0 if comparison.agreement.agree else 1


def _prepare(vocab: int, progress: WorkProgress) -> Corpus:
    documents = read_documents(
        lambda done, total: progress.callback("Reading Python's own docs", done, total)
    )
    progress.start(f"Learning {vocab:,} tokens", 1)
    corpus = learn_corpus(documents, vocab)
    progress.update(1, f"{len(corpus.ids):,} in the text")
    return corpus


def _train(
    corpus: Corpus,
    sizes: Sizes,
    schedule: Schedule,
    steps: int,
    seed: int,
    progress: WorkProgress,
) -> tuple[Run, Run]:
    plain, cut = Run("full softmax", full_softmax), Run("CCE", cut_cross_entropy)
    runs = [(run, Training(corpus.ids, sizes, run.head, seed, schedule)) for run in (plain, cut)]
    progress.start("Training both models", steps)
    # The two take turns, so that whatever else the machine is doing slows both alike.
    for step in range(steps):
        for run, training in runs:
            began = time.perf_counter()
            run.losses.append(training.step())
            run.seconds += time.perf_counter() - began
        progress.update(step + 1, f"loss {plain.losses[-1]:.3f}, {cut.losses[-1]:.3f}")
    for run, training in runs:
        run.memory = training.head_memory()
    return plain, cut


def _print_table(console: Console, comparison: Comparison, plain: Run, cut: Run) -> None:
    steps = len(plain.losses)
    table = Table(
        title=f"{steps} steps of {comparison.tokens:,} tokens, vocabulary "
        f"{comparison.vocab:,}, D = {comparison.dim}, float32",
        caption=f"Final loss: nats a token, mean of the last {min(steps, STEPS_AVERAGED)} steps.\n"
        f"Memory: beyond the inputs; {comparison.gradient_bytes / MIB:.1f} MiB of it are the "
        "gradients.",
        caption_justify="left",
        min_width=72,
    )
    table.add_column("loss head")
    for heading in ("final loss", "tokens/s", "peak memory of head"):
        table.add_column(heading, justify="right")
    for run in (plain, cut):
        table.add_row(
            run.name,
            f"{run.final_loss:.6f}",
            f"{comparison.tokens * steps / run.seconds:,.0f}",
            f"{run.memory / MIB:.1f} MiB",
        )
    console.print(table)
    _say(
        console,
        f"The loss fell from {plain.losses[0]:.2f} to {plain.final_loss:.2f}; the best model "
        f"without context would have {comparison.unigram_entropy:.2f}.",
    )


def _print_verdict(console: Console, agreement: Agreement) -> None:
    difference = agreement.difference[agreement.worst]
    tolerance = agreement.tolerance[agreement.worst]
    where = f"{difference:.1e} at step {agreement.worst + 1}, where {tolerance:.1e} is allowed"
    if agreement.agree:
        _say(console, f"The curves agree within float32 rounding: at most {where}.", "green")
    else:
        _say(
            console,
            f"FAILED: the curves differ by more than float32 rounding: {where}.",
            "bold red",
        )


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
