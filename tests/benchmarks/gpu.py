"""Times on a GPU against the vendor's logits GEMM and against peers, in one process.

    python tests/benchmarks/gpu.py --case gemma3-like wide --json FILE.json

Every case prints the profile of its data, since a filter's speed is a matter of the data. The
record is written after every row, and report.py joins records of several runs. Without a GPU,
``cases.py`` and ``calibrated.py`` still work on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import Exact, evaluate_exactly, loss_error, relative_error, seed_errors
from calibrated import Inputs, make_inputs, measure_profile
from cases import CASES, SWEEPS, Case
from peers import ONE_FORWARD, PEERS, AbsentError, Loss
from records import describe_machine, write_record
from rich.console import Console
from rich.table import Table
from runs import FORWARD, FORWARD_BITS, FOUR_PRODUCTS, GRADIENTS, OURS, UNFILTERED, VENDOR
from timing import MEBIBYTE, Run, Spans, measure, release, tensors

import cce_cupy

WORKSPACES = (256, 64)
"""MiB, beside the default."""

SEEDED = (("bfloat16", "auto"), ("float16", "as bfloat16"), ("float16", 2.0**-9))
"""Dtypes and eps of the comparison of seeds: float16 rounds 8 times finer, and hides less."""

DEVICE = "cuda"


class Job(NamedTuple):
    """A run that is to be measured against a base.

    Attributes
    ----------
    run, base : str
    make : callable
        Returns the call; what it raises is the reason why there is none.
    products : int
        Of the size of the logits' one, that an exact and dense evaluation needs.
    judged : bool
        Whether its results are those of the case itself, to be compared with exact ones.
    """

    run: str
    base: str
    make: Callable[[], Run]
    products: int
    judged: bool = True


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and record where asked to."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.sweep and (len(options.case) > 1 or options.case == ["all"]):
        parser.error("--sweep takes one case")
    if options.steps and not options.sweep:
        parser.error("--steps are those of a --sweep")
    if not torch.cuda.is_available():
        sys.exit("gpu.py: this torch sees no NVIDIA GPU; tests/benchmarks/cpu.py needs none")
    if options.json and not options.json.parent.is_dir():
        sys.exit(f"gpu.py: there is no folder {options.json.parent}")
    console = Console(width=200)
    spans = Spans(options.burst, options.block, options.least)
    record: dict[str, Any] = {"protocol": spans.protocol, **describe_machine(options.commit)}
    record["versions"]["cuda"] = torch.version.cuda
    record["cases"] = []
    if not options.prepare:
        console.print(spans.protocol, highlight=False)

    def save() -> None:
        if options.json:
            write_record(options.json, record)

    well = True
    for name, inputs in _all_inputs(options, console):
        if options.prepare:
            _prepare(name, inputs, options, console)
            continue
        found = _describe(name, inputs, options)
        record["cases"].append(found)
        save()
        for line in _measure_case(inputs, found, options, spans):
            console.print(f"{name}: {line}", highlight=False, markup=False)
            save()
        well &= not any(run.startswith(OURS) for run in found["absent"])
        _show(console, found)
        del inputs
        release()
    if not well:
        sys.exit("gpu.py: some of our own runs failed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--case", nargs="+", choices=[*CASES, "all"], default=["gemma3-like"])
    add("--arrays", type=Path, help="safetensors with e, c and targets, for smollm2")
    add("--sweep", choices=SWEEPS, help="N or V in powers of two, the rest as in the case")
    add("--steps", type=int, nargs="+", help="of the sweep, instead of its own")
    add("--peers-only", action="store_true", help="none of our own runs")
    add("--forward-only", action="store_true", help="no gradients, of ours or of others")
    add("--no-unfiltered", action="store_true", help="not without a filter, which takes long")
    add("--workspaces", action="store_true", help="also: gradients in 256 and in 64 MiB")
    add("--options", action="store_true", help="also: bias, softcap and scale")
    add("--ignored", action="store_true", help="also: half of the tokens ignored")
    add("--accuracy", action="store_true", help="also: errors of the gradients")
    add("--seeds", type=int, default=0, help="also: the mean over so many seeds of the filter")
    add("--peers", nargs="*", choices=PEERS, help="also: these, or all where none is named")
    add("--prepare", action="store_true", help="only compile what the other options would time")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    add("--tokens", type=int, help="instead of the case's own")
    add("--dim", type=int)
    add("--vocab", type=int)
    add("--seed", type=int, default=0)
    add("--burst", type=float, default=2.0, help="seconds of alternating pairs")
    add("--block", type=float, default=1.0, help="seconds of a sustained block")
    add("--least", type=int, default=5, help="calls of a burst or block, however long they take")
    add("--commit", help="to record where this is no git checkout")
    add("--json", type=Path, help="file to record the figures in")
    return parser


def _all_inputs(options: argparse.Namespace, console: Console) -> Iterator[tuple[str, Inputs]]:
    names = list(CASES) if options.case == ["all"] else options.case
    for name in names:
        case = CASES[name]._replace(
            **{k: v for k in ("tokens", "dim", "vocab") if (v := getattr(options, k))}
        )
        if case.peaks is None and options.arrays is None:
            console.print(
                f"{name}: absent. It takes the real hidden states of a model: --arrays FILE, a "
                "safetensors file with e (N, D), c (V, D) and targets (N,), as hidden_states.py "
                "makes it."
            )
            continue
        for inputs in _inputs(case, options):
            yield name, inputs


def _inputs(case: Case, options: argparse.Namespace) -> Iterator[Inputs]:
    """Yield the inputs of a case, or those of each step of a sweep."""
    dtype = getattr(torch, options.dtype)
    steps = options.steps or SWEEPS.get(options.sweep, ())
    if case.peaks is None:
        from safetensors.torch import load_file

        arrays = load_file(options.arrays, device=DEVICE)
        e, c = (arrays[k].to(dtype).flatten(end_dim=-2) for k in ("e", "c"))
        whole = Inputs(e, c, arrays["targets"].flatten().long())
    elif options.prepare:
        whole = _plain_inputs(case, dtype)
    elif options.sweep == "vocab":
        for vocab in steps:
            sizes = case.tokens, case.dim, vocab
            yield make_inputs(*sizes, case.peaks, dtype=dtype, device=DEVICE, seed=options.seed)
            release()
        return
    else:
        sizes = max([case.tokens, *steps]), case.dim, case.vocab
        whole = make_inputs(*sizes, case.peaks, dtype=dtype, device=DEVICE, seed=options.seed)
    if options.sweep != "tokens":
        yield whole
        return
    for tokens in steps:
        yield Inputs(whole.e[:tokens], whole.c, whole.targets[:tokens])


def _plain_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Return inputs of the right sizes, quickly."""
    e = torch.randn(case.tokens, case.dim, device=DEVICE).to(dtype)
    c = torch.randn(case.vocab, case.dim, device=DEVICE).to(dtype) / case.dim**0.5
    return Inputs(e, c, torch.randint(case.vocab, (case.tokens,), device=DEVICE))


def _describe(name: str, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Return a case's record, without rows yet."""
    (tokens, dim), vocab = inputs.e.shape, len(inputs.c)
    return {
        "case": name,
        "tokens": tokens,
        "dim": dim,
        "vocab": vocab,
        "dtype": str(inputs.e.dtype).removeprefix("torch."),
        "sweep": options.sweep,
        "profile": None if options.sweep else asdict(measure_profile(*inputs)),
        "filter": cce_cupy.filter_statistics(*inputs)._asdict(),
        "forward": _left_behind(inputs),
        "rows": [],
        "seeds": [],
        "absent": {},
    }


def _measure_case(
    inputs: Inputs, found: dict[str, Any], options: argparse.Namespace, spans: Spans
) -> Iterator[str]:
    """Add to a case's record, and say of each row what has been added."""
    exact = evaluate_exactly(inputs) if options.accuracy else None
    bases = _bases(inputs)
    product = 2e-12 * found["tokens"] * found["vocab"] * found["dim"]
    size = sum(array.nbytes for array in inputs[:2])
    for job in _jobs(inputs, options):
        run = job.run
        try:
            call = job.make()
            row = measure(
                run,
                call,
                job.base,
                bases[job.base],
                tflop=job.products * product,
                outputs=size if job.products > 1 else 0,
                spans=spans,
            )
            if job.judged and exact is not None:
                _judge(row, call(), exact)
        except AbsentError as error:
            found["absent"][run] = str(error)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            found["absent"][run] = "does not fit in memory"
        except Exception as error:  # one that fails is a result, and not the end of the others
            found["absent"][run] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            found["rows"].append(asdict(row))
        if reason := found["absent"].get(run):
            yield f"{run}: {reason}"
        else:
            yield f"{run}: {row.ms:.3f} ms, {row.ratio:.3f} of {job.base}"
        release()
    if options.seeds:
        del bases
        for figures in _compare_seeds(inputs, options.seeds):
            found["seeds"].append(figures)
            yield f"{options.seeds} seeds, {figures['dtype']}: {figures['dc']}"


def _bases(inputs: Inputs) -> dict[str, Run]:
    """Return what runs are measured against."""
    e, c, _ = inputs
    logits = torch.empty(len(e), len(c), dtype=e.dtype, device=e.device)
    de, dc = torch.empty_like(e), torch.empty_like(c)

    def vendor() -> None:
        torch.matmul(e, c.T, out=logits)

    def four_products() -> None:
        vendor()
        vendor()
        torch.matmul(logits, c, out=de)
        torch.matmul(logits.T, e, out=dc)

    plain = {
        FORWARD_BITS: lambda: cce_cupy.linear_cross_entropy_vjp(*inputs),
        GRADIENTS: lambda: cce_cupy.linear_cross_entropy_value_and_grad(*inputs),
    }
    return {VENDOR: vendor, FOUR_PRODUCTS: four_products, **plain}


def _jobs(inputs: Inputs, options: argparse.Namespace) -> Iterator[Job]:
    """Yield what is measured, ours first."""
    gradients = not options.forward_only
    if not options.peers_only:
        yield from _our_jobs(inputs, gradients, options)
    if options.peers is not None or options.peers_only:
        for name in options.peers or PEERS:
            yield from _peer_jobs(name, inputs, gradients)


def _our_jobs(inputs: Inputs, gradients: bool, options: argparse.Namespace) -> Iterator[Job]:
    forward = cce_cupy.linear_cross_entropy_vjp
    both = cce_cupy.linear_cross_entropy_value_and_grad

    def ours(function: Callable[..., Any], **extra: Any) -> Callable[[], Run]:
        return lambda: lambda: function(*inputs, **extra)

    yield Job(FORWARD_BITS, VENDOR, ours(forward), 1)
    yield Job(FORWARD, VENDOR, ours(cce_cupy.linear_cross_entropy), 1)
    if gradients:
        yield Job(GRADIENTS, VENDOR, ours(both), 3)
        for size in WORKSPACES if options.workspaces else ():
            run = f"{GRADIENTS}, {size} MiB"
            yield Job(run, VENDOR, ours(both, workspace_bytes=size * MEBIBYTE), 3)
        if not options.no_unfiltered:
            yield Job(UNFILTERED, FOUR_PRODUCTS, ours(both, gradient_filter=None), 3)
    stages = [(FORWARD_BITS, forward, 1)] + ([(GRADIENTS, both, 3)] if gradients else [])
    if options.options:
        bias = torch.zeros(len(inputs.c), dtype=inputs.e.dtype, device=inputs.e.device)
        # These leave the data its profile; a softcap as models have it would flatten it, and more
        # columns would be kept.
        extras: dict[str, dict[str, Any]] = {"bias": {"bias": bias}}
        extras |= {"softcap": {"softcap": 1000.0}, "scale": {"logit_scale": 0.999}}
        extras["softcap that flattens"] = {"softcap": 30.0}
        for stage, function, products in stages:
            for name, extra in extras.items():
                yield Job(f"{stage}, {name}", stage, ours(function, **extra), products, False)
    if options.ignored:
        for stage, function, products in stages:
            for name, mask in _ignored(len(inputs.e)).items():
                targets = torch.where(mask.to(inputs.e.device), -100, inputs.targets)

                def make(
                    function: Callable[..., Any] = function, targets: torch.Tensor = targets
                ) -> Run:
                    return lambda: function(*inputs[:2], targets)

                yield Job(f"{stage}, half ignored {name}", stage, make, products, False)


def _peer_jobs(name: str, inputs: Inputs, gradients: bool) -> Iterator[Job]:
    e, c = (array.detach().requires_grad_() for array in inputs[:2])

    def make_forward() -> Run:
        function = PEERS[name]()

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward

    def make_both() -> Run:
        function: Loss = PEERS[name]()

        def both() -> tuple[Any, ...]:
            loss = function(e, c, inputs.targets)
            loss.backward()
            found = loss.detach(), (e.grad, c.grad)
            e.grad = c.grad = None  # which would count as allocated before the next call
            return found

        return both

    if name not in ONE_FORWARD:
        yield Job(f"{name}, forward", VENDOR, make_forward, 1)
    if gradients:
        yield Job(f"{name}, loss + gradients", VENDOR, make_both, 3)


def _judge(row: Any, found: Any, exact: Exact) -> None:
    loss, *gradients = tensors(found)
    row.loss_error = loss_error(loss, exact)
    if gradients:
        row.de_error = relative_error(gradients[0], exact.de)
        row.dc_error = relative_error(gradients[1], exact.dc)


def _compare_seeds(inputs: Inputs, seeds: int) -> Iterator[dict[str, Any]]:
    for dtype, eps in SEEDED:
        chosen = getattr(torch, dtype)
        some = Inputs(inputs.e.to(chosen), inputs.c.to(chosen), inputs.targets)
        filter_eps = 16 / len(inputs.c) if eps == "as bfloat16" else eps
        yield seed_errors(some, evaluate_exactly(some), seeds, filter_eps)
        release()


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


def _prepare(name: str, inputs: Inputs, options: argparse.Namespace, console: Console) -> None:
    """Make every call once, which compiles what is not in a cache yet."""
    for job in _jobs(inputs, options):
        begun = time.perf_counter()
        try:
            job.make()()
            torch.cuda.synchronize()
            result = "ready"
        except Exception as error:  # it will be recorded when it is measured
            result = f"{type(error).__name__}: {error}".partition("\n")[0]
        seconds = time.perf_counter() - begun
        console.print(f"{name}: {job.run}: {result}, {seconds:.1f} s", markup=False)
        release()


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
            "backward": "portable" if call.plan.hopper_backward is None else "sm90",
            "filter": call.plan.gradient_filter,
            "eps": call.plan.filter_eps,
            "marked": marked / (call.plan.tiles * len(inputs.c)),
            "bits_mib": size / MEBIBYTE,
            "forward_mib": sum(call.plan.forward.values()) / MEBIBYTE,
        }
    except Exception as error:  # the figures that took long must not be lost for this one
        return {"unknown": f"{type(error).__name__}: {error}"}


def _show(console: Console, found: dict[str, Any]) -> None:
    table = Table(
        title=f"{found['case']}: N {found['tokens']}, D {found['dim']}, V {found['vocab']}, "
        f"{found['dtype']}",
        title_justify="left",
        caption="\n".join(_profile_lines(found)),
        caption_justify="left",
    )
    headings = ["run", "of", "ms", "its ms", "ratio", "sustained ms", "ratio", "TFLOP/s"]
    headings += ["extra MiB", "host us", "loss error", "dE error", "dC error", "same bits"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "of") else "right")
    for row in found["rows"]:
        errors = [row[name] for name in ("loss_error", "de_error", "dc_error")]
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
            *("" if error is None else f"{error:.1e}" for error in errors),
            "yes" if row["same_bits"] else "NO",
        )
    console.print(table)


def _profile_lines(found: dict[str, Any]) -> Iterator[str]:
    effect, forward, profile = found["filter"], found["forward"], found["profile"]
    missing = effect["missing"]
    yield (
        f"filter {effect['gradient_filter']}, eps {effect['filter_eps']:.2e}: the backward works "
        f"on {100 * effect['kept']:.2f} % of the pairs"
        + ("" if missing is None else f"; probability not stood for {missing:.2e}")
    )
    if profile is not None:
        at = ", ".join(f"{100 * part:.1f} % at 2^-{n}" for n, part in profile["threshold"].items())
        yield f"mean loss {profile['loss']:.2f}; threshold columns kept: {at}"
        yield (
            f"unbiased: {100 * profile['unbiased']:.1f} % at 2^-14, "
            f"{100 * profile['default']:.1f} % at the default 16 / V; 128 x 128 tiles with "
            f"p >= 2^-12: {100 * profile['tiles']:.0f} %"
        )
        yield (
            f"kept by any row tile {100 * profile['union']:.1f} % of V, by one alone "
            f"{100 * profile['one']:.1f} %, by half or more {100 * profile['half']:.1f} %"
        )
    if "unknown" not in forward:
        yield (
            f"tier {forward['tier']}, backward {forward['backward']}; the forward's bits mark "
            f"{100 * forward['marked']:.1f} % and take {forward['bits_mib']:.1f} MiB; its other "
            f"workspace {forward['forward_mib']:.2f} MiB"
        )


if __name__ == "__main__":
    main()
