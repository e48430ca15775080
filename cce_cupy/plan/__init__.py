"""The plan of a call: tier, tiles, blocks, filter and workspace, from the problem alone.

Pure arithmetic: no array is touched and no GPU is needed to make or to test a plan.
"""

from ..problem import Problem
from .dense import DenseCut
from .gpu import PASSED_BYTES, GpuDevice, GpuPlan, Room, make_gpu_plan, saved_room
from .hopper import ORDER_THREADS, TILE_COLUMNS, HopperBackward, HopperForward, HopperPass
from .host import Plan, bit_words, make_plan
from .shared import (
    COLUMN_CHUNK,
    EVERY_GRADIENT,
    ITEMSIZE,
    LARGEST_AUTO_EPS,
    MARGIN,
    ROW_TILE,
    Sweep,
    Wanted,
    choose_filter,
    needed_sweeps,
)

__all__ = [
    "COLUMN_CHUNK",
    "EVERY_GRADIENT",
    "ITEMSIZE",
    "LARGEST_AUTO_EPS",
    "MARGIN",
    "ORDER_THREADS",
    "PASSED_BYTES",
    "ROW_TILE",
    "TILE_COLUMNS",
    "DenseCut",
    "GpuDevice",
    "GpuPlan",
    "HopperBackward",
    "HopperForward",
    "HopperPass",
    "Plan",
    "Room",
    "Sweep",
    "Wanted",
    "bit_words",
    "choose_filter",
    "make_gpu_plan",
    "make_plan",
    "needed_sweeps",
    "saved_words",
]


def saved_words(problem: Problem) -> int:
    """Return the 64-bit words that a forward leaves for its backward; sizes may be symbolic.

    On the host these are three numbers of each token, in float64, and the kept-column bits.
    """
    if problem.device == "cpu":
        return 3 * problem.tokens + bit_words(problem)
    return max(saved_room(problem).bytes // 8, 1)
