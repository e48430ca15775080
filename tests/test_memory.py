"""Memory: what a call allocates beyond its outputs stays within what its plan says.

NumPy reports its allocations to tracemalloc.
"""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import cce_cupy
from cce_cupy.plan import make_plan
from cce_cupy.problem import ArraySpec, Options, Problem

TOKENS, DIM, VOCAB = 640, 48, 40_000


@pytest.mark.parametrize("gradient_filter", [None, "unbiased"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_peak_is_within_the_plan(dtype, gradient_filter):
    cast = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    e = rng.normal(size=(TOKENS, DIM)).astype(cast)
    c = rng.normal(size=(VOCAB, DIM)).astype(cast)
    targets = rng.integers(0, VOCAB, TOKENS)
    options = {"gradient_filter": gradient_filter, "filter_eps": 1e-4}
    least = least_workspace(e, c, targets, options)
    arrays = (e, c, targets)
    cce_cupy.linear_cross_entropy_value_and_grad(*arrays, **options, workspace_bytes=least)

    tracemalloc.start()
    _, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        *arrays, **options, workspace_bytes=least
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    outputs = gradients.e.nbytes + gradients.c.nbytes
    bits = TOKENS * VOCAB // (128 * 8)
    # Some float64 numbers a token, and the interpreter's own objects.
    few = 200 * TOKENS + 2**18
    extra = peak - outputs
    assert extra <= least + bits + few
    # A plan that promises far too much would pass the line above.
    assert extra >= least / 4
    logits = TOKENS * VOCAB * (8 if dtype == "float64" else 4)
    assert extra < logits / 8


def least_workspace(e, c, targets, options) -> int:
    names = {"e": e, "c": c, "targets": targets}
    specs = {name: ArraySpec(array.shape, array.dtype.name) for name, array in names.items()}
    with pytest.raises(ValueError, match="workspace_bytes") as caught:
        make_plan(Problem.check(specs, Options(**options, workspace_bytes=1)))
    return int(str(caught.value).split("at least ")[1].split()[0])
