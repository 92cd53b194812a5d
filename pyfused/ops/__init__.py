"""The operators: declarations, the choice of a backend, and for each family its plans."""

import re
import sys

import torch

PACKAGE = __name__.partition(".")[0]
# Where the custom operators of this copy of the package are registered. The package's name is in it
# because a process may hold two copies, one of them loaded from the kernel hub under another name.
# The version is in it because the compiler keeps programs on disk by the names of their operators.
_VERSION = getattr(sys.modules.get(PACKAGE), "__version__", "")
NAMESPACE = "_".join([PACKAGE, *re.findall(r"\w+", _VERSION)])
TORCH_OPS = getattr(torch.ops, NAMESPACE)
