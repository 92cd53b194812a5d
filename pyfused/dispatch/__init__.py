"""From a call to a kernel: declarations of operators, signatures, plans and autograd."""
