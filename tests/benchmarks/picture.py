"""Draw what gpu.py recorded: python tests/benchmarks/picture.py RESULTS.json PICTURE.svg."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the ratios to the vendor's GEMM: bars by case, and curves where N is swept."""
    # With an extra, and not for those who only want figures.
    from matplotlib.figure import Figure

    by_name: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"]:
        by_name.setdefault(case["case"], []).append(case)
    sweeps = {name: cases for name, cases in by_name.items() if len(cases) > 1}
    single = {name: cases[0] for name, cases in by_name.items() if len(cases) == 1}

    panels = bool(single) + len(sweeps)
    figure = Figure(figsize=(9, 3.6 * panels), layout="constrained")
    axes = list(figure.subplots(panels, squeeze=False)[:, 0])
    if single:
        _draw_bars(axes.pop(0), single)
    for axis, (name, cases) in zip(axes, sweeps.items(), strict=True):
        _draw_sweep(axis, name, cases)
    figure.suptitle(
        f"{record['device']}, {record['date']}: time / the vendor's logits GEMM, alternating pairs",
        fontsize="medium",
    )
    figure.savefig(path)


def _ratios(case: dict[str, Any]) -> dict[str, float]:
    return {row["run"]: row["ratio"] for row in case["rows"] if row["base"] == "vendor GEMM"}


def _runs(cases: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run for case in cases for run in _ratios(case)))


def _draw_bars(axis: Any, cases: dict[str, dict[str, Any]]) -> None:
    runs = _runs(list(cases.values()))
    height = 0.8 / len(runs)
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
        [
            f"{name}\nN {case['tokens']}, D {case['dim']}, V {case['vocab']}\n"
            f"{100 * case['profile']['default']:.1f} % kept"
            for name, case in cases.items()
        ],
        fontsize="small",
    )
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_sweep(axis: Any, name: str, cases: list[dict[str, Any]]) -> None:
    for run in _runs(cases):
        drawn = [(case["tokens"], _ratios(case)[run]) for case in cases if run in _ratios(case)]
        axis.plot(*zip(*drawn, strict=True), marker=".", label=run)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("N")
    axis.set_title(f"{name}: D {cases[0]['dim']}, V {cases[0]['vocab']}", fontsize="small")
    axis.legend(fontsize="x-small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.picture)
