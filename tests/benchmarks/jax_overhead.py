"""What a call inside a jitted function costs beyond its kernels, on a GPU.

    python tests/benchmarks/jax_overhead.py --json overhead.json

A program of many calls, each on what the one before left, is timed against one of few; the
difference is what one more call takes. The same launches through CuPy, captured in a CUDA graph and
replayed, are the kernels' own time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import jax
import jax.numpy as jnp
import numpy as np
from records import describe_machine, write_record

import cce_cupy

FEW, MANY = 2, 10
RUNS = 200
STAGES = ("forward", "loss and gradients")


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median time of a call that waits for its work."""
    for _ in range(20):
        run()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def program(stage: str, calls: int) -> Any:
    """Return a jitted function of so many calls, none of which can begin before the last ended."""

    def run(e: Any, c: Any, targets: Any) -> Any:
        for _ in range(calls):
            if stage == "forward":
                loss = cce_cupy.linear_cross_entropy(e, c, targets)
            else:
                loss, (de, dc) = jax.value_and_grad(cce_cupy.linear_cross_entropy, (0, 1))(
                    e, c, targets
                )
                loss = loss + (de[0, 0] + dc[0, 0]).astype(loss.dtype)
            # One element carries the dependence; copying all of e would be time of its own.
            targets = targets.at[0].set(jnp.where(loss < 0, 1, targets[0]))
        return targets, loss

    return jax.jit(run)


def idle_program(calls: int) -> Any:
    """Return what `program` does beside the calls."""

    def run(e: Any, c: Any, targets: Any) -> Any:
        for k in range(calls):
            loss = jax.lax.optimization_barrier(e[k, 0].astype(jnp.float32) * e[k, 0])
            targets = targets.at[0].set(jnp.where(loss < 0, 1, targets[0]))
            targets = jax.lax.optimization_barrier(targets)
        return targets, loss

    return jax.jit(run)


def slope(make: Callable[[int], Any], arrays: list[Any]) -> float:
    """Return the seconds of one call more."""
    seconds = {}
    for calls in (FEW, MANY):
        compiled = make(calls)
        seconds[calls] = median_seconds(
            lambda compiled=compiled: jax.block_until_ready(compiled(*arrays))
        )
    return (seconds[MANY] - seconds[FEW]) / (MANY - FEW)


def kernels_seconds(stage: str, arrays: list[np.ndarray]) -> float:
    """Return the time of the kernels of one call: a CUDA graph of many, replayed."""
    e, c, targets = map(cupy.asarray, arrays)

    def call() -> Any:
        if stage == "forward":
            return cce_cupy.linear_cross_entropy(e, c, targets)
        return cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)

    seconds = {}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        # What CuPy's pool has no room for yet would be asked of the driver while it captures.
        kept = [call() for _ in range(MANY)]
        del kept
        for calls in (FEW, MANY):
            stream.begin_capture()
            kept = [call() for _ in range(calls)]
            graph = stream.end_capture()

            def replay(graph: Any = graph) -> None:
                graph.launch(stream)
                stream.synchronize()

            seconds[calls] = median_seconds(replay)
            del kept
    return (seconds[MANY] - seconds[FEW]) / (MANY - FEW)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="to record where this is no git checkout")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    e = np.asarray(rng.standard_normal((given.tokens, given.dim)), jnp.bfloat16)
    c = np.asarray(0.05 * rng.standard_normal((given.vocab, given.dim)), jnp.bfloat16)
    arrays = [e, c, rng.integers(0, given.vocab, given.tokens).astype(np.int32)]
    placed = list(map(jnp.asarray, arrays))
    beside = slope(idle_program, placed)
    sizes = {"tokens": given.tokens, "dim": given.dim, "vocab": given.vocab}
    record: dict[str, Any] = {**describe_machine(given.commit), **sizes, "stages": {}}
    for stage in STAGES:
        whole = slope(lambda calls, stage=stage: program(stage, calls), placed)
        kernels = kernels_seconds(stage, arrays)
        record["stages"][stage] = found = {
            "call_us": 1e6 * whole,
            "kernels_us": 1e6 * kernels,
            "beside_us": 1e6 * beside,
            "overhead_us": 1e6 * (whole - kernels - beside),
        }
        print(stage, {name: round(value, 1) for name, value in found.items()})
        if given.json is not None:
            write_record(given.json, record)


if __name__ == "__main__":
    main()
