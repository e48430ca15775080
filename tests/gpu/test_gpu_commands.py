"""The command that times on a GPU."""

import math

from cce_cupy.__main__ import main
from cce_cupy.commands import bench


def test_bench(monkeypatch, capsys):
    """Small and short; what it prints are times, and memory that a call must take."""
    monkeypatch.setitem(bench.CASES, "wide", (2048, 512, 20_000))
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["bench", "--case", "wide"]) == 0
    printed = capsys.readouterr().out
    assert "wide: N 2,048, D 512, V 20,000" in printed
    rows = [line.split("\u2502")[1:-1] for line in printed.splitlines() if "\u2502" in line]
    assert [name.strip() for name, *_ in rows] == [
        "forward + kept bits",
        "forward alone",
        "loss + gradients",
        "loss + gradients, no filter",
    ]
    for _, *figures in rows:
        ms, ratio, sustained, sustained_ratio, tflops, extra = map(float, figures)
        assert min(ms, ratio, sustained, sustained_ratio) > 0
        assert math.isfinite(tflops)
        # The workspace, at most; some of it in every call.
        assert 0 < extra < 140
    assert "% of the columns" in printed


def test_bench_of_fewer_tokens(monkeypatch, capsys):
    monkeypatch.setitem(bench.CASES, "smollm2", (8192, 64, 5000))
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    assert main(["bench", "--case", "smollm2", "--tokens", "256"]) == 0
    assert "smollm2: N 256, D 64" in capsys.readouterr().out
