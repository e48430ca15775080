"""The plan of a call: tier, tiles, blocks, filter and workspace, from the problem alone.

Pure arithmetic: no array is touched and no GPU is needed to make or to test a plan.
"""

from .gpu import GpuDevice, GpuPlan, Room, lay_out, make_gpu_plan
from .hopper import TILE_COLUMNS, HopperForward
from .host import Plan, make_plan
from .shared import COLUMN_CHUNK, ITEMSIZE, LARGEST_AUTO_EPS, MARGIN, ROW_TILE, Sweep, wanted_sweeps

__all__ = [
    "COLUMN_CHUNK",
    "ITEMSIZE",
    "LARGEST_AUTO_EPS",
    "MARGIN",
    "ROW_TILE",
    "TILE_COLUMNS",
    "GpuDevice",
    "GpuPlan",
    "HopperForward",
    "Plan",
    "Room",
    "Sweep",
    "lay_out",
    "make_gpu_plan",
    "make_plan",
    "wanted_sweeps",
]
