"""Times on a GPU against the vendor's logits GEMM and against peers, in one process.

    python tests/benchmarks/gpu.py --case gemma3-like wide --json tests/benchmarks/results/h100.json

Every case prints the profile of its data, since a filter's speed is a matter of the data. Without
a GPU, ``cases.py`` and ``calibrated.py`` still work on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from calibrated import Inputs, make_inputs, measure_profile, reference_loss
from cases import CASES, SWEEP, Case
from picture import draw
from rich.console import Console
from rich.table import Table

import cce_cupy
from cce_cupy.compiler import sources_hash

MEBIBYTE = 2**20
WARM_UPS = 3
MOST_PAIRS = 100
LEAST_CALLS = 5
HOST_CALLS = 20

PROTOCOL = (
    "Ratios: run and base (the vendor's logits GEMM, torch.matmul into a preallocated output, "
    "unless another base is named) alternate in one burst of about {burst:g} s, {least} to {most} "
    "pairs, after {warm_ups} calls of each to warm up; CUDA events stand around every call and the "
    "host does not wait between them; ms are medians over the burst, the ratio is the median of "
    "the pairs' own ratios. Sustained: about {block:g} s of the run alone, back to back, then the "
    "same of the base; ms are means. TFLOP/s count 2NVD of a forward and 6NVD of loss and "
    "gradients, whatever a filter or ignored tokens leave out. Extra memory is torch's peak beyond "
    "what was allocated before the call and the gradients. Host time is the median of {host} calls "
    "with an idle queue, without waiting for the GPU. The loss error is relative to a float64 "
    "evaluation of the same inputs."
)

OURS = "ours, "
FORWARD_BITS = f"{OURS}forward + kept bits"
FORWARD = f"{OURS}forward alone"
GRADIENTS = f"{OURS}loss + gradients"
UNFILTERED = f"{OURS}loss + gradients, no filter"

Run = Callable[[], Any]


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
    loss_error: float | None
    same_bits: bool | None


def main() -> None:
    """Measure, print, and record and draw where asked to."""
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: this torch sees no NVIDIA GPU; tests/benchmarks/cpu.py needs none")
    names = list(CASES) if options.case == ["all"] else options.case
    for path in (options.json, options.picture):
        if path and not path.parent.is_dir():
            sys.exit(f"gpu.py: there is no folder {path.parent}")
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        sys.exit("gpu.py: --picture needs matplotlib; picture.py draws from a --json FILE later")
    console = Console(width=180)
    protocol = PROTOCOL.format(
        burst=options.burst,
        block=options.block,
        least=LEAST_CALLS,
        most=MOST_PAIRS,
        warm_ups=WARM_UPS,
        host=HOST_CALLS,
    )
    console.print(protocol, highlight=False)
    record: dict[str, Any] = {"protocol": protocol, **_machine(options.commit), "cases": []}
    for name in names:
        case = CASES[name]._replace(
            **{k: v for k in ("tokens", "dim", "vocab") if (v := getattr(options, k))}
        )
        inputs = _inputs(name, case, options, console)
        if inputs is None:
            continue
        for tokens in SWEEP if options.sweep else (len(inputs.e),):
            part = Inputs(inputs.e[:tokens], inputs.c, inputs.targets[:tokens])
            found = measure_case(name, part, options)
            record["cases"].append(found)
            _show(console, found)
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        del inputs, part
        _release()
    if options.picture:
        draw(record, options.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--case", nargs="+", choices=[*CASES, "all"], default=["gemma3-like"])
    add("--arrays", type=Path, help="safetensors with e, c and targets, for smollm2")
    add("--sweep", action="store_true", help=f"N from {SWEEP[0]} to {SWEEP[-1]}")
    add("--forward-only", action="store_true", help="no gradients, of ours or of others")
    add("--options", action="store_true", help="also: bias, softcap and scale")
    add("--ignored", action="store_true", help="also: half of the tokens ignored")
    add("--compile", action="store_true", help="also: torch.compile, where its logits fit")
    add("--peers", action="store_true", help="also: cut_cross_entropy and liger_kernel")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    add("--tokens", type=int, help="instead of the case's own")
    add("--dim", type=int)
    add("--vocab", type=int)
    add("--seed", type=int, default=0)
    add("--burst", type=float, default=2.0, help="seconds of alternating pairs")
    add("--block", type=float, default=1.0, help="seconds of a sustained block")
    add("--commit", help="to record where this is no git checkout")
    add("--json", type=Path, help="file to record the figures in")
    add("--picture", type=Path, help="file to draw them in; needs matplotlib")
    return parser


def _inputs(name: str, case: Case, options: argparse.Namespace, console: Console) -> Inputs | None:
    dtype = getattr(torch, options.dtype)
    if case.peaks is None:
        if options.arrays is None:
            console.print(
                f"{name}: absent. It takes the real hidden states of a model: --arrays FILE, a "
                "safetensors file with e (N, D), c (V, D) and targets (N,), as hidden_states.py "
                "makes it."
            )
            return None
        from safetensors.torch import load_file

        arrays = load_file(options.arrays, device="cuda")
        e, c = (arrays[k].to(dtype).flatten(end_dim=-2) for k in ("e", "c"))
        return Inputs(e, c, arrays["targets"].flatten().long())
    tokens = SWEEP[-1] if options.sweep else case.tokens
    return make_inputs(tokens, case.dim, case.vocab, case.peaks, dtype=dtype, seed=options.seed)


def measure_case(name: str, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a case, as they are recorded."""
    (tokens, dim), vocab = inputs.e.shape, len(inputs.c)
    rows, absent = _time(inputs, options)
    return {
        "case": name,
        "tokens": tokens,
        "dim": dim,
        "vocab": vocab,
        "dtype": str(inputs.e.dtype).removeprefix("torch."),
        "profile": asdict(measure_profile(*inputs)),
        "forward": _left_behind(inputs),
        "rows": [asdict(row) for row in rows],
        "absent": absent,
    }


def _time(inputs: Inputs, options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a case, and why others are not there."""
    (tokens, dim), vocab = inputs.e.shape, len(inputs.c)
    logits = torch.empty(tokens, vocab, dtype=inputs.e.dtype, device=inputs.e.device)
    product = 2e-12 * tokens * vocab * dim
    exact = reference_loss(*inputs)

    def vendor() -> torch.Tensor:
        return torch.matmul(inputs.e, inputs.c.T, out=logits)

    rows: list[Row] = []
    absent: dict[str, str] = {}
    for run, call, products in _runs(inputs, options):
        try:
            if call is None:
                absent[run] = "not importable"
                continue
            rows.append(
                _measure(run, call, products * product, inputs, "vendor GEMM", vendor, options)
            )
            rows[-1].loss_error = _loss_error(call(), exact)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            absent[run] = "does not fit in memory"
        except Exception as error:  # a peer's failure is a result, not the end of ours
            if run.startswith(OURS):
                raise
            absent[run] = f"{type(error).__name__}: {error}".partition("\n")[0]
        _release()
    for run, call, base, base_call in _variants(inputs, options):
        rows.append(_measure(run, call, product, inputs, base, base_call, options))
        _release()
    return rows, absent


def _runs(inputs: Inputs, options: argparse.Namespace) -> Iterator[tuple[str, Run | None, int]]:
    """Yield what is measured against the vendor's GEMM: name, call, products of that size."""
    yield FORWARD_BITS, lambda: cce_cupy.linear_cross_entropy_vjp(*inputs), 1
    yield FORWARD, lambda: cce_cupy.linear_cross_entropy(*inputs), 1
    gradients = not options.forward_only
    if gradients:
        ours = cce_cupy.linear_cross_entropy_value_and_grad
        yield GRADIENTS, lambda: ours(*inputs), 3
        yield UNFILTERED, lambda: ours(*inputs, gradient_filter=None), 3
    others: dict[str, Callable[..., torch.Tensor] | None] = {}
    if options.compile:
        others["torch.compile"] = torch.compile(_materialised, dynamic=False)
    if options.peers:
        others["cut_cross_entropy"] = _cut_cross_entropy()
        others["liger_kernel"] = _liger()
    e, c = (array.detach().requires_grad_() for array in inputs[:2])
    for name, function in others.items():
        if function is None:
            yield name, None, 1
            continue

        def forward(function: Callable[..., torch.Tensor] = function) -> torch.Tensor:
            with torch.no_grad():
                return function(*inputs)

        def both(function: Callable[..., torch.Tensor] = function) -> tuple[Any, ...]:
            loss = function(e, c, inputs.targets)
            loss.backward()
            found = loss.detach(), (e.grad, c.grad)
            e.grad = c.grad = None  # which would count as allocated before the next call
            return found

        yield f"{name}, forward", forward, 1
        if gradients:
            yield f"{name}, loss + gradients", both, 3


def _variants(inputs: Inputs, options: argparse.Namespace) -> Iterator[tuple[str, Run, str, Run]]:
    """Yield variants of our forward, and what each is measured against."""
    forward = cce_cupy.linear_cross_entropy_vjp

    def plain() -> Any:
        return forward(*inputs)

    if options.options:
        bias = torch.zeros(len(inputs.c), dtype=inputs.e.dtype, device=inputs.e.device)
        extras = {"bias": {"bias": bias}, "softcap": {"softcap": 30.0}}
        extras["scale"] = {"logit_scale": 0.999}
        for name, extra in extras.items():
            run = lambda extra=extra: forward(*inputs, **extra)  # noqa: E731
            yield f"{FORWARD_BITS}, {name}", run, FORWARD_BITS, plain
    if options.ignored:
        for name, ignored in _ignored(len(inputs.e)).items():
            targets = torch.where(ignored.to(inputs.e.device), -100, inputs.targets)
            run = lambda targets=targets: forward(*inputs[:2], targets)  # noqa: E731
            yield f"{FORWARD_BITS}, half ignored {name}", run, FORWARD_BITS, plain


def _ignored(tokens: int) -> dict[str, torch.Tensor]:
    """Return masks that hold half of the tokens: in runs of mean length 100, and singly."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(tokens // 25 + 2, generator=generator) * 199).long() + 1
    runs = (torch.arange(len(lengths)) % 2).bool().repeat_interleave(lengths)[:tokens]
    # Exactly half, so that the times compare: the surplus is taken from the end or added there.
    surplus = int(runs.sum()) - tokens // 2
    ends = torch.nonzero(runs if surplus > 0 else ~runs)[:, 0]
    runs[ends[len(ends) - abs(surplus) :]] = surplus < 0
    singly = torch.zeros(tokens, dtype=torch.bool)
    singly[torch.randperm(tokens, generator=generator)[: tokens // 2]] = True
    return {"in runs": runs, "singly": singly}


def _materialised(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy((e @ c.T).float(), targets)


def _cut_cross_entropy() -> Callable[..., torch.Tensor] | None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _liger() -> Callable[..., torch.Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda e, c, targets: loss(c, e, targets)


def _measure(
    run: str,
    call: Run,
    tflop: float,
    inputs: Inputs,
    base: str,
    base_call: Run,
    options: argparse.Namespace,
) -> Row:
    outputs = sum(a.nbytes for a in inputs[:2]) if "gradients" in run else 0
    # First, so that what a call sets up but once counts for neither its memory nor its time.
    for _ in range(WARM_UPS):
        call()
        base_call()
    extra = _extra_memory(call, outputs)
    same = _same_bits(call) if run.startswith(OURS) else None
    each, base_each = _block(call, 1), _block(base_call, 1)
    pairs = min(max(math.ceil(options.burst / (each + base_each)), LEAST_CALLS), MOST_PAIRS)
    times = _pairs(call, base_call, pairs)
    sustained = _block(call, max(math.ceil(options.block / each), LEAST_CALLS))
    base_sustained = _block(base_call, max(math.ceil(options.block / base_each), LEAST_CALLS))
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
        host_us=1e6 * _host_time(call),
        loss_error=None,
        same_bits=same,
    )


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


def _host_time(call: Run) -> float:
    seconds = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _extra_memory(call: Run, outputs: int) -> int:
    """Return the peak of torch's allocations in a call, beyond its gradients, in bytes."""
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
    one, other = (list(_tensors(call())) for _ in range(2))
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, tuple):
        for part in found:
            yield from _tensors(part)


def _loss_error(found: Any, exact: float) -> float:
    error = abs(float(next(_tensors(found))) - exact)
    return error / exact if exact else error


def _left_behind(inputs: Inputs) -> dict[str, Any]:
    """Return what the forward marks for the backward: of the kernels' bits, which are a superset.

    The bits belong to no public interface: where they are not found, they are not reported.
    """
    try:
        from cce_cupy.frameworks.gpu import GpuCall
        from cce_cupy.frameworks.torch import TorchFramework
        from cce_cupy.problem import Options, Problem

        framework = TorchFramework()
        arrays = inputs._asdict()
        specs = {name: framework.describe(name, array) for name, array in arrays.items()}
        problem = Problem.check(specs, Options())
        call = GpuCall(framework.device_memory(inputs.e), problem, arrays)
        loss = torch.empty((), device=inputs.e.device)
        call.run_forward(keep_columns=True, outputs={"loss": loss})
        first, size = call.saved.offsets["bits"], call.plan.saved["bits"]
        bits = call.saved.words.view(torch.uint8)[first : first + size]
        of_byte = torch.tensor([n.bit_count() for n in range(256)], device=bits.device)
        marked = int((torch.bincount(bits.int(), minlength=256) * of_byte).sum())
        return {
            "tier": call.plan.tier,
            "filter": call.plan.gradient_filter,
            "eps": call.plan.filter_eps,
            "marked": marked / (call.plan.tiles * len(inputs.c)),
            "bits_mib": size / MEBIBYTE,
            "forward_mib": sum(call.plan.forward.values()) / MEBIBYTE,
        }
    except Exception as error:  # the figures that took long must not be lost for this one
        return {"unknown": f"{type(error).__name__}: {error}"}


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _machine(commit: str | None) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    packages = ("cce_cupy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy")
    for package in (*packages, "cut-cross-entropy", "liger-kernel"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    fields = "driver_version,power.limit,clocks.max.sm"
    smi = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    found = _output("git", "rev-parse", "HEAD")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory // MEBIBYTE,
        **dict(zip(("driver", "power_limit", "clock_limit"), smi.split(", "), strict=False)),
        "versions": {"cce_cupy": cce_cupy.__version__} | versions,
        "commit": commit or (found and found + (" with changes" if changed else "")) or None,
        "kernels": sources_hash(),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _show(console: Console, found: dict[str, Any]) -> None:
    profile, forward = found["profile"], found["forward"]
    at = ", ".join(f"{100 * part:.1f} % at 2^-{n}" for n, part in profile["threshold"].items())
    lines = [
        f"mean loss {profile['loss']:.2f}; threshold columns kept: {at}",
        f"unbiased: {100 * profile['unbiased']:.1f} % at 2^-14, {100 * profile['default']:.1f} % "
        f"at the default 16 / V; 128 x 128 tiles with p >= 2^-12: {100 * profile['tiles']:.0f} %",
        f"kept by any row tile {100 * profile['union']:.1f} % of V, by one alone "
        f"{100 * profile['one']:.1f} %, by half or more {100 * profile['half']:.1f} %",
    ]
    if "unknown" not in forward:
        lines.append(
            f"tier {forward['tier']}; the forward's bits ({forward['filter']}, eps "
            f"{forward['eps']:.2e}) mark {100 * forward['marked']:.1f} % and take "
            f"{forward['bits_mib']:.1f} MiB; its other workspace {forward['forward_mib']:.2f} MiB"
        )
    table = Table(
        title=f"{found['case']}: N {found['tokens']}, D {found['dim']}, V {found['vocab']}, "
        f"{found['dtype']}",
        title_justify="left",
        caption="\n".join(lines),
        caption_justify="left",
    )
    headings = ["run", "of", "ms", "its ms", "ratio", "sustained ms", "ratio", "TFLOP/s"]
    for heading in [*headings, "extra MiB", "host us", "loss error", "same bits"]:
        table.add_column(heading, justify="left" if heading in ("run", "of") else "right")
    for row in found["rows"]:
        error, same = row["loss_error"], row["same_bits"]
        table.add_row(
            row["run"],
            row["base"],
            f"{row['ms']:.3f}",
            f"{row['base_ms']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['sustained_ms']:.3f}",
            f"{row['sustained_ratio']:.3f}",
            f"{row['tflops']:.0f}",
            f"{row['extra_mib']:.1f}",
            f"{row['host_us']:.0f}",
            "" if error is None else f"{error:.1e}",
            "" if same is None else ("yes" if same else "NO"),
        )
    console.print(table)
    for run, reason in found["absent"].items():
        console.print(f"{run}: absent, {reason}", markup=False)


if __name__ == "__main__":
    main()
