"""From a call to a kernel: declarations of operators, reasons to fall back, and autograd."""
