"""What the benchmarks do beside timing: steps of a loop, the table of sizes, and reports."""

from __future__ import annotations

import importlib
import math
import random
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import report
import run
import sizes
from cases import DTYPES, OPS, TORCH, TRAINING, Case, assert_correct, draw, step

from pyfused.ops import dispatch
from pyfused.ops.elementwise import L1_LOSS, SIGMOID
from pyfused.ops.operators import CROSS_ENTROPY, SOFTMAX
from pyfused.ops.sizes import ATEN_BELOW


def test_each_step_frees_the_gradient_that_it_made_last() -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []

    def relu(input: Tensor, **_: object) -> Tensor:
        seen.append((input, input.grad))
        return input.relu()

    case = Case("relu", (100,))
    arguments = draw(case)
    one, other = (step(SimpleNamespace(relu=relu), case, arguments, TRAINING) for _ in range(2))
    one()
    other()
    one()
    (first, _), (second, _), (again, gradient) = seen
    assert first is again
    assert gradient is None  # it was freed before the call, within the step
    assert first is not second
    assert first.data_ptr() == second.data_ptr() == arguments.input.data_ptr()
    assert first.grad is not None
    assert second.grad is not None
    assert arguments.input.grad is None


def test_a_wrong_result_is_not_timed() -> None:
    case = Case("relu", (100,))
    wrong = SimpleNamespace(relu=lambda input: TORCH.relu(input) * 1.01)
    assert_correct(case, draw(case), TORCH)
    with pytest.raises(AssertionError, match="not close"):
        assert_correct(case, draw(case), wrong)


# ---- the table of sizes --------------------------------------------------------------------------


FILE_OF_SIZES = sizes.FILE.read_text(encoding="utf-8")
KEYS = [key + suffix for op in OPS for key in sizes.keys(op) for suffix in ("", "_forward")]


@pytest.mark.parametrize("key", KEYS)
def test_every_operator_has_its_rows_in_the_table_of_sizes(key: str) -> None:
    """Else `make sizes SIZES_ARGS="--op ..."` is still to be run."""
    rows = ATEN_BELOW.get(key, {})
    assert sorted(map(str, rows)) == sorted(map(str, DTYPES.values()))
    assert all(bands[-1][0] == math.inf for bands in rows.values())


@pytest.mark.parametrize(
    ("slower_below", "faster_from", "expected"),
    [
        (0, math.inf, 1 << 16),  # neither beyond the spread: as it was
        (0, 1 << 13, 1 << 13),
        (1 << 20, math.inf, 1 << 20),
        (1 << 30, math.inf, 2 * sizes.LARGEST),
        (0, 0, sizes.SMALLEST),
    ],
)
def test_a_threshold_moves_only_where_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, slower_below: float, faster_from: float, expected: int
) -> None:
    def faster(case: Case, mode: str, had: bool) -> bool:
        assert mode == cases.FORWARD
        return case.elements >= (slower_below if had else faster_from)

    monkeypatch.setattr(sizes, "faster", faster)
    found = sizes.threshold("relu", "relu", torch.float32, 1, cases.FORWARD, old=1 << 16)
    assert found == expected


def test_a_threshold_below_what_a_case_can_be_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "faster", lambda *_, **__: True)
    op, mode = "cross_entropy", cases.TRAINING
    assert sizes.threshold(op, op, torch.float32, 32000, mode, old=1 << 12) == 1 << 12


def test_a_call_is_slower_beyond_the_spread_and_what_a_call_of_aten_may_cost() -> None:
    assert sizes.slower(([1.0, 1.0, 1.1], [1.2, 1.2, 1.3]), 0.95)
    assert not sizes.slower(([1.0, 1.0, 1.1], [1.02, 1.02, 1.1]), 0.95)
    assert not sizes.slower(([1.0, 1.3, 1.3], [1.2, 1.2, 1.3]), 0.95)  # within the spread
    assert not sizes.slower(([1e-3] * 3, [1.5e-3] * 3), 0.95)
    assert sizes.slower(([1e-3] * 3, [1.7e-3] * 3), 0.95)


@pytest.mark.parametrize(
    ("had", "ratios", "expected"),
    [
        (True, [0.9, 0.9, 0.9], False),  # slower in each
        (True, [0.9, 1.0], True),
        (False, [1.1, 1.1, 1.1], True),  # faster in each
        (False, [1.1, 1.0], False),
    ],
)
def test_what_moves_an_entry_is_measured_several_times(
    monkeypatch: pytest.MonkeyPatch, had: bool, ratios: list[float], expected: bool
) -> None:
    monkeypatch.setattr(sizes, "ALL_THREADS", 1)
    monkeypatch.setattr(sizes, "both", lambda *_: [])
    monkeypatch.setattr(sizes.cases, "measure", lambda *_, **__: ([ratios.pop(0)] * 3, [1.0] * 3))
    assert sizes.faster(Case("relu", (100,)), cases.TRAINING, had) == expected
    assert not ratios


def test_classes_that_share_a_threshold_share_a_band() -> None:
    found = {2: 1 << 12, 8: 1 << 12, 24: 1 << 15, 64: 1 << 16, 1000: 1 << 16}
    assert sizes.banded(found) == ((8, 1 << 12), (24, 1 << 15), (math.inf, 1 << 16))
    assert sizes.below(sizes.banded(found), 8) == 1 << 12
    assert sizes.below(sizes.banded(found), 9) == 1 << 15
    assert sizes.below((), 9) == 0  # a new operator


def test_a_further_machine_only_raises_the_bands() -> None:
    before = (24, 1 << 12), (math.inf, 1 << 16)
    found = (8, 1 << 10), (64, 1 << 14), (math.inf, 1 << 15)
    assert sizes.raised(before, found)[0] == (8, 1 << 12)
    for classes in (2, 8, 9, 24, 25, 64, 65):
        most = max(sizes.below(rows, classes) for rows in (before, found))
        assert sizes.below(sizes.raised(before, found), classes) == most
    assert sizes.raised((), found) == found


def test_each_machine_is_named_once() -> None:
    once = sizes.written(ATEN_BELOW, further=True)
    names: dict[str, Any] = {}
    exec(once, names)
    here = sizes.machine(sizes.measured(sizes.machine_info()))
    assert " ".join(names["__doc__"].split()).count(here) == 1


@pytest.mark.thresholds
def test_a_row_that_was_not_measured_is_that_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    of_all = ATEN_BELOW["l1_loss"][torch.float16]
    monkeypatch.setattr(dispatch, "bands", dispatch.bands.__wrapped__)  # which keeps what it finds
    monkeypatch.setattr(dispatch, "_ALWAYS_BELOW", {})
    monkeypatch.setitem(ATEN_BELOW, "l1_loss_none", {torch.float32: ((math.inf, 1 << 5),)})
    assert dispatch.bands(L1_LOSS, "l1_loss_none", True, torch.float16) == of_all
    assert dispatch.bands(L1_LOSS, "l1_loss_none", True, torch.float32) == ((math.inf, 1 << 5),)
    monkeypatch.delitem(ATEN_BELOW, "l1_loss_none_forward", raising=False)
    x, small = torch.rand(1 << 6).requires_grad_(), torch.rand(1 << 4).requires_grad_()
    for reduction in ("none", "mean"):
        faster = [
            dispatch.is_small(L1_LOSS, L1_LOSS.bind(y, y, None, None, reduction, None))
            for y in (small, x)
        ]
        assert faster == ([True, False] if reduction == "none" else [True, True])


@pytest.mark.parametrize(
    ("op", "shape", "dim", "expected"),
    [
        (SOFTMAX, (7, 2, 5), 1, ("softmax", 2)),
        (SOFTMAX, (7, 2, 5), -1, ("softmax", 5)),
        (SOFTMAX, (7,), None, ("softmax", 1)),
        (CROSS_ENTROPY, (7, 2, 5), None, ("cross_entropy_kdim", 2)),
        (CROSS_ENTROPY, (7, 2), None, ("cross_entropy", 2)),
        (CROSS_ENTROPY, (7,), None, ("cross_entropy", 7)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_rows_of_the_table_are_for_rows_of_a_length(
    op: Any, shape: tuple[int, ...], dim: int | None, expected: tuple[str, int]
) -> None:
    assert op.size_key((torch.empty(shape), dim)) == expected


@pytest.mark.parametrize("raised", [False, True])
def test_the_file_of_sizes_is_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: bool
) -> None:
    file = tmp_path / "sizes.py"
    file.write_text(FILE_OF_SIZES, encoding="utf-8")
    monkeypatch.setattr(sizes, "FILE", file)
    monkeypatch.setattr(sizes, "threshold", lambda *_, **__: 1 << 24)
    with mock.patch.dict(ATEN_BELOW), mock.patch.dict(dispatch._ALWAYS_BELOW):
        for key in [key for key in ATEN_BELOW if "softcap" in key]:
            del ATEN_BELOW[key]
        options = Namespace(op=["l1_loss"], dtype=["float16"], raise_only=raised, dry_run=False)
        sizes.sizes(options)
    names: dict[str, Any] = {}
    exec(file.read_text(encoding="utf-8"), names)
    table = names["ATEN_BELOW"]
    for key in ("l1_loss", "l1_loss_none", "l1_loss_forward", "l1_loss_none_forward"):
        assert table[key][torch.float16] == ((math.inf, 1 << 24),)
    assert table["mse_loss"] == ATEN_BELOW["mse_loss"]
    # An operator without a row has its family's, which is the largest of all.
    assert table["softcap"] == ATEN_BELOW["Activation"]
    assert table["Activation"][torch.bfloat16] == max(
        rows[torch.bfloat16] for key, rows in ATEN_BELOW.items() if key in cases.ACTIVATIONS
    )
    before = sizes.MEASURED.search(FILE_OF_SIZES)
    assert before is not None
    machines = len(re.findall(r"torch\s", before[0])) * raised + 1
    assert len(re.findall(r"torch\s", names["__doc__"])) == machines
    assert torch.__version__ in names["__doc__"]


@pytest.mark.parametrize("op", ["cross_entropy", "softmax", "mse_loss", "relu"])
def test_a_seed_draws_the_same_calls_again(op: str) -> None:
    one, other = (list(sizes.drawn(op, torch.float32, 30, random.Random(3))) for _ in range(2))
    assert one == other
    dims = {len(case.shape) for case in one}
    assert dims == {"cross_entropy": {2, 3}, "softmax": {2, 3, 4}}.get(op, {1, 2, 3, 4})
    assert {case.reduction for case in one} == (
        {"mean", "none"} if "loss" in op or "entropy" in op else {"mean"}
    )
    assert len({case.elements for case in one}) > 20


@pytest.mark.thresholds
@pytest.mark.parametrize("how", [sizes.CALLED, sizes.PATCHED])
def test_a_sweep_times_torch_beside_the_kernels(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    fused = mock.Mock(side_effect=lambda arguments: torch.empty_like(arguments[0]))
    sizes.drawn_and_checked(Case("sigmoid", (1 << 20,)))
    monkeypatch.setattr(SIGMOID, "plan", lambda *_: fused)
    dispatch.forget_plans()
    theirs, ours = sizes.both(Case("sigmoid", (1 << 20,)), cases.FORWARD, how)
    theirs(1)
    assert not fused.called
    ours(1)
    assert fused.called


def test_the_edges_of_the_table_are_swept() -> None:
    edges = [below for _, below in ATEN_BELOW["cross_entropy"][torch.float32]]
    swept = [case.elements for case in sizes.edges("cross_entropy", torch.float32)]
    assert all(abs(got - below) < 1024 for got, below in zip(swept, edges, strict=False))


# ---- reports -------------------------------------------------------------------------------------


def found_on(**info: object) -> report.Found:
    return {"machine_info": {"cpu": "AMD EPYC", "cores": 2, "isa": "x86-64-v3"} | info}


def test_machines_of_other_instruction_sets_have_folders_of_their_own() -> None:
    assert report.slug(found_on()) == "amd-epyc-2-cores-x86-64-v3"
    assert report.slug(found_on(isa="x86-64-v4")) == "amd-epyc-2-cores-x86-64-v4"
    assert report.slug({"machine_info": {"gpu": "NVIDIA H100 80GB"}}) == "nvidia-h100-80gb"
    for file in report.RESULTS.glob("*/results.json"):
        assert file.parent.name == report.slug(report.load([file]))


def test_the_table_of_allocators_is_filled_in(tmp_path: Path) -> None:
    found = [
        {"case": "relu", "setting": "torch", "ms": 103.4, "ratio": [1, 1, 1]},
        {"case": "relu", "setting": "pyfused", "ms": 37.8, "ratio": [2.1, 2.4, 2.61]},
    ]
    page = tmp_path / "memory.md"
    page.write_text("<!-- benchmark table -->\nold\n<!-- end of benchmark table -->\n")
    report.fill(page, report.allocators_markdown(found))
    lines = page.read_text().splitlines()
    assert "| torch | 103 ms |" in lines
    assert "| pyfused | 2.40 (2.10 to 2.61) |" in lines
    assert "old" not in lines


COMMANDS = (
    *("report", "quick", "memory", "busy", "compare HEAD", "allocators", "compiled", "overhead"),
    *("sizes", "sweep", "head", "filter-eps", "gpu gpu.json", "gpu-launch launch.md"),
    "gpu-check folder",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_its_function(words: str) -> None:
    function = run.parser().parse_args(words.split()).function
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(module), name)
    assert callable(function)


def test_a_report_gives_gigabytes_a_second_beside_the_share_of_a_copy() -> None:
    case = Case("mse_loss", (1 << 20,))  # reads two tensors and writes a gradient: 12 MiB
    peers = {
        name: report.peer([ms] * 3, [2.0] * 3) for name, ms in (("torch", 10.0), ("copy", 1.0))
    }
    table = report.markdown([report.row(case, cases.TRAINING, peers)])
    names, _, cells = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    found = dict(zip(names, cells, strict=True))
    assert found["GB/s"] == "6.29"
    assert found["share of a copy"] == "0.50 (0.50 to 0.50)"
