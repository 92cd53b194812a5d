"""One module per kind of device, each a set of kernels that take and return tensors."""
