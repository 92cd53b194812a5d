"""Some kernels compile for GPUs, without a GPU, and spill few registers.

`make gpu-compile` compiles all of them; `PYTEST_ARGS="-k 'sm_90 and softmax'"` selects some.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import compile_ahead as ahead
import grid
from compile_ahead import F32, compiling, empty

from pyfused import functional

CHOSEN = [(target, name) for target in ahead.TARGETS for name in ahead.QUICK]
if "PYFUSED_TEST_COMPILE" in os.environ:
    CHOSEN = [(target, case.name) for case in ahead.cases().values() for target in case.targets]
elif not grid.FULL:
    CHOSEN = [(target, name) for target, name in CHOSEN if target == "sm_90"]


@pytest.mark.parametrize(("target", "name"), CHOSEN, ids=map(" ".join, CHOSEN))
def test_kernels_compile_well(target: str, name: str) -> None:
    assert ahead.problems(ahead.cases()[name], target) == []


@pytest.mark.parametrize("classes_contiguous", [False, True])
def test_offsets_beyond_32_bits(classes_contiguous: bool) -> None:
    """Offsets of rows or classes that are more than 2**31 elements apart are 64-bit."""
    strides = (2**32, 1) if classes_contiguous else (1, 2**32)
    x = torch.empty_strided((2, 4096), strides, dtype=F32, device="meta")
    with compiling("sm_90") as launched:
        functional.cross_entropy(x, empty(torch.int64, 2))
    text = launched[0].asm["ttir"]
    offsets = re.findall(r"tt\.addptr (%\w+),.*ptr<f32>.*, (?:tensor<\w+x)?(i\d+)>? loc", text)
    assert {bits for pointer, bits in offsets if "%loss" not in pointer} == {"i64"}


def test_numbers_do_not_select_kernels() -> None:
    """A temperature or a weight that changes in each step does not recompile kernels."""
    x, target = empty(F32, 64, 1000).requires_grad_(), empty(torch.int64, 64)

    def losses(value: float) -> list[torch.Tensor]:
        temperature: Any = {"temperature": value, "reduction": "sum"}
        return [
            functional.cross_entropy(x, target, gamma=value, z_loss=value, **temperature),
            functional.cross_entropy(x, target, label_smoothing=value / 8, reduction="sum"),
            functional.kl_div_with_logits(x, x.detach(), beta=value / 8, **temperature),
            functional.log_probs(x, target, softcap=value, temperature=value)[0],
        ]

    with compiling("sm_90") as launched:
        for value in (0.5, 2.0, 3.0, 7.0):
            for loss in losses(value):
                ahead.differentiate(loss)
    assert len(launched) == 32
    assert len({id(each) for each in launched}) == 6
