"""The host's time of a call in PyTorch on a GPU, after warm-up.

    python tests/benchmarks/torch_overhead.py --json overhead.json

Each call begins with an idle queue and is not waited for: what is timed is Python, the operator,
autograd and the launches. What the GPU then takes is measured apart, with calls back to back.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from records import describe_machine, write_record
from torch.nn import functional

import cce_cupy

CALLS = 300
WARM_UPS = 30

DEVICE = "cuda"

Run = Callable[[], Any]


class EngineAlone(torch.autograd.Function):
    """A loss that computes nothing: no operator in Python that autograd calls takes the host less.

    The gradients are allocated, and torch itself launches the filling of the loss's gradient.
    """

    @staticmethod
    def forward(ctx: Any, e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return a number of no meaning."""
        ctx.save_for_backward(e, c)
        return torch.empty((), device=e.device)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of no meaning."""
        e, c = ctx.saved_tensors
        return torch.empty_like(e), torch.empty_like(c), None


def runs(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """Yield what is timed."""
    ours = cce_cupy.linear_cross_entropy
    leaves = [array.detach().clone().requires_grad_() for array in (e, c)]

    def backward(loss: Callable[..., torch.Tensor], *, own_thread: bool = True) -> Run:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            # The engine hands a backward on a GPU to a thread of its own, unless it is told not to.
            with torch.autograd.set_multithreading_enabled(own_thread):
                loss(*leaves, targets).backward()

        return run

    def full(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(e, c).float(), targets)

    yield "forward", lambda: ours(e, c, targets)
    yield "forward, differentiable", lambda: ours(*leaves, targets)
    yield "forward + backward", backward(ours)
    yield "forward + backward in one thread", backward(ours, own_thread=False)
    yield (
        "forward + backward, no filter",
        backward(lambda *given: ours(*given, gradient_filter=None)),
    )
    yield "value and grad", lambda: cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
    yield "torch's from logits, forward + backward", backward(full)
    yield "torch's from logits, in one thread", backward(full, own_thread=False)
    yield "engine alone, forward + backward", backward(EngineAlone.apply)
    yield "engine alone, in one thread", backward(EngineAlone.apply, own_thread=False)
    compiled = torch.compile(ours, fullgraph=True)
    yield "compiled, forward + backward", backward(compiled)


def time_run(run: Run) -> dict[str, float]:
    """Return host and device times of a call, in microseconds."""
    for _ in range(WARM_UPS):
        run()
    gc.collect()
    gc.disable()
    host = []
    try:
        for _ in range(CALLS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
        throughput = (time.perf_counter() - began) / CALLS
    finally:
        gc.enable()
    return {
        "host_us": 1e6 * statistics.median(host),
        "fastest_us": 1e6 * min(host),
        "back_to_back_us": 1e6 * throughput,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="to record where this is no git checkout")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    e = torch.randn(given.tokens, given.dim, device=DEVICE).bfloat16()
    c = (torch.randn(given.vocab, given.dim, device=DEVICE) / given.dim**0.5).bfloat16()
    targets = torch.randint(given.vocab, (given.tokens,), device=DEVICE)
    record: dict[str, Any] = {
        **describe_machine(given.commit),
        "tokens": given.tokens,
        "dim": given.dim,
        "vocab": given.vocab,
        "runs": {},
        "absent": {},
    }
    for name, run in runs(e, c, targets):
        try:
            record["runs"][name] = found = time_run(run)
        except Exception as error:  # one that fails is a result, and not the end of the others
            record["absent"][name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"{name}: {record['absent'][name]}")
        else:
            print(name, {key: round(value, 1) for key, value in found.items()})
        if given.json is not None:
            write_record(given.json, record)


if __name__ == "__main__":
    main()
