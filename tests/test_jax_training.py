"""The training comparison in JAX, at a size of nothing: it runs, and the exact curves agree."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
FOLDER = Path(__file__).parent / "benchmarks"


def test_comparison(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    import jax_tables
    import jax_training

    results, picture = tmp_path / "training.json", tmp_path / "training.svg"
    sizes = {"vocab": 16384, "dim": 16, "layers": 1, "heads": 2, "batch": 2, "length": 16}
    given = [f"--{name}={size}" for name, size in (sizes | {"steps": 5, "seeds": 2}).items()]
    jax_training.main([f"--results={results}", f"--picture={picture}", *given])
    record = json.loads(results.read_text())
    curves = {name: [] for name in jax_tables.LOSSES}
    for run in record["runs"]:
        assert len(run["trained"]) == 5
        curves[run["loss"]].append(run["trained"])
    optax, exact = (np.array(curves[name]) for name in ("optax", "cce_cupy, no filter"))
    # Parameters and gradients are rounded to bfloat16, losses of about ln V are not.
    np.testing.assert_allclose(exact, optax, rtol=2.0**-8)
    np.testing.assert_allclose(np.array(curves["cce_cupy"])[:, 0], optax[:, 0], rtol=1e-5)
    assert not np.array_equal(optax[0], optax[1])
    comparison = record["comparison"]
    found = comparison["cce_cupy, no filter"]
    assert np.abs(found["difference_of_means"]).max() <= found["largest_difference_of_one_seed"]
    assert picture.stat().st_size > 1000
