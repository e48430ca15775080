"""The picture of two trainings: their loss curves, how far they are apart, and the memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .agreement import Agreement, Curve
from .errors import CommandError

MIB = 2**20

SUFFIXES = (".png", ".svg", ".pdf")

_PALE, _DARK, _LIMIT, _GREY = "#f2b179", "#1f4e79", "#b03a2e", "#777777"


@dataclass(frozen=True)
class Comparison:
    """What the picture shows. Pairs are the full softmax and CCE, in that order.

    Attributes
    ----------
    names : pair of str
    curves : pair of ndarray of float64, shape (steps,)
        In nats a token.
    memory : pair of int
        Peak bytes of the loss head.
    gradient_bytes : int
        The part of it that is the head's results.
    agreement : Agreement
    unigram_entropy : float
        In nats.
    tokens, dim, vocab : int
        N of one step, D and V.
    """

    names: tuple[str, str]
    curves: tuple[Curve, Curve]
    memory: tuple[int, int]
    gradient_bytes: int
    agreement: Agreement
    unigram_entropy: float
    tokens: int
    dim: int
    vocab: int


def check_picture(out: Path) -> None:
    """Raise CommandError when a picture could not be written there, before any work."""
    _figure()
    if out.suffix not in SUFFIXES:
        raise CommandError(f"--out {out}: the name must end in .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise CommandError(f"--out {out}: cannot be written")


def draw(comparison: Comparison, out: Path) -> None:
    """Draw the picture and write it to a file whose suffix says the format.

    Raises
    ------
    CommandError
        Where matplotlib is not installed or the file cannot be written.
    """
    figure = _figure(figsize=(11, 6.2), layout="constrained")
    verdict = "train" if comparison.agreement.agree else "DO NOT train"
    figure.suptitle(
        f"Cut Cross-Entropy and the full softmax {verdict} the same model",
        fontsize=14,
        fontweight="bold",
    )
    panels = figure.add_gridspec(2, 2, width_ratios=(2.3, 1), height_ratios=(2.1, 1))
    losses = figure.add_subplot(panels[0, 0])
    _draw_losses(losses, comparison)
    _draw_difference(figure.add_subplot(panels[1, 0], sharex=losses), comparison)
    losses.tick_params(labelbottom=False)
    _draw_memory(figure.add_subplot(panels[:, 1]), comparison)
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror or error}") from None


def _figure(**options: Any) -> Any:
    try:
        # The figure alone, without pyplot: no window system is looked for.
        from matplotlib.figure import Figure
    except ImportError:
        raise CommandError("the demo needs matplotlib: pip install 'cce-cupy[demo]'") from None
    return Figure(**options)


def _draw_losses(axes: Any, comparison: Comparison) -> None:
    plain, cut = comparison.curves
    step = np.arange(1, len(plain) + 1)
    axes.axhline(comparison.unigram_entropy, color=_GREY, linewidth=1, linestyle=":")
    axes.annotate(
        f"best possible without context: {comparison.unigram_entropy:.2f}",
        (0.995, comparison.unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=_GREY,
        fontsize=9,
    )
    marker = "o" if len(plain) < 10 else None
    axes.plot(
        step,
        plain,
        color=_PALE,
        linewidth=6,
        marker=marker,
        label=comparison.names[0],
        solid_capstyle="round",
    )
    axes.plot(
        step, cut, color=_DARK, linewidth=1.6, linestyle=(0, (4, 2)), label=comparison.names[1]
    )
    axes.set_title(
        f"Loss: {comparison.tokens:,} tokens a step, vocabulary {comparison.vocab:,}, "
        f"D = {comparison.dim}",
        fontsize=11,
    )
    axes.set_ylabel("loss (nats a token)")
    axes.set_xlim(0.5, len(plain) + 0.5)
    axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.25)


def _draw_difference(axes: Any, comparison: Comparison) -> None:
    agreement = comparison.agreement
    step = np.arange(1, len(agreement.difference) + 1)
    # A logarithmic axis has no zero: equal losses are drawn at its foot.
    foot = 1e-8
    finite = np.isfinite(agreement.difference)
    shown = np.maximum(agreement.difference[finite], foot)
    label = "most that float32 rounding explains"
    axes.plot(step, agreement.tolerance, color=_LIMIT, linewidth=1.4, label=label)
    axes.vlines(step[finite], foot, shown, color=_DARK, linewidth=1, alpha=0.35)
    axes.plot(step[finite], shown, color=_DARK, linestyle="none", marker="o", markersize=3)
    axes.set_yscale("log")
    heights = np.concatenate([agreement.tolerance, shown])
    highest = heights[np.isfinite(heights)].max(initial=foot)
    axes.set_ylim(foot / 1.5, highest * 20)  # room for the legend
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_title("Difference of the two curves (points at the foot: no difference)", fontsize=11)
    axes.set_ylabel("nats a token")
    axes.set_xlabel("training step")
    axes.grid(alpha=0.25)


def _draw_memory(axes: Any, comparison: Comparison) -> None:
    peaks = np.array(comparison.memory) / MIB
    results = comparison.gradient_bytes / MIB
    axes.bar(comparison.names, peaks, color=(_PALE, _DARK), width=0.6)
    for position, peak in enumerate(peaks):
        axes.annotate(
            f"{peak:.1f} MiB",
            (position, peak),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=12,
            fontweight="bold",
        )
    label = f"of it the gradients: {results:.1f} MiB"
    axes.axhline(results, color=_LIMIT, linewidth=1.4, linestyle="--", label=label)
    axes.legend(loc="upper right", frameon=False, fontsize=10)
    axes.set_ylim(0, peaks.max() * 1.16)  # room for the legend above the bars
    axes.set_title("Peak memory of the loss head\n(loss and gradients, one step)", fontsize=11)
    axes.set_ylabel("MiB beyond the inputs")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
