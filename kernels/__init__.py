"""Triton kernels for GPUs, installed as pyfused.kernels, imported once a GPU tensor asks.

One launch for each family: what `pyfused/backends/triton.py` calls. Formulas have the names that
they have in the C++ module.
"""

from .activation import activation, scale
from .cross_entropy import cross_entropy
from .pointwise_loss import pointwise_loss
from .softmax import softmax

__all__ = ["activation", "cross_entropy", "pointwise_loss", "scale", "softmax"]
