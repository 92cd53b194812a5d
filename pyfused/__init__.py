"""Fused losses, activations and language-model heads for PyTorch, forward and backward.

``pyfused.functional`` mirrors ``torch.nn.functional`` and ``pyfused.nn`` mirrors ``torch.nn``: the
same names, arguments, results and errors. :func:`convert` replaces the modules of a model with
pyfused's, :func:`patch` replaces torch's functions, and :func:`explain` reports which
implementation a call runs, and why.
"""

import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

_folder = Path(__file__).parent
if (_folder.parent / "csrc").is_dir() and not any(_folder.glob("_cpu_*")):
    # In a checkout, Python imports this folder instead of the package that was installed from it.
    _others = [entry for entry in sys.path if Path(entry).resolve() != _folder.parent.resolve()]
    if (_installed := PathFinder.find_spec("pyfused", _others)) is not None:
        __path__[:] = _installed.submodule_search_locations or ()
        warnings.warn(
            f"pyfused: the checkout {_folder.parent} is not built, so the installed package in "
            f"{', '.join(__path__)} is used. To use the checkout, run 'make build' in it",
            RuntimeWarning,
            stacklevel=2,
        )

__version__ = "0.1.0"

try:
    from pyfused import functional, memory, nn
    from pyfused.adopt.convert import convert, plan_conversion, revert
    from pyfused.adopt.explain import explain
    from pyfused.adopt.patch import patch, unpatch
    from pyfused.adopt.report import report
    from pyfused.adopt.trl import patch_trl, unpatch_trl
    from pyfused.formula import activation, loss
    from pyfused.types import VocabShard
except ImportError as error:
    # People run `python -m pyfused` when something is wrong, so it prints one line.
    if sys.argv[:1] == ["-m"] and "pyfused" in sys.orig_argv:
        raise SystemExit(f"pyfused: {error}") from None
    raise

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
