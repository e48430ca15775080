"""Call every kernel over small shapes, for compute-sanitizer; needs CuPy only.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py

Dtypes may be named, and filters by number, so that slow tools can take them side by side; all of
them otherwise.
Every allocation is one of its own, and so is every piece of workspace: in a pool, what lies behind
an array is the pool's too, and an access there would not show. It fails when a kernel of the
library has not been launched, unless filters are named.
"""

import argparse
import itertools
import sys
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cce_cupy
from cce_cupy import compiler, launcher
from cce_cupy.frameworks import gpu
from cce_cupy.frameworks.cupy import CupyMemory
from cce_cupy.plan import Room

cupy.cuda.set_allocator(None)

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
FILTERS = [
    {"gradient_filter": None},
    {"gradient_filter": "unbiased", "filter_eps": 0.02},
    {"gradient_filter": "threshold", "filter_eps": 0.02, "filter_e_grad": False},
    {"gradient_filter": "unbiased", "filter_eps": 0.02, "filter_c_grad": False, "seed": 1},
]
OPTIONS = [
    {},
    {"softcap": 3.0, "reduction": "none", "workspace_bytes": 300_000},
    {"label_smoothing": 0.1, "z_loss": 0.01, "weights": True, "removed": True},
    {"softcap": 3.0, "label_smoothing": 0.1, "reduction": "sum", "shift": 1, "logit_scale": -0.5},
]
# Ragged, whole blocks, and the smallest: rows, classes, hidden size.
SHAPES = [(131, 261, 21), (128, 256, 32), (300, 410, 72), (1, 1, 1), (3, 40, 0), (0, 33, 4)]
HALF = ("float16", "bfloat16")
UNPACKED = (1000, 140, 152)
"""Whose rows of e do not fit into a small workspace once more: on Hopper they come as words."""

launched = set()
_kernel = launcher.kernel


def _recording(device, file, name, dtype):
    launched.add((file, name))
    return _kernel(device, file, name, dtype)


launcher.kernel = _recording


class SeparatePieces(gpu._Space):
    """Workspace whose pieces are allocations of exactly their sizes."""

    def __init__(self, memory, room, words=None):
        super().__init__(memory, Room(), words)
        self.pieces = {
            name: memory.full((max(size, 1),), "int8", None) for name, size in room.items()
        }
        self.addresses = {name: memory.address(x) for name, x in self.pieces.items()}


gpu._Space = SeparatePieces


def _poisoned(self, shape, dtype, value):
    """Gradients begin as NaN: initcheck does not see what bulk copies from shared memory write."""
    array = _full(self, shape, dtype, value)
    if value is None and array.dtype.kind not in "iu":
        array.data.memset_async(0xFF, array.nbytes)
    return array


_full = CupyMemory.full
CupyMemory.full = _poisoned
# Recorded launches take the pieces at their places in one allocation.
gpu.GpuCall._replay = gpu.GpuCall._launch


def rows(values, pad):
    """Rows `pad` elements further apart, in the middle of an allocation that ends with the last."""
    n, d = values.shape
    size = max((n - 1) * (d + pad) + d, 0) + pad
    buffer = cupy.zeros(size, values.dtype)
    if not values.size:
        return cupy.zeros(values.shape, values.dtype)
    step = values.dtype.itemsize
    view = cupy.ndarray(
        values.shape,
        values.dtype,
        memptr=buffer.data + pad * step,
        strides=((d + pad) * step, step),
    )
    view[...] = cupy.asarray(values)
    return view


def call(dtype, shape, options, filtering, pad, wrong=False):
    """Loss and gradients, a pullback with dlse, and the statistics of one problem."""
    n, v, d = shape
    rng = np.random.default_rng([n, v, d])
    kind, options = DTYPES[dtype], dict(options)
    weights, removed = options.pop("weights", False), options.pop("removed", False)
    all_count = options.pop("all_count", False)
    if n <= options.get("shift", 0):
        options["shift"] = 0
    targets = rng.integers(0, v, n)
    if removed and v > 1:
        targets[targets % 3 == 0] = 1
    if not all_count:
        targets[rng.random(n) < 0.2] = -100
    if wrong:
        targets[n // 2], targets[n - 1] = v, -1
    has_bias = options.pop("bias", True)
    bias = rng.standard_normal(v)
    if removed and v > 1:
        bias[::3] = -np.inf
    arrays = {
        "e": rows(rng.standard_normal((n, d)).astype(kind), pad),
        "c": rows(rng.standard_normal((v, d)).astype(kind), pad),
        "targets": cupy.asarray(targets.astype(np.int16 if pad else np.int64)),
    }
    if has_bias:
        arrays["bias"] = cupy.asarray(bias.astype(kind))
    given = dict(arrays)
    if weights:
        given["class_weight"] = cupy.asarray(rng.random(v))
        given["token_weight"] = cupy.asarray(rng.random(n).astype(np.float32))
    found = cce_cupy.linear_cross_entropy_value_and_grad(**given, **options, **filtering)
    (loss, lse), pullback = cce_cupy.linear_cross_entropy_vjp(
        **given, **options, **filtering, return_lse=True
    )
    dlse = cupy.asarray(rng.standard_normal(n).astype(np.float32))
    pulled = pullback(cupy.ones(loss.shape, np.float32), dlse)
    plain = {k: options[k] for k in ("softcap", "shift", "logit_scale") if k in options}
    statistics = cce_cupy.token_statistics(**arrays, **plain)
    gradients = [x for x in (*found[1], *pulled) if x is not None]
    for array in (found[0], loss, lse, *gradients, *statistics):
        finite = np.isfinite(array.get().astype(np.float64)).all()
        assert finite or wrong, (dtype, shape, options, filtering)


def main(dtypes, filters):
    calls = 0
    for dtype, number in itertools.product(dtypes, filters or range(len(FILTERS))):
        filtering = FILTERS[number]
        for k, options in enumerate(OPTIONS):
            call(dtype, SHAPES[0], options, filtering, pad=k % 3)
            calls += 1
        for k, shape in enumerate(SHAPES[1:]):
            call(dtype, shape, OPTIONS[(number + k) % 4], filtering, pad=0)
            call(dtype, shape, {"bias": False}, filtering, pad=0)
            call(dtype, shape, {"bias": False, "all_count": True}, filtering, pad=0)
            calls += 3
        call(dtype, SHAPES[0], OPTIONS[number], filtering, pad=1, wrong=True)
        calls += 1
        if dtype in HALF:
            call(dtype, UNPACKED, {"bias": False, "workspace_bytes": 300_000}, filtering, pad=0)
            calls += 1
    cupy.cuda.Device().synchronize()
    digits = cupy.cuda.Device().compute_capability
    capability = int(digits[:-1]), int(digits[-1])
    every = {
        (file, name)
        for file, names in compiler.KERNELS.items()
        for name in names
        if any(compiler.serves(file, dtype, capability) for dtype in dtypes)
    }
    if "float16" not in dtypes:  # of the dtypes on Hopper, the one that can overflow
        every -= {("sm90/factors.cu", "largest_factor")}
    missing = sorted(every - launched)
    assert filters or not missing, f"kernels that were not launched: {missing}"
    print(f"{calls} problems, {len(every & launched)} kernels, {', '.join(dtypes)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Call every kernel over small shapes.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--filters", nargs="+", type=int, choices=range(len(FILTERS)))
    asked = parser.parse_args()
    main(asked.dtypes, asked.filters)
