"""Draw what gpu.py recorded: python tests/benchmarks/picture.py RESULTS.json PICTURE.svg."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from records import read_record
from runs import FORWARD_BITS, FOUR_PRODUCTS, GRADIENTS, UNFILTERED, VENDOR

Record = dict[str, Any]

OURS, OTHERS = "#1f4e79", "#f2b179"


def draw_forward(record: Record, path: Path) -> None:
    """Draw the forwards' ratios to the vendor's GEMM, by case."""
    _draw_ratios(record, path, lambda run: "forward" in run)


def draw_gradients(record: Record, path: Path) -> None:
    """Draw the ratios of loss and gradients to the vendor's logits GEMM, by case."""
    _draw_ratios(record, path, lambda run: "gradients" in run)


def draw_accuracy(record: Record, path: Path) -> None:
    """Draw errors of the gradients over times: a panel for each case that others are in, if any."""
    cases = [case for case in record["cases"] if any(map(_judged, case["rows"]))]
    cases = [case for case in cases if any(map(_is_of_others, case["rows"]))] or cases
    figure = _figure(figsize=(9, 3.4 * len(cases)))
    for axis, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        for row in filter(_judged, case["rows"]):
            color = OTHERS if _is_of_others(row) else OURS
            for name, marker in (("de_error", "o"), ("dc_error", "s")):
                axis.plot(row["ms"], row[name], marker, color=color)
            method = row["run"].replace(", loss + gradients", "")
            label = f"{method}, {row['extra_mib']:.0f} MiB"
            at = row["ms"], max(row["de_error"], row["dc_error"])
            # At a slope, so that neighbours' labels pass each other.
            axis.annotate(
                label, at, (2, 5), textcoords="offset points", fontsize="x-small", rotation=40
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.margins(x=0.3, y=0.5)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("loss + gradients, ms", fontsize="small")
        axis.set_ylabel("relative error: o dE, square dC", fontsize="small")
        axis.set_title(_sizes(case), fontsize="small")
    _save(figure, record, path, "error and time, with the memory beyond the gradients")


def draw_growth(record: Record, path: Path) -> None:
    """Draw times over N and over V, as they were swept."""
    sweeps = {
        sweep: sorted((c for c in record["cases"] if c["sweep"] == sweep), key=lambda c: c[sweep])
        for sweep in dict.fromkeys(case["sweep"] for case in record["cases"])
    }
    figure = _figure(figsize=(9, 4.2))
    axes = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for axis, (sweep, cases) in zip(axes, sweeps.items(), strict=True):
        runs = list(dict.fromkeys(row["run"] for case in cases for row in case["rows"]))
        for run in runs:
            axis.plot(*_curve(cases, sweep, run, "ms"), marker=".", label=run)
        bases = _curve(cases, sweep, FORWARD_BITS, "base_ms")
        axis.plot(*bases, color="black", linewidth=0.8, label=VENDOR)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel({"tokens": "N", "vocab": "V"}[sweep])
        axis.set_ylabel("ms")
        first = cases[0]
        fixed = f"V {first['vocab']}" if sweep == "tokens" else f"N {first['tokens']}"
        axis.set_title(f"D {first['dim']}, {fixed}", fontsize="small")
        axis.legend(fontsize="x-small")
    _save(figure, record, path, "times as N and V grow")


PICTURES: dict[str, Callable[[Record, Path], None]] = {
    "forward": draw_forward,
    "gradients": draw_gradients,
    "accuracy": draw_accuracy,
    "growth": draw_growth,
}


def _draw_ratios(record: Record, path: Path, chosen: Callable[[str], bool]) -> None:
    cases = {case["case"]: case for case in record["cases"]}
    runs = dict.fromkeys(run for case in cases.values() for run in _ratios(case) if chosen(run))
    height = 0.8 / len(runs)
    figure = _figure(figsize=(9, 0.5 + len(cases) * (0.3 + 0.17 * len(runs))))
    axis = figure.subplots()
    for number, run in enumerate(runs):
        drawn = [
            (place + number * height, found[run])
            for place, case in enumerate(cases.values())
            if run in (found := _ratios(case))
        ]
        bars = axis.barh(*zip(*drawn, strict=True), height=0.9 * height, label=run)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize="x-small")
    axis.axvline(1, color="black", linewidth=0.8)
    middle = 0.4 - height / 2
    axis.set_yticks(
        [place + middle for place in range(len(cases))],
        [f"{_sizes(case)}\n{100 * _kept(case):.1f} % kept" for case in cases.values()],
        fontsize="small",
    )
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, record, path, "time / the vendor's logits GEMM, alternating pairs")


def _ratios(case: Record) -> dict[str, float]:
    """Return ratios to the logits GEMM; of runs without a filter, of the medians' quotient."""
    found = {row["run"]: row["ratio"] for row in case["rows"] if row["base"] == VENDOR}
    bases = [row["base_ms"] for row in case["rows"] if row["run"] == GRADIENTS]
    for row in case["rows"]:
        if row["run"] == UNFILTERED and row["base"] == FOUR_PRODUCTS and bases:
            found[UNFILTERED] = row["ms"] / bases[0]
    return found


def _kept(case: Record) -> float:
    return case["filter"]["kept"] if "filter" in case else case["profile"]["default"]


def _sizes(case: Record) -> str:
    return f"{case['case']}\nN {case['tokens']}, D {case['dim']}, V {case['vocab']}"


def _is_of_others(row: Record) -> bool:
    return not row["run"].startswith("ours")


def _judged(row: Record) -> bool:
    # Other workspaces than the default one change no digit worth showing.
    other = row["run"].startswith(GRADIENTS) and row["run"] not in (GRADIENTS, UNFILTERED)
    return row.get("de_error") is not None and not other


def _curve(
    cases: Iterable[Record], sweep: str, run: str, field: str
) -> tuple[list[int], list[float]]:
    found = [(c[sweep], row[field]) for c in cases for row in c["rows"] if row["run"] == run]
    return [size for size, _ in found], [value for _, value in found]


def _figure(figsize: tuple[float, float]) -> Any:
    # With an extra, and not for those who only want figures.
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def _save(figure: Any, record: Record, path: Path, title: str) -> None:
    figure.suptitle(f"{record['device']}, {record['date']}: {title}", fontsize="medium")
    from matplotlib import rc_context

    # The same record gives the same file.
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--of", choices=PICTURES, default="forward")
    options = parser.parse_args()
    PICTURES[options.of](read_record(options.results), options.picture)
