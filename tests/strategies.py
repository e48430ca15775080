"""Hypothesis strategies: whole calls, on and off every boundary that an implementation could have.

Hypothesis draws sizes, kinds and options (small first, so that failures shrink to small problems);
the numbers themselves come from a generator whose seed is drawn.
"""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from oracle import Oracle
from tolerances import DTYPES, Tolerances

# Around the row tile of 128 tokens, the filter's chunks of 32 columns, likely vocabulary blocks.
# What leaves nothing to compute is listed once, the rest twice, as hypothesis draws uniformly.
TOKENS = [1, 2, 31, 127, 128, 129, 255, 256, 257, 300] * 2 + [0]
VOCABS = [1, 2, 31, 32, 33, 127, 128, 129, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 5000] * 2 + [0]
DIMS = [1, 2, 7, 8, 16, 31, 33, 64] * 2 + [0]
MAX_LOGITS = 300_000

INTEGERS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]
LAYOUTS = ["contiguous", "strided", "fortran", "reversed", "read-only"]
IGNORED = ["none", "some", "tiles"] * 2 + ["all but one", "all"]
LOGITS = ["normal", "zero", "small", "wide", "peaked"]
NO_FILTER = [{"gradient_filter": None}, {"filter_eps": None}, {"filter_eps": 0}]


@dataclass
class Case:
    """One call: its arrays, the options that the oracle knows, and the dtype's name."""

    dtype: str
    e: np.ndarray
    c: np.ndarray
    targets: np.ndarray
    options: dict = field(default_factory=dict)
    seed: int = 0

    @property
    def arrays(self):
        return self.e, self.c, self.targets

    def oracle(self, **changes):
        return Oracle(*self.arrays, **(self.options | changes))

    def tolerances(self, oracle):
        return Tolerances(oracle, self.dtype)

    def rng(self):
        """For upstream gradients and directions: independent of the arrays' own numbers."""
        return np.random.default_rng([self.seed, 1])


def laid_out(array, layout):
    """The same values in memory that looks different."""
    array = np.asarray(array)
    if layout == "fortran":
        return np.array(array, order="F")
    if layout == "reversed":
        backwards = (..., *(slice(None, None, -1) for _ in array.shape))
        return array[backwards].copy()[backwards]
    if layout == "strided":
        larger = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
        every_other = larger[(..., *(slice(None, None, 2) for _ in array.shape))]
        every_other[...] = array
        return every_other
    array = np.array(array)
    array.flags.writeable = layout != "read-only"
    return array


@st.composite
def batch_shapes(draw, tokens):
    """Shapes of rank 0 to 3 with that many tokens."""
    ranks = [1, 2, 3] + ([0] if tokens == 1 else [])
    rank = draw(st.sampled_from(ranks))
    if rank == 0:
        return ()
    shape, left = [], tokens
    for _ in range(rank - 1):
        divisors = [n for n in range(1, left + 1) if left % n == 0] or [1, 2]
        size = draw(st.sampled_from(divisors))
        shape.append(size)
        left //= size
    return tuple(draw(st.permutations([*shape, left])))


def embeddings(kind, rng, tokens, classifier, targets):
    """Rows whose logits are all zero, small, of order one, of order fifty, or led by the target."""
    vocab, dim = classifier.shape
    if kind == "peaked" and vocab and dim:
        aligned = classifier[np.clip(targets, 0, vocab - 1)]
        length = np.maximum((aligned**2).sum(axis=1, keepdims=True), 0.1)
        return 12 * aligned / length + 0.1 * rng.standard_normal((tokens, dim))
    spread = {"zero": 0.0, "small": 0.1, "wide": 25.0}.get(kind, 1.0)
    return spread * rng.standard_normal((tokens, dim))


def weights(rng, kind, shape):
    """Non-negative weights, zeros among them, of a floating, integer or bool dtype."""
    if kind == "bool":
        return rng.random(shape) < 0.7
    if kind == "int64":
        return rng.integers(0, 4, shape)
    return np.maximum(rng.random(shape) * 2 - 0.2, 0).astype(DTYPES[kind])


WEIGHTS = [None, "float32", "float64", "bool", "int64", "float16", "bfloat16"]


@st.composite
def cases(draw, dtypes=tuple(DTYPES), tokens=tuple(TOKENS), vocabs=tuple(VOCABS), bias=None):
    """A `Case`. `bias=True` makes sure that there is one."""
    dtype = draw(st.sampled_from(dtypes))
    n = draw(st.sampled_from(tokens))
    v = draw(st.sampled_from([v for v in vocabs if n * v <= MAX_LOGITS]))
    d = draw(st.sampled_from(DIMS))
    shape = draw(batch_shapes(n))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    # A removed entry is never a target here (test_peer_defects.py has those), so targets are drawn
    # from what is present and fits the integer dtype.
    bias_kind = draw(st.sampled_from(["finite", "some removed"] + ([] if bias else [None])))
    present = np.ones(v, bool)
    if bias_kind == "some removed" and v > 1:
        present = rng.random(v) < 0.6
        present[rng.integers(v)] = True
    integer = np.dtype(draw(st.sampled_from(INTEGERS)))
    allowed = np.flatnonzero(present)
    if (allowed <= np.iinfo(integer).max).any():
        allowed = allowed[allowed <= np.iinfo(integer).max]
    else:
        integer = np.dtype(np.int64)

    ignored_kind = draw(st.sampled_from(IGNORED)) if v else "all"
    ignore_index = draw(st.sampled_from([-100, -1, 0, 2**31]))
    if not np.iinfo(integer).min <= ignore_index <= np.iinfo(integer).max:
        ignore_index = 0
    flat = rng.choice(allowed, n) if v else np.zeros(n, int)
    ignored = np.zeros(n, bool)
    if ignored_kind == "some":
        ignored = rng.random(n) < 0.4
    elif ignored_kind in ("all", "all but one"):
        ignored[:] = True
        if ignored_kind == "all but one" and n:
            ignored[rng.integers(n)] = False
    elif ignored_kind == "tiles":
        ignored = rng.random(n // 128 + 1).repeat(128)[:n] < 0.5
    flat = np.where(ignored, ignore_index, flat)

    classifier = rng.standard_normal((v, d)) / np.sqrt(max(d, 1))
    logits_kind = draw(st.sampled_from(LOGITS))
    rows = embeddings(logits_kind, rng, n, classifier, flat)

    def layout(array):
        return laid_out(array, draw(st.sampled_from(LAYOUTS)))

    options = {"ignore_index": ignore_index}
    if bias_kind:
        values = np.where(present, rng.standard_normal(v), -np.inf)
        options["bias"] = layout(values.astype(DTYPES[dtype]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if shape and shape[-1] > 1:
        options["shift"] = draw(st.sampled_from([0, 0, 0, 0, 1, 1, shape[-1] // 2, shape[-1] - 1]))
    options["softcap"] = draw(st.sampled_from([None, None, 30.0, 5.0, 0.5]))
    options["logit_scale"] = draw(st.sampled_from([1.0, 1.0, 0.3, -1.5, 0.0]))
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    # float16 ends at 65504, which a sum over hundreds of tokens times 2 z_loss lse can pass.
    options["z_loss"] = draw(st.sampled_from([0.0, 1e-4, 1e-3 if dtype == "float16" else 0.1]))
    for name, size in (("class_weight", (v,)), ("token_weight", shape)):
        kind = draw(st.sampled_from(WEIGHTS))
        if kind is not None:
            options[name] = layout(weights(rng, kind, size))
    return Case(
        dtype,
        layout(rows.reshape(*shape, d).astype(DTYPES[dtype])),
        layout(classifier.astype(DTYPES[dtype])),
        layout(flat.reshape(shape).astype(integer)),
        options,
        seed,
    )


def upstream(rng, shape, dtype):
    return rng.standard_normal(shape).astype(DTYPES[dtype])
