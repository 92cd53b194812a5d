"""pyfused for the kernel hub: Triton kernels on GPUs, torch's operators on CPUs."""

from . import functional, layers, nn
from .adopt.convert import convert, plan_conversion, revert
from .adopt.explain import explain
from .formula import activation, loss
from .types import VocabShard

__all__ = [
    "VocabShard",
    "activation",
    "convert",
    "explain",
    "functional",
    "layers",
    "loss",
    "nn",
    "plan_conversion",
    "revert",
]
