"""The property suite of `test_properties.py` against the float64 oracle, on the GPU.

HYPOTHESIS_PROFILE=large pytest tests/gpu/test_gpu_properties.py runs 3500 examples.
"""

from devices import ROADS
from suites import load_suite

for road in ROADS.values():
    globals().update(load_suite("test_properties", road))
