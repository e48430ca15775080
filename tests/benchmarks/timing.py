"""How a call on a GPU is timed against another, through PyTorch's events and allocator."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

MEBIBYTE = 2**20
WARM_UPS = 3
MOST_PAIRS = 100
MOST_HOST_CALLS = 20
HOST_SECONDS = 0.15

PROTOCOL = (
    "Ratios: run and base alternate in one burst of about {burst:g} s, {least} to {most} pairs, "
    "after {warm_ups} calls of each to warm up; CUDA events stand around every call and the host "
    "does not wait between them; ms are medians over the burst, the ratio is the median of the "
    "pairs' own ratios. The base is the vendor's logits GEMM (torch.matmul into a preallocated "
    "output) unless another is named; four products are twice that and the vendor's products for "
    "dE and dC. Sustained: about {block:g} s of the run alone, back to back, then the same of the "
    "base, {least} calls at least; ms are means. TFLOP/s count 2NVD of a forward and 6NVD of loss "
    "and gradients, whatever a filter or ignored tokens leave out. Extra memory is torch's peak "
    "beyond what was allocated before the call and the gradients. Host time is the median of up to "
    "{host} calls with an idle queue, without waiting for the GPU. Errors are relative, those of "
    "gradients by the Frobenius norm, to a float64 evaluation of the same inputs."
)

Run = Callable[[], Any]


class Spans(NamedTuple):
    """How long a measurement may take.

    Attributes
    ----------
    burst, block : float
        Seconds of alternating pairs, and of one side alone.
    least : int
        Pairs, or calls of a block, however long they take.
    """

    burst: float
    block: float
    least: int

    @property
    def protocol(self) -> str:
        """What is to be said with the figures."""
        return PROTOCOL.format(
            burst=self.burst,
            block=self.block,
            least=self.least,
            most=MOST_PAIRS,
            warm_ups=WARM_UPS,
            host=MOST_HOST_CALLS,
        )


@dataclass
class Row:
    """The figures of one run; times in ms."""

    run: str
    base: str
    ms: float
    base_ms: float
    ratio: float
    pairs: int
    sustained_ms: float
    sustained_base_ms: float
    sustained_ratio: float
    tflops: float
    extra_mib: float
    host_us: float
    same_bits: bool
    loss_error: float | None = None
    de_error: float | None = None
    dc_error: float | None = None


def measure(
    run: str, call: Run, base: str, base_call: Run, *, tflop: float, outputs: int, spans: Spans
) -> Row:
    """Time a call against another.

    Parameters
    ----------
    run, base : str
        What they are called.
    call, base_call : callable
    tflop : float
        What an exact and dense evaluation takes.
    outputs : int
        Bytes of what a call returns, which are no extra memory.
    spans : Spans
    """
    # First, so that what a call sets up but once counts for neither its memory nor its time.
    for _ in range(WARM_UPS):
        call()
        base_call()
    extra = _extra_memory(call, outputs)
    same = _same_bits(call)
    each, base_each = _block(call, 1), _block(base_call, 1)
    pairs = min(max(math.ceil(spans.burst / (each + base_each)), spans.least), MOST_PAIRS)
    times = _pairs(call, base_call, pairs)
    sustained = _block(call, max(math.ceil(spans.block / each), spans.least))
    base_sustained = _block(base_call, max(math.ceil(spans.block / base_each), spans.least))
    seconds = statistics.median(own for own, _ in times)
    return Row(
        run=run,
        base=base,
        ms=1e3 * seconds,
        base_ms=1e3 * statistics.median(other for _, other in times),
        ratio=statistics.median(own / other for own, other in times),
        pairs=pairs,
        sustained_ms=1e3 * sustained,
        sustained_base_ms=1e3 * base_sustained,
        sustained_ratio=sustained / base_sustained,
        tflops=tflop / seconds,
        extra_mib=extra / MEBIBYTE,
        host_us=1e6 * _host_time(call, min(max(int(HOST_SECONDS / each), 3), MOST_HOST_CALLS)),
        same_bits=same,
    )


def tensors(found: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of what a call returned, the loss first."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, tuple):
        for part in found:
            yield from tensors(part)


def release() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _pairs(call: Run, base_call: Run, number: int) -> list[tuple[float, float]]:
    """Return seconds of both sides of alternating pairs, all enqueued before any is waited for."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * number + 1)]
    gc.collect()
    torch.cuda.synchronize()
    # The GPU has something to do while the host runs ahead of it.
    base_call()
    events[0].record()
    for pair in range(number):
        call()
        events[2 * pair + 1].record()
        base_call()
        events[2 * pair + 2].record()
    torch.cuda.synchronize()
    spans = [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return list(zip(spans[::2], spans[1::2], strict=True))


def _block(call: Run, number: int) -> float:
    """Return the mean seconds of calls that follow each other at once."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(number):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end) / number


def _host_time(call: Run, number: int) -> float:
    seconds = []
    for _ in range(number):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _extra_memory(call: Run, outputs: int) -> int:
    """Return the peak of torch's allocations in a call, beyond its outputs, in bytes."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before - outputs


def _same_bits(call: Run) -> bool:
    one, other = (list(tensors(call())) for _ in range(2))
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
