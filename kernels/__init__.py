"""Triton kernels for GPUs, installed as pyfused.kernels, imported once a GPU tensor asks.

The names are those of the C++ module: what `pyfused/backends/triton.py` launches.
"""

from functools import partial

from . import activation
from .activation import scale
from .cross_entropy import cross_entropy
from .pointwise_loss import FORMULAS, pointwise_loss

__all__ = [
    "cross_entropy",
    "relu",
    "relu_backward",
    "scale",
    "sigmoid",
    "sigmoid_backward",
    *FORMULAS,
]

relu, relu_backward, sigmoid, sigmoid_backward = (
    partial(activation.activation, getattr(activation, name))
    for name in ("relu", "relu_backward", "sigmoid", "sigmoid_backward")
)
for _name, _formula in FORMULAS.items():
    globals()[_name] = partial(pointwise_loss, _formula)
