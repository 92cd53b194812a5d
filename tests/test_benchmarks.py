"""What benchmarks do beside timing: steps of a loop, the table of sizes, settings and reports."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import report
import settings
import sizes
from cases import MODES, Case, draw, step

from pyfused.ops.sizes import ATEN_BELOW


def test_each_step_frees_the_gradient_that_it_made_last() -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []

    def relu(input: Tensor, **_: object) -> Tensor:
        seen.append((input, input.grad))
        return input.relu()

    case = Case("relu", (100,))
    arguments = draw(case)
    one, other = (step(SimpleNamespace(relu=relu), case, arguments, MODES[-1]) for _ in range(2))
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
    def kernels_keep(case: Case, had: bool) -> bool:
        return case.elements >= (slower_below if had else faster_from)

    monkeypatch.setattr(sizes, "kernels_keep", kernels_keep)
    assert sizes.threshold("relu", "relu", torch.float32, 1, old=1 << 16) == expected


def test_a_threshold_below_what_a_case_can_be_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "kernels_keep", lambda *_, **__: True)
    found = sizes.threshold("cross_entropy", "cross_entropy", torch.float32, 32000, old=1 << 12)
    assert found == 1 << 12


def test_classes_that_share_a_threshold_share_a_row() -> None:
    found = {2: 1 << 12, 8: 1 << 12, 24: 1 << 15, 64: 1 << 16, 1000: 1 << 16}
    assert sizes.banded(found) == ((8, 1 << 12), (24, 1 << 15), (math.inf, 1 << 16))
    assert sizes.below(sizes.banded(found), 8) == 1 << 12
    assert sizes.below(sizes.banded(found), 9) == 1 << 15
    assert sizes.below((), 9) == 0  # a new operator


def test_the_file_of_sizes_is_what_was_measured() -> None:
    table = ATEN_BELOW | {"l1_loss": {torch.float16: ((8, 1 << 12), (math.inf, 1 << 17))}}
    names: dict[str, object] = {}
    exec(sizes.written(table), names)
    assert names["ATEN_BELOW"] == table
    assert "torch" in str(names["__doc__"])


def test_jemalloc_is_left_out_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "JEMALLOC", None)
    assert settings.available() == ["as it comes", "THP", "kept pages"]
    assert "libjemalloc2" in capsys.readouterr().out
    monkeypatch.setattr(settings, "JEMALLOC", "libjemalloc.so.2")
    assert settings.available() == list(settings.SETTINGS)
    assert settings.environment("THP")["THP_MEM_ALLOC_ENABLE"] == "1"


def test_the_table_of_allocators_is_filled_in(tmp_path: Path) -> None:
    found = [
        {"case": "relu", "way": "torch, as it comes", "ms": 103.4, "ratio": [1, 1, 1]},
        {"case": "relu", "way": "pyfused, as it comes", "ms": 37.8, "ratio": [2.1, 2.4, 2.61]},
    ]
    page = tmp_path / "memory.md"
    page.write_text("<!-- benchmark table -->\nold\n<!-- end of benchmark table -->\n")
    report.fill(page, report.allocators_markdown(found))
    lines = page.read_text().splitlines()
    assert "| torch, as it comes | 103 ms |" in lines
    assert "| pyfused, as it comes | 2.40 (2.10 to 2.61) |" in lines
    assert "old" not in lines
