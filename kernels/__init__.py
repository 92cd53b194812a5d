"""Triton kernels for GPUs, installed as pyfused.kernels, imported once a GPU tensor asks.

One launch for each family: what `pyfused/backends/triton.py` calls. Formulas have the names that
they have in the C++ module.
"""

from .activation import activation, scale
from .cross_entropy_launch import cross_entropy
from .multi_margin_loss import multi_margin_loss
from .nll_loss import nll_loss
from .pointwise_loss import pointwise_loss
from .softmax import softmax

__all__ = [
    "activation",
    "cross_entropy",
    "multi_margin_loss",
    "nll_loss",
    "pointwise_loss",
    "scale",
    "softmax",
]
