"""The examples of the documentation that need a GPU run as they stand there."""

import pytest
from devices import Cupy, Jax, Torch
from test_examples import GPU_EXAMPLES, check_printed, run

NEEDS = {"cupy": Cupy, "torch": Torch, "jax": Jax}


@pytest.mark.parametrize("example", GPU_EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    source = example.read_text("utf-8")
    named = [name for name in NEEDS if f"import {name}" in source]
    assert named
    for name in named:
        _ = NEEDS[name]().module  # skips where it is missing or sees no GPU
    check_printed(example, run(source, tmp_path, platform="cuda,cpu"))
