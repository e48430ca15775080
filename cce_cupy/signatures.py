"""The kernels' parameters, in the C compiler's layout: one format of `struct` for each parameter.

`tests/kernel_resources.py` compares them with what the compiler made of the sources.
"""

from __future__ import annotations

import functools

from .driver import Layout

POINTER, INT64, UINT64, INT32, FLOAT64 = "P", "q", "Q", "i", "d"
TENSOR_MAP = "128s"

# Structs that kernels take by value; 0P pads to the alignment of the whole.
MATRIX = "Pqi0P"
LOGIT_OPTIONS = "dd"
FILTER = "ddi0P"
ROW_MAP = "5P"
TARGETS = "Pii"
SEGMENT_SUMS = "8P"
SEGMENTS = SEGMENT_SUMS + "qq"
LOSS_OPTIONS = "dd"
WEIGHTS = "3P"
ROW_OUTPUTS = "7P"
LOSS_SUM = "PPi0PPP"
LISTS = "PPi0P"
ROW_FACTORS = "3P"
RECORDS = "2P"
UNIT_SUMS = "6P"
HOPPER_FORWARD = MATRIX + ROW_MAP + "PPPqq" + LOGIT_OPTIONS + FILTER + "ii4P" + UNIT_SUMS + "qPq"
"""e, map; packed rows, bias, smoothing, dim, vocab; how it is cut, what is known of rows; sums;
capacity, bits, words."""

KEPT_COLUMNS = "PqPq"
COLUMN_ORDER = KEPT_COLUMNS + "8Piiii0P"
ORDER_SCRATCH = "9P"
PAIRS = "5Pi0P3P"  # their lists and records, what is carried, and what has passed
HOPPER_BACKWARD = (
    MATRIX + MATRIX + ROW_MAP + "PPq" + LOGIT_OPTIONS + FILTER + "qqPq" + COLUMN_ORDER + "P"
    + ROW_FACTORS + "PP" + PAIRS + "12P" + "q"
)  # fmt: skip
"""e, c, map; bias, smoothing, dim; row tiles, whose work it is, order; row_lse, factors; pairs;
what is summed."""

DENSE_DLOGITS = MATRIX + ROW_MAP + "4q" + LOGIT_OPTIONS + "iiP" + ROW_FACTORS + "PPPq"
"""e, map; tokens, dim, columns; options, order of work; row_lse, factors, rests, largest; dz."""

DENSE_GRADIENTS = "P2q2i3qd" + MATRIX + "PP" + "PPq3P"
"""count; tokens, dim; parts of it; columns; scale; c, targets, rests; largest; unfinished sums;
what is summed."""

_FORWARD = (
    MATRIX, MATRIX, POINTER, POINTER, INT64, INT64, INT64, INT64, LOGIT_OPTIONS, FILTER, ROW_MAP,
    POINTER, POINTER, SEGMENT_SUMS, POINTER, INT64,
)  # fmt: skip
_HOPPER_FORWARD = (TENSOR_MAP, TENSOR_MAP, TENSOR_MAP, HOPPER_FORWARD)

PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "portable/tokens.cu": {
        "map_rows": (
            TARGETS, INT64, INT64, INT64, INT64, INT32, INT64, INT32, UINT64, *[POINTER] * 8
        ),
        "smoothing_weights": (POINTER, POINTER, INT64, FLOAT64, POINTER, POINTER),
        "finish_rows": (ROW_MAP, SEGMENTS, LOSS_OPTIONS, WEIGHTS, ROW_OUTPUTS, LOSS_SUM),
        "row_factors": (
            ROW_MAP, LOSS_OPTIONS, WEIGHTS, POINTER, POINTER, POINTER, POINTER, INT32,
            *[POINTER] * 5, INT64,
        ),
    },
    "portable/forward.cu": {
        "first_bound": (
            MATRIX, MATRIX, POINTER, INT64, LOGIT_OPTIONS, ROW_MAP, POINTER, POINTER
        ),
        "forward": _FORWARD,
        "forward_statistics": _FORWARD,
    },
    "portable/backward.cu": {
        "list_columns": (ROW_MAP, POINTER, INT64, POINTER, INT64, INT64, INT64, LISTS),
        "dlogits": (
            MATRIX, MATRIX, POINTER, INT64, INT64, INT64, LOGIT_OPTIONS, FILTER, ROW_MAP, LISTS,
            POINTER, ROW_FACTORS, POINTER, RECORDS, POINTER,
        ),
        "dembedding": (
            MATRIX, POINTER, INT64, INT64, INT64, FLOAT64, ROW_MAP, LISTS, RECORDS, POINTER,
            POINTER, INT32, POINTER, INT32, INT32, POINTER,
        ),
        "dclassifier": (
            MATRIX, INT64, INT64, INT64, FLOAT64, ROW_MAP, LISTS, RECORDS, INT64, INT64, POINTER,
            POINTER, INT32, POINTER, POINTER, POINTER, INT32, INT32, POINTER, POINTER,
        ),
        "weighted_rows": (MATRIX, INT64, INT64, ROW_MAP, POINTER, POINTER),
        "sum_rows": (ROW_MAP, POINTER, POINTER),
    },
    "sm90/rows.cu": {
        "target_logits": (
            MATRIX, MATRIX, POINTER, INT64, LOGIT_OPTIONS, ROW_MAP, *[POINTER] * 5, INT64,
            POINTER, INT64,
        ),
        "finish_rows": (
            ROW_MAP, UNIT_SUMS, INT64, INT64, POINTER, LOSS_OPTIONS, WEIGHTS, ROW_OUTPUTS, LOSS_SUM
        ),
    },
    "sm90/bounds.cu": {
        "first_bound": (MATRIX, MATRIX, POINTER, INT64, LOGIT_OPTIONS, ROW_MAP, POINTER),
    },
    "sm90/forward.cu": {"forward_pairs": _HOPPER_FORWARD, "forward_single": _HOPPER_FORWARD},
    "sm90/options.cu": {"forward_options": _HOPPER_FORWARD},
    "sm90/statistics.cu": {"forward_statistics": _HOPPER_FORWARD},
    "sm90/order.cu": {
        "order_columns": (
            POINTER, INT64, INT32, INT32, INT32, INT32, COLUMN_ORDER, ORDER_SCRATCH, POINTER,
            POINTER, INT32,
        ),
    },
    "sm90/factors.cu": {
        "largest_factor": (POINTER, POINTER, POINTER, POINTER),
        "sum_parts": (POINTER, INT32, INT64, POINTER),
    },
    "sm90/backward.cu": {"backward": (TENSOR_MAP, HOPPER_BACKWARD)},
    "sm90/backward_options.cu": {"backward_options": (TENSOR_MAP, HOPPER_BACKWARD)},
    "sm90/dense_dlogits.cu": {"dense_dlogits": (TENSOR_MAP, TENSOR_MAP, DENSE_DLOGITS)},
    "sm90/dense_gradients.cu": {"dense_gradients": (3 * TENSOR_MAP, DENSE_GRADIENTS)},
}  # fmt: skip


@functools.cache
def layout(file: str, name: str) -> Layout:
    """Return where the arguments of a kernel lie."""
    return Layout(PARAMETERS[file][name])
