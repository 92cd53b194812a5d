"""Losses and activations for PyTorch whose forward and backward are fused.

``pyfused.functional`` mirrors ``torch.nn.functional`` and ``pyfused.nn`` mirrors ``torch.nn``: the
same names, arguments, results and errors.
"""

from pyfused import functional, memory, nn

__all__ = ["__version__", "functional", "memory", "nn"]
__version__ = "0.1.0"
