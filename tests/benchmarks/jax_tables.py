"""The comparison of jax_training.py: by seeds, as a table and as a picture. Needs no JAX."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("cce_cupy", "cce_cupy, no filter")
LOSSES = ("optax", *OURS)
COLORS = ("#f2b179", "#1f4e79", "#7fa8cf")


def whole_seeds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of those seeds that all losses have been through."""
    by_seed = collections.Counter(run["seed"] for run in runs)
    return [run for run in runs if by_seed[run["seed"]] == len(LOSSES)]


def compare(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Compare the mean held-out curves of ours with optax's, by what the seeds differ by.

    The spread is the standard deviation over seeds of one seed's held-out loss with optax's; a
    difference of two means of n independent seeds has sqrt(2 / n) of it.
    """
    runs = whole_seeds(runs)
    if not runs:
        return None
    curves = {
        name: np.array([list(run["held_out"].values()) for run in runs if run["loss"] == name])
        for name in LOSSES
    }
    found: dict[str, Any] = {"at_step": [int(step) for step in runs[0]["held_out"]]}
    spread = None
    if len(curves["optax"]) > 1:
        spread = curves["optax"].std(axis=0, ddof=1)
        found["seed_spread"] = spread.tolist()
    for name in OURS:
        difference = curves[name].mean(0) - curves["optax"].mean(0)
        found[name] = {
            "difference_of_means": difference.tolist(),
            "largest_difference_of_one_seed": float(np.abs(curves[name] - curves["optax"]).max()),
        }
        if spread is not None:
            found[name]["in_spreads"] = (difference / spread).tolist()
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the curves, each seed's pale, and the differences below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    runs = whole_seeds(record["runs"])
    for name, color in zip(LOSSES, COLORS, strict=True):
        curves = np.array([run["trained"] for run in runs if run["loss"] == name])
        for curve in curves:
            above.plot(curve, color=color, alpha=0.2, linewidth=0.5)
        above.plot(curves.mean(0), color=color, label=name, linewidth=1)
    above.set_ylabel("training loss, nats a token")
    above.legend()
    comparison = record["comparison"]
    steps = comparison["at_step"]
    for name, color in zip(OURS, COLORS[1:], strict=True):
        difference = comparison[name]["difference_of_means"]
        below.plot(steps, difference, "o-", color=color, label=f"{name} - optax")
    if "seed_spread" in comparison:
        spread = np.array(comparison["seed_spread"])
        below.fill_between(steps, -spread, spread, color="#dddddd", label="spread of the seeds")
    below.set_ylabel("held-out loss")
    below.set_xlabel("step")
    below.legend()
    sizes = record["sizes"]
    figure.suptitle(
        f"{record['device']}, JAX {record['jax']}: V {sizes['vocab']}, D {sizes['dim']}, "
        f"{sizes['batch'] * sizes['length']} tokens a step, {len(runs) // len(LOSSES)} seeds",
        fontsize="medium",
    )
    figure.savefig(path)


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table: held-out losses, means over seeds, and what the seeds differ by."""
    comparison, runs = record["comparison"], whole_seeds(record["runs"])
    if comparison is None:
        return ""
    steps = comparison["at_step"]
    shown = [steps.index(step) for step in (steps[0], *steps[4::5])]
    lines = [
        "| held-out loss | " + " | ".join(f"step {steps[k]}" for k in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for name in LOSSES:
        curves = np.array([list(r["held_out"].values()) for r in runs if r["loss"] == name])
        cells = " | ".join(f"{value:.4f}" for value in curves.mean(0)[shown])
        lines.append(f"| {name} | {cells} |")
    if "seed_spread" in comparison:
        cells = " | ".join(f"{comparison['seed_spread'][k]:.4f}" for k in shown)
        lines.append(f"| standard deviation over optax's seeds | {cells} |")
    return "\n".join(lines)
