"""Triton kernels for GPUs, installed as pyfused.kernels, imported once a GPU tensor asks."""
