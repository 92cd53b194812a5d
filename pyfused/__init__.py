"""Fused losses, activations and language-model heads for PyTorch, forward and backward.

``pyfused.functional`` mirrors ``torch.nn.functional`` and ``pyfused.nn`` mirrors ``torch.nn``: the
same names, arguments, results and errors. :func:`convert` replaces the modules of a model with
pyfused's, :func:`patch` replaces torch's functions, and :func:`explain` reports which
implementation a call runs, and why.
"""

__version__ = "0.1.0"

from pyfused import functional, memory, nn
from pyfused.adopt.convert import convert, plan_conversion, revert
from pyfused.adopt.explain import explain
from pyfused.adopt.patch import patch, unpatch
from pyfused.adopt.trl import patch_trl, unpatch_trl
from pyfused.dispatch.report import report
from pyfused.formula import activation, loss
from pyfused.vocab_parallel import VocabShard

__all__ = [
    "VocabShard",
    "__version__",
    "activation",
    "convert",
    "explain",
    "functional",
    "loss",
    "memory",
    "nn",
    "patch",
    "patch_trl",
    "plan_conversion",
    "report",
    "revert",
    "unpatch",
    "unpatch_trl",
]
