"""The operators: declarations, the choice of a backend, and for each family its plans."""

import torch

# Where the custom operators of this copy of the package are registered. The package's name is in it
# because a process may hold two copies, one of them loaded from the kernel hub under another name.
NAMESPACE = __name__.partition(".")[0]
TORCH_OPS = getattr(torch.ops, NAMESPACE)
