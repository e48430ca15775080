"""``cce-cupy bench``: our times on this machine's GPU, against the vendor's matrix product."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from ..api import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
)
from ..compiler import import_cupy
from ..plan import ROW_TILE, make_plan
from ..problem import ArraySpec, Options, Problem
from .errors import CommandError
from .warmup import count_devices

CASES = {
    "gemma2-2b": (8192, 2304, 256000),
    "wide": (8192, 4096, 131072),
    "llama3-8b": (8192, 4096, 128256),
    "smollm2": (8192, 576, 49152),
    "gemma3-like": (8192, 640, 262144),
}
"""Tokens, D and V."""

SECONDS = 2.0
LEAST_CALLS, MOST_CALLS = 5, 100
WARM_UPS = 3

PROTOCOL = (
    f"ratio: run and product alternate in one burst of about {SECONDS:g} s, {LEAST_CALLS} to "
    f"{MOST_CALLS} pairs, after {WARM_UPS} calls of each to warm up, with CUDA events around every "
    "call; medians, of the times and of the pairs' own ratios. sustained: as many calls of the run "
    "back to back, then of the product; means. TFLOP/s count 2NVD of a forward and 6NVD of loss "
    "and gradients, whatever a filter leaves out. extra: what a call takes of a memory pool of "
    "its own, less the gradients."
)

MIB = 2**20
_LOGITS_AT_A_TIME = 2**27

# Popularity of a vocabulary entry: a power law times a wide log-normal; and noise of each token.
_ZIPF, _FLAT, _SPREAD, _NOISE = 2.5, 0.015, 3.45, 2.9

Run = Callable[[], Any]


class Inputs(NamedTuple):
    """Arrays on the GPU."""

    e: Any
    c: Any
    targets: Any


class Figures(NamedTuple):
    """What was measured of one run; seconds, and bytes beyond inputs and outputs."""

    seconds: float
    ratio: float
    sustained: float
    sustained_ratio: float
    extra: int


def run(case: str, tokens: int | None) -> int:
    """Time forward and gradients of a case against the product of its logits.

    The data is random but peaked: popularity follows a power law, and the fraction of columns
    that the default filter keeps of it is printed.

    Parameters
    ----------
    case : str
        One of `CASES`.
    tokens : int, optional
        Instead of the case's own.

    Returns
    -------
    int
        Exit status, 0.

    Raises
    ------
    CommandError
        Where there is no CuPy or no GPU.
    MemoryError
        Where the GPU has no room for the logits that the product writes.
    """
    try:
        cupy = import_cupy()
        count_devices(cupy)
    except (ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from None
    rows, dim, vocab = CASES[case]
    rows = tokens or rows
    dtype = _choose_dtype(cupy)
    console = Console()
    inputs = make_inputs(cupy, (rows, dim, vocab), dtype)
    kept = kept_fraction(cupy, inputs)
    figures = _measure_all(cupy, inputs)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(errors="replace")
    title = f"{case}: N {rows:,}, D {dim:,}, V {vocab:,}, {dtype.name}, {name}"
    console.print(_table(title, 2e-12 * rows * dim * vocab, figures))
    lines = [f"The default filter keeps {100 * kept:.1f} % of the columns of this data.", PROTOCOL]
    if dtype == np.float16:
        lines.append("float16, since this CuPy forms no product of bfloat16.")
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return 0


def make_inputs(xp: ModuleType, sizes: tuple[int, int, int], dtype: np.dtype[Any]) -> Inputs:
    """Make peaked e and c, and targets drawn by popularity.

    Parameters
    ----------
    xp : module
        CuPy, or NumPy, which has the same functions.
    sizes : tuple of int
        Tokens, D and V.
    dtype : numpy.dtype
        Of e and c.
    """
    tokens, dim, vocab = sizes
    xp.random.seed(0)

    def normal(rows: int, scale: float) -> Any:
        array = xp.empty((rows, dim), dtype)
        step = max(_LOGITS_AT_A_TIME // dim, 1)
        for first in range(0, rows, step):
            part = array[first : first + step]
            part[...] = (scale * xp.random.standard_normal(part.shape)).astype(dtype)
        return array

    law = -_ZIPF * xp.log((xp.arange(vocab) + 0.5) / vocab + _FLAT)
    popularity = law - law.mean() + _SPREAD * xp.random.standard_normal(vocab)
    c = normal(vocab, 1 / math.sqrt(dim))
    c[:, 0] = popularity.astype(dtype)
    e = normal(tokens, _NOISE)
    e[:, 0] = 1
    summed = xp.exp(popularity - popularity.max()).cumsum()
    targets = xp.searchsorted(summed / summed[-1], xp.random.random_sample(tokens))
    return Inputs(e, c, xp.minimum(targets, vocab - 1).astype(np.int64))


def kept_fraction(xp: ModuleType, inputs: Inputs) -> float:
    """Return the part of (row tile, column) pairs that the default filter keeps, on average.

    With m the largest probability in the tile, that is min(1, m / eps); targets are always kept.

    Parameters
    ----------
    xp : module
        CuPy or NumPy.
    inputs : Inputs
    """
    e, c, targets = inputs
    vocab, tiles = len(c), -(-len(e) // ROW_TILE)
    described = {n: ArraySpec(a.shape, a.dtype.name) for n, a in inputs._asdict().items()}
    eps = make_plan(Problem.check(described, Options())).filter_eps
    lse = token_statistics(*inputs).lse
    rows, total = e.astype(np.float32), 0.0
    step = max(_LOGITS_AT_A_TIME // len(e), 1)
    for first in range(0, vocab, step):
        p = xp.exp(rows @ c[first : first + step].astype(np.float32).T - lse[:, None])
        here = xp.flatnonzero((targets >= first) & (targets < first + step))
        p[here, targets[here] - first] = 1
        for tile in range(tiles):
            largest = p[tile * ROW_TILE : (tile + 1) * ROW_TILE].max(axis=0)
            total += float(xp.minimum(largest / eps, 1).sum())
    return total / (tiles * vocab)


def _choose_dtype(cupy: ModuleType) -> np.dtype[Any]:
    """Return bfloat16, or float16 where this CuPy forms no product of bfloat16."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    try:
        ones = cupy.ones((16, 16), np.float32).astype(dtype)
        ones[:, 0] = 1
        product = cupy.dot(ones, ones.T, out=cupy.empty((16, 16), dtype))
        right = bool((product.astype(np.float32) == 16).all())
    except Exception:  # CuPy's support is young, and has no one way to fail
        right = False
    return dtype if right else np.dtype(np.float16)


def _measure_all(cupy: ModuleType, inputs: Inputs) -> dict[str, tuple[Figures, int]]:
    """Return, by run, its figures and how many products of that size an exact method needs."""
    e, c, _ = inputs
    logits = cupy.empty((len(e), len(c)), e.dtype)

    def product() -> None:
        cupy.dot(e, c.T, out=logits)

    gradients = linear_cross_entropy_value_and_grad
    runs: dict[str, tuple[Run, int]] = {
        "forward + kept bits": (lambda: linear_cross_entropy_vjp(*inputs), 1),
        "forward alone": (lambda: linear_cross_entropy(*inputs), 1),
        "loss + gradients": (lambda: gradients(*inputs), 3),
        "loss + gradients, no filter": (lambda: gradients(*inputs, gradient_filter=None), 3),
    }
    return {
        name: (_measure(cupy, call, product, e.nbytes + c.nbytes if products == 3 else 0), products)
        for name, (call, products) in runs.items()
    }


def _measure(cupy: ModuleType, call: Run, product: Run, outputs: int) -> Figures:
    for _ in range(WARM_UPS):
        call()
        product()
    extra = _extra_memory(cupy, call) - outputs
    both = _block(cupy, call, 1) + _block(cupy, product, 1)
    pairs = min(max(math.ceil(SECONDS / both), LEAST_CALLS), MOST_CALLS)
    events = [cupy.cuda.Event() for _ in range(2 * pairs + 1)]
    product()  # the GPU has something to do while the host runs ahead of it
    events[0].record()
    for pair in range(pairs):
        call()
        events[2 * pair + 1].record()
        product()
        events[2 * pair + 2].record()
    events[-1].synchronize()
    spans = [cupy.cuda.get_elapsed_time(events[n], events[n + 1]) / 1e3 for n in range(2 * pairs)]
    sustained, base = (_block(cupy, side, pairs) for side in (call, product))
    return Figures(
        statistics.median(spans[::2]),
        statistics.median(a / b for a, b in zip(spans[::2], spans[1::2], strict=True)),
        sustained,
        sustained / base,
        extra,
    )


def _block(cupy: ModuleType, call: Run, number: int) -> float:
    """Return the mean seconds of calls that follow each other at once."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / number


def _extra_memory(cupy: ModuleType, call: Run) -> int:
    """Return what a call takes of a pool of its own: in CuPy's there may be room left by others."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        call()
    return int(pool.total_bytes())


def _table(title: str, tflop: float, figures: dict[str, tuple[Figures, int]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("run")
    for heading in ("ms", "ratio", "sustained ms", "ratio", "TFLOP/s", "extra MiB"):
        table.add_column(heading, justify="right")
    for name, (found, products) in figures.items():
        table.add_row(
            name,
            f"{1e3 * found.seconds:.3f}",
            f"{found.ratio:.3f}",
            f"{1e3 * found.sustained:.3f}",
            f"{found.sustained_ratio:.3f}",
            f"{products * tflop / found.seconds:.0f}",
            f"{found.extra / MIB:.1f}",
        )
    return table
