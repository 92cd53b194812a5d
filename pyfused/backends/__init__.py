"""One module per kind of device, each a set of kernels that take and return tensors."""

from __future__ import annotations

from typing import NamedTuple


class Want(NamedTuple):
    """The outputs that a call of a loss kernel computes."""

    loss: bool = True
    grad_input: bool = False
    grad_target: bool = False


class CrossEntropyOptions(NamedTuple):
    """The arguments of cross-entropy that are no tensors, as in ``torch.nn.functional``."""

    ignore_index: int
    reduction: str
    label_smoothing: float
