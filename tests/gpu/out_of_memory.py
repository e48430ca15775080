"""Run out of device memory on purpose, and go on; a process of its own, whose pools start empty.

python tests/gpu/out_of_memory.py {cupy,torch} {gradients,workspace}
"""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from devices import FRAMEWORKS
from test_gpu_behaviour import bits, no_more_than, out_of_memory, problem, sent

import cce_cupy


def main(framework: str, what: str) -> None:
    """Exceed a limit, then compute within it."""
    each = FRAMEWORKS[framework]
    small = sent(each, problem())
    expected = bits(each, cce_cupy.linear_cross_entropy_value_and_grad(**small))
    n, v, d = (64, 100_000, 512) if what == "gradients" else (2048, 20_000, 16)
    large = sent(each, problem(n=n, v=v, d=d, bias=False))
    options = {"workspace_bytes": 2**24 if what == "gradients" else 2**30}
    match = "workspace_bytes" if what == "workspace" else None
    gc.collect()
    before = each.used()
    with no_more_than(each, 100 * 2**20):
        with pytest.raises(out_of_memory(each), match=match):
            cce_cupy.linear_cross_entropy_value_and_grad(**large, **options)
        gc.collect()
        assert each.used() == before
        assert bits(each, cce_cupy.linear_cross_entropy_value_and_grad(**small)) == expected
        if what == "workspace":
            cce_cupy.linear_cross_entropy_value_and_grad(**large, workspace_bytes=2**25)
    cce_cupy.linear_cross_entropy_value_and_grad(**large, **options)
    assert bits(each, cce_cupy.linear_cross_entropy_value_and_grad(**small)) == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
