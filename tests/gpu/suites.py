"""The tests of a CPU module, once more, on the GPU.

A module of tests is loaded as a copy of its own in which the public functions are those of a
`devices.Road`; the original and its tests are left alone.
"""

import importlib.util
import sys
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).parent.parent
PUBLIC = (
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_cross_entropy_vjp",
    "token_statistics",
    "filter_statistics",
)
# Every framework runs every property, each with a share of the small profile's examples: a call and
# its copies to and from the device take longer than NumPy takes for such small problems.
_PROFILE = settings().max_examples
EXAMPLES = _PROFILE if _PROFILE >= 1000 else max(_PROFILE // 8, 20)


def load_suite(module, road, leave_out=()):
    """The tests of a module by name, through a road."""
    name = f"{module}_through_{road.framework.name}"
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{module}.py")
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    for function in PUBLIC:
        if hasattr(copy, function):
            setattr(copy, function, getattr(road, function))
    tests = {k: test for k, test in vars(copy).items() if k.startswith("test_")}
    for left in leave_out:
        del tests[left]
    for test in tests.values():
        if hasattr(test, "hypothesis"):
            settings(max_examples=EXAMPLES)(test)
    return {f"{k}_through_{road.framework.name}": test for k, test in tests.items()}
