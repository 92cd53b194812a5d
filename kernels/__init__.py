"""Triton kernels for GPUs, installed as pyfused.kernels, imported once a GPU tensor asks.

The names are those of the C++ module: what `pyfused/backends/triton.py` launches.
"""

from functools import partial

from . import activation, pointwise_loss
from .activation import scale
from .cross_entropy import cross_entropy

__all__ = ["cross_entropy", "mse_loss", "relu", "relu_backward", "scale"]

mse_loss = partial(pointwise_loss.pointwise_loss, pointwise_loss.MSE_LOSS)
relu = partial(activation.activation, activation.relu)
relu_backward = partial(activation.activation, activation.relu_backward)
