"""The gradient filters on the GPU against what they promise: the suite of `test_filter.py`."""

from devices import ROADS
from suites import load_suite

globals().update(load_suite("test_filter", ROADS["cupy"]))
