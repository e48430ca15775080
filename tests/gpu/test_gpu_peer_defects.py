"""The peers' defects on the GPU: the suite of `test_peer_defects.py`.

A target out of range is no error there but NaN: see `test_gpu_behaviour.py`.
"""

from devices import ROADS
from suites import load_suite

globals().update(
    load_suite(
        "test_peer_defects",
        ROADS["torch"],
        leave_out=["test_target_outside_the_vocabulary_is_an_error"],
    )
)
