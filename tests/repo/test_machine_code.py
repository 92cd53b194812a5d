"""Tests of the table of machine code, csrc/sizes.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import sizes


def test_no_kernel_has_grown() -> None:
    """Skipped with another compiler than that of the table, which `-ra` reports in CI."""
    compiler, isas, old = sizes.written()
    if not (built := [isa for isa in sizes.modules() if isa in isas]):
        pytest.skip(f"NO KERNEL IS CHECKED: csrc/sizes.txt is of {', '.join(isas)}")
    if sizes.compiler() != compiler:
        of_modules = f"the modules were compiled by {sizes.compiler()}"
        pytest.skip(
            f"NO KERNEL IS CHECKED: csrc/sizes.txt was compiled by {compiler}, {of_modules}"
        )
    lines = sizes.changed(old, sizes.measured(), built)
    assert not lines, (
        "\n".join(["csrc/sizes.txt differs from the compiled kernels:", *lines])
        + "\nIf no kernel is slower, run tools/sizes.py and commit the table: tools/README.md."
    )


def test_growth_is_reported() -> None:
    old = {"run<float>": {"v2": 1000, "v3": 1000}, "short": {"v2": 40}, "old": {"v2": 100}}
    new = {"run<float>": {"v2": 1050, "v3": 1100}, "short": {"v2": 72}, "new": {"v2": 100}}
    lines = ["new (v2): new", "old (v2): gone", "run<float> (v3): 1000 bytes, now 1100"]
    assert sizes.changed(old, new, ["v2", "v3"]) == lines
    assert sizes.changed(old, new, ["v2"]) == lines[:2]


LAMBDA = "pyfused::Row<float>::run(long)::{lambda(long)#1}"


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        ("void pyfused::run<float, 2ul>(long) [clone .isra.0] [clone .cold]", "run<float, 2>"),
        ("pyfused::Row<std::array<float> >::run(A<long>&) const", "Row<std::array<float>>::run"),
        (f"void pyfused::map<long, {LAMBDA}>({LAMBDA}&)::{{lambda()#1}}", "Row<float>::run"),
    ],
)
def test_names_of_kernels(function: str, kernel: str) -> None:
    assert sizes.kernel_of(function) == f"pyfused::{kernel}"
