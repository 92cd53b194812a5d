"""Kernels compile for GPUs, without a GPU, and spill few registers: all of them with `--full`.

`make gpu-compile AHEAD_ARGS="-k 'sm_90 and softmax'"` selects some.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

import compile_ahead as ahead
import grid
import triton
import triton.language as tl
from compile_ahead import F32, F64, Case, compiling, empty

from pyfused.types import (
    STATE_FIELDS,
    ClassRange,
    CrossEntropyOptions,
    DivergenceOptions,
    Outputs,
    RowBlock,
    RowOptions,
)

CHOSEN = [("sm_90", name) for name in ahead.QUICK]
if grid.FULL:
    CHOSEN = [(target, case.name) for case in ahead.cases().values() for target in case.targets]


@pytest.mark.parametrize(("target", "name"), CHOSEN, ids=map(" ".join, CHOSEN))
def test_kernels_compile_well(target: str, name: str) -> None:
    assert ahead.problems(ahead.cases()[name], target) == []


@triton.jit
def copy_kernel(x, out, block: tl.constexpr):  # noqa: ANN001, ANN201
    lanes = tl.arange(0, block)
    total = tl.load(x + lanes)
    for start in range(block, 8 * block, block):
        total += tl.load(x + start + lanes)
    tl.store(out + lanes, total)


@pytest.mark.parametrize("target", ahead.SOME)
def test_bad_kernels_are_detected(target: str) -> None:
    def found(block: int) -> list[str]:
        x, options = empty(F32, 1 << 20), {"num_warps": 1, "enable_fp_fusion": True}
        run = lambda: copy_kernel[(1,)](x, x, block=block, **options)  # noqa: E731
        return ahead.problems(Case("copy", F32, run), target)

    assert found(512) == []
    (problem,) = found(1 << (13 if target == "sm_90" else 15))
    assert problem.startswith("copy_kernel spills ")


def test_too_many_launches_are_detected() -> None:
    softmax = ahead.cases()["softmax float32 4096x1000"]
    assert ahead.problems(softmax._replace(launches=0), "sm_90") == ["1 launches, not 0"]


@pytest.mark.parametrize("classes_contiguous", [False, True])
def test_offsets_beyond_32_bits(classes_contiguous: bool) -> None:
    """Offsets of rows or classes that are more than 2**31 elements apart are 64-bit."""
    strides = (2**32, 1) if classes_contiguous else (1, 2**32)
    x = torch.empty_strided((2, 4096), strides, dtype=F32, device="meta")
    options = CrossEntropyOptions()
    target = empty(torch.int64, 2)
    with compiling("sm_90") as launched:
        ahead.run_cross_entropy(options, Outputs(), None, x, target)
    text = launched[0].asm["ttir"]
    offsets = re.findall(r"tt\.addptr (%\w+),.*ptr<f32>.*, (?:tensor<\w+x)?(i\d+)>? loc", text)
    assert {bits for pointer, bits in offsets if "%loss" not in pointer} == {"i64"}


def test_numbers_do_not_select_kernels() -> None:
    """A temperature or a weight that changes in each step does not recompile kernels."""
    x, target = empty(F32, 64, 1000), empty(torch.int64, 64)
    both, classes = (x, x, None, None), ClassRange(0, 1000)
    state, results = empty(F64, STATE_FIELDS, 64), empty(F32, 64)

    def run(value: float) -> None:
        options = CrossEntropyOptions(reduction="sum", scale=value, gamma=value, z_loss=value)
        ahead.run_cross_entropy(options, Outputs(True, (True, False)), None, x, target)
        smooth = CrossEntropyOptions(reduction="sum", label_smoothing=value / 8)
        ahead.run_cross_entropy(smooth, Outputs(True, (True, False)), None, x, target)
        divergence = DivergenceOptions(reduction="sum", temperature=value, beta=value / 8)
        ahead.backend.kl_div_with_logits(both, divergence, Outputs(True, (True,)))
        block = RowBlock(x, target, None, RowOptions(softcap=value, temperature=value), classes)
        ahead.backend.row_state(block, state)
        ahead.backend.row_gradients(block, state, results, x)

    with compiling("sm_90") as launched:
        for value in (0.5, 2.0, 3.0, 7.0):
            run(value)
    assert len(launched) == 20
    assert len({id(each) for each in launched}) == 5
