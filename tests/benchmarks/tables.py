"""Records of the benchmarks as tables of Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from runs import FORWARD, FORWARD_BITS, GRADIENTS, OURS, UNFILTERED, VENDOR

Record = dict[str, Any]

GROWN_FROM = 512
"""Tokens from which on the exponent of growth is taken: fewer are bound by reading C."""

FEW = (1, 16, 64, 128)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; empty where there are no rows."""
    cells = [list(row) for row in rows]
    names = list(headings)
    if not cells:
        return ""
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(record: Record) -> str:
    """Return a sentence on where and with what a record was taken."""
    versions = record.get("versions", {})
    named = [f"{name} {v}" for name, v in versions.items() if v and name != "cce_cupy"]
    commit = (record.get("commit") or "unknown")[:12]
    return (
        f"{record.get('device', 'unknown device')}, driver {record.get('driver', 'unknown')}, "
        f"{record['date']}, commit {commit}; {', '.join(named)}."
    )


def forward_table(record: Record) -> str:
    """Return our forward, by case."""
    headings = ["case", "N, D, V", "kept", "with bits", "without", "sustained, with bits"]
    headings += ["extra MiB", "loss error", "host us"]
    return table(headings, filter(None, map(_forward_row, record["cases"])))


def _forward_row(case: Record) -> list[str] | None:
    rows = _own(case)
    if FORWARD_BITS not in rows:
        return None
    bits, alone = rows[FORWARD_BITS], rows.get(FORWARD)
    return [
        case["case"],
        f"{case['tokens']}, {case['dim']}, {case['vocab']}",
        _percent(case["filter"]["kept"]),
        _ratio(bits),
        _ratio(alone),
        f"{bits['sustained_ratio']:.3f}",
        f"{bits['extra_mib']:.1f}",
        _error(bits["loss_error"]),
        f"{alone['host_us']:.0f}" if alone else "",
    ]


def gradients_table(record: Record) -> str:
    """Return our loss and gradients, by case, workspace and filter."""
    headings = ["case", "kept", "missing", "256 MiB", "128 MiB (default)", "64 MiB"]
    headings += ["sustained, 128 MiB", "no filter, of four products", "no filter, of the logits"]
    headings += ["extra MiB, 128 MiB", "same bits"]
    return table(headings, filter(None, map(_gradients_row, record["cases"])))


def _gradients_row(case: Record) -> list[str] | None:
    rows = _own(case)
    if GRADIENTS not in rows:
        return None
    default, unfiltered = rows[GRADIENTS], rows.get(UNFILTERED)
    ours = [row for run, row in rows.items() if run.startswith(GRADIENTS)]
    missing = case["filter"]["missing"]
    return [
        case["case"],
        _percent(case["filter"]["kept"]),
        "" if missing is None else f"{missing:.1e}",
        _ratio(rows.get(f"{GRADIENTS}, 256 MiB")),
        _ratio(default),
        _ratio(rows.get(f"{GRADIENTS}, 64 MiB")),
        f"{default['sustained_ratio']:.3f}",
        _ratio(unfiltered),
        f"{unfiltered['ms'] / default['base_ms']:.2f}" if unfiltered else "",
        f"{default['extra_mib']:.0f}",
        "yes" if all(row["same_bits"] for row in ours) else "no",
    ]


def methods_table(case: Record) -> str:
    """Return ours and all peers in one case: speed, memory and accuracy."""
    headings = ["method", "forward, ms", "of the logits", "loss + gradients, ms", "of the logits"]
    headings += ["extra MiB", "loss error", "dE error", "dC error", "same bits"]
    rows = {row["run"]: row for row in case["rows"]}
    logits = statistics.median(r["base_ms"] for r in case["rows"] if r["base"] == VENDOR)
    # What a method's rows are called: its forward, and its loss and gradients.
    methods: dict[str, tuple[str, str]] = {"ours": (FORWARD, GRADIENTS)}
    methods |= {"ours, no filter": ("", UNFILTERED)}
    for run in [*rows, *case["absent"]]:
        name, _, stage = run.rpartition(", ")
        if not run.startswith(OURS) and stage in ("forward", "loss + gradients"):
            methods[name] = (f"{name}, forward", f"{name}, loss + gradients")
    found = []
    for name, (forward, both) in methods.items():
        one, other = rows.get(forward), rows.get(both)
        if one or other:
            found.append([name, *_method_cells(one, other, logits)])
    return table(headings, found)


def _method_cells(one: Record | None, other: Record | None, logits: float) -> list[str]:
    judged = other or one or {}
    return [
        f"{one['ms']:.2f}" if one else "",
        _ratio(one),
        f"{other['ms']:.2f}" if other else "",
        # Without a filter ours is timed against four products.
        (_ratio(other) if other["base"] == VENDOR else f"{other['ms'] / logits:.3f}")
        if other
        else "",
        f"{judged['extra_mib']:.0f}",
        _error(judged["loss_error"]),
        _error(judged["de_error"]),
        _error(judged["dc_error"]),
        "yes" if judged["same_bits"] else "no",
    ]


def absent_lines(case: Record) -> Iterator[str]:
    """Yield what was not measured in a case, and why."""
    for run, reason in case["absent"].items():
        yield f"{run}: {reason}"


def variants_table(record: Record) -> str:
    """Return options and ignored tokens: time as a part of our own without them."""
    cases = [case for case in record["cases"] if any(map(_is_variant, case["rows"]))]
    runs = dict.fromkeys(row["run"] for case in cases for row in case["rows"] if _is_variant(row))
    found = []
    for run in runs:
        rows = [next((r for r in case["rows"] if r["run"] == run), None) for case in cases]
        found.append([run.removeprefix(OURS), *map(_ratio, rows)])
    return table(["run", *(case["case"] for case in cases)], found)


def seeds_table(record: Record) -> str:
    """Return the error of one seed of the unbiased filter beside that of their mean."""
    headings = ["case", "dtype, eps", "gradient", "no filter", "one seed", "mean of the seeds"]
    headings += ["one seed from no filter", "mean from no filter", "ratio"]
    found = []
    for case in record["cases"]:
        for figures in case["seeds"]:
            eps = figures["filter_eps"]
            name = f"{figures['dtype']}, {eps if isinstance(eps, str) else f'{eps:.2e}'}"
            for key, gradient in (("de", "dE"), ("dc", "dC")):
                of = figures[key]
                keys = ("unfiltered", "one", "mean", "one_from_unfiltered", "mean_from_unfiltered")
                cells = [_error(of[k]) for k in keys]
                found.append([case["case"], name, gradient, *cells, f"{of['ratio']:.3f}"])
    return table(headings, found)


def few_table(record: Record) -> str:
    """Return the forward of a few tokens against the vendor's product."""
    cases = {c["tokens"]: c for c in record["cases"] if c["sweep"] == "tokens"}
    rows = [_own(cases[n]).get(FORWARD) if n in cases else None for n in FEW]
    if not any(rows):
        return ""
    return table(["forward alone, N", *map(str, FEW)], [["ratio", *map(_ratio, rows)]])


def growth_table(record: Record, sweep: str) -> str:
    """Return times as N or V grows, with the exponent of each one's growth."""
    cases = sorted((c for c in record["cases"] if c["sweep"] == sweep), key=lambda c: c[sweep])
    runs = list(dict.fromkeys(row["run"] for case in cases for row in case["rows"]))
    if not runs:
        return ""
    found = []
    points: dict[str, list[tuple[int, float]]] = {run: [] for run in (VENDOR, *runs)}
    for case in cases:
        rows = _own(case)
        base = next((row["base_ms"] for row in rows.values() if row["base"] == VENDOR), math.nan)
        cells = [str(case[sweep]), _percent(case["filter"]["kept"]), _ms(base)]
        if sweep != "tokens" or case[sweep] >= GROWN_FROM:
            points[VENDOR].append((case[sweep], base))
        for run in runs:
            row = rows.get(run)
            cells.append(_ms(row["ms"]) + f" ({_ratio(row)})" if row else "")
            if row and (sweep != "tokens" or case[sweep] >= GROWN_FROM):
                points[run].append((case[sweep], row["ms"]))
        found.append(cells)
    grown = f"exponent{f', N >= {GROWN_FROM}' if sweep == 'tokens' else ''}"
    found.append([grown, "", *(_exponent(values) for values in points.values())])
    name = {"tokens": "N", "vocab": "V"}[sweep]
    labels = [f"{run.removeprefix(OURS)}, ms (ratio)" for run in runs]
    return table([name, "kept", f"{VENDOR}, ms", *labels], found)


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Return the slope of a line through points, both axes logarithmic."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def _exponent(points: list[tuple[int, float]]) -> str:
    good = [(x, y) for x, y in points if y > 0]
    return f"{exponent(good):.3f}" if len(good) > 1 else ""


def torch_overhead_table(record: Record) -> str:
    """Return the host's time of calls in PyTorch."""
    headings = ["call", "host us, median", "fastest", "back to back, us"]
    keys = ("host_us", "fastest_us", "back_to_back_us")
    rows = record["runs"].items()
    return table(headings, ([run, *(f"{found[k]:.0f}" for k in keys)] for run, found in rows))


def jax_overhead_table(record: Record) -> str:
    """Return what a call in a jitted function costs beyond its kernels."""
    headings = ["stage", "call, us", "its kernels", "what else is in the program", "overhead"]
    keys = ("call_us", "kernels_us", "beside_us", "overhead_us")
    rows = record["stages"].items()
    return table(headings, ([stage, *(f"{found[k]:.1f}" for k in keys)] for stage, found in rows))


def _own(case: Record) -> dict[str, Record]:
    return {row["run"]: row for row in case["rows"] if row["run"].startswith(OURS)}


def _is_variant(row: Record) -> bool:
    return row["base"] in (FORWARD_BITS, GRADIENTS)


def _ratio(row: Record | None) -> str:
    return f"{row['ratio']:.3f}" if row else ""


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
