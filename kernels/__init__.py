"""Triton kernels for GPUs, installed as pyfused.kernels, and imported once a GPU tensor needs one.

A file for each family; `pyfused/backends/triton.py` launches the kernels, with the block sizes and
warps that `launch.py` chooses. Formulas of elementwise operators are printed when one is first run.
"""
