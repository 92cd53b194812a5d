"""Triton kernels for GPUs, installed as pyfused.kernels and imported at their first use.

`pyfused/backends/triton.py` launches the kernels, with the block sizes and warps that `launch.py`
chooses. Kernels of elementwise formulas are generated at their first use.
"""
