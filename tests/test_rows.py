"""How the rows of a matrix on a GPU lie, as the kernels are told: no GPU is needed to say it."""

import pytest

from cce_cupy.frameworks.gpu import _row_stride


@pytest.mark.parametrize(
    ("shape", "strides", "stride"),
    [
        ((5, 8), (8, 1), 8),
        ((5, 8), (20, 1), 20),
        ((2, 5, 8), (40, 8, 1), 8),
        ((2, 5, 8), (100, 20, 1), 20),
        ((5, 2, 8), (8, 40, 1), None),
        ((5, 8), (1, 5), None),
        ((5, 1), (3, 7), 3),
        ((1, 8), (99, 1), 8),
        ((8,), (1,), 8),
        ((5, 8), (0, 1), 0),
        ((0, 8), (0, 0), 8),
        ((3, 0, 8), (0, 1, 3), 8),
        ((5, 0), (1, 1), 0),
    ],
)
def test_row_stride(shape, strides, stride):
    """Where there are no elements frameworks tell any strides, and copying does not change them."""
    assert _row_stride(shape, strides) == stride
