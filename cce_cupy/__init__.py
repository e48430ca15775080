"""Cut Cross-Entropy: the loss of a linear classifier over a huge vocabulary, without its logits."""

from .api import (
    FilterStatistics,
    Gradients,
    TokenStatistics,
    filter_statistics,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
)
from .version import VERSION as __version__

__all__ = [
    "FilterStatistics",
    "Gradients",
    "TokenStatistics",
    "__version__",
    "filter_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_cross_entropy_vjp",
    "token_statistics",
]
