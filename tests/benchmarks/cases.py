"""The cases of the GPU benchmarks."""

from __future__ import annotations

from typing import NamedTuple

from calibrated import Peaks

from cce_cupy.commands.bench import CASES as SIZES

SWEEPS = {
    "tokens": tuple(2**n for n in range(17)),
    "vocab": tuple(2**n for n in range(15, 20)),
}
"""Tokens from 1 to 65536, and vocabularies from 32768 to 524288."""


class Case(NamedTuple):
    """Sizes, and the law of the synthetic data; without a law the arrays come from a file."""

    tokens: int
    dim: int
    vocab: int
    peaks: Peaks | None


GEMMA3 = Peaks()
# Between a half and the whole of the columns that Gemma 3 keeps. At half the vocabulary each p is
# twice as large, so that popularity has to fall faster for it.
GEMMA2 = Peaks(odds=-0.5)
WIDE = Peaks(odds=0.0, zipf=2.8, spread=3.8)
LLAMA3 = Peaks(odds=-0.5, zipf=2.8, spread=3.8)

LAWS = {
    "gemma2-2b": GEMMA2,
    "wide": WIDE,
    "llama3-8b": LLAMA3,
    "gemma3-like": GEMMA3,
    "smollm2": None,
}
CASES = {name: Case(*SIZES[name], law) for name, law in LAWS.items()}
