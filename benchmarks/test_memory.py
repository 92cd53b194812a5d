"""Measure what torch and pyfused take at their peaks, for the picture beside the times."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Case
from conftest import MEMORY
from memory import CASES, IMPLEMENTATIONS, measure
from settings import AS_IT_COMES


@pytest.mark.skipif(not AS_IT_COMES, reason="measured with the allocator as it comes")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux has the peak")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory(pytestconfig: pytest.Config, case: Case, implementation: str) -> None:
    if "inplace" in implementation and case.op != "cross_entropy":
        pytest.skip("its own to cross_entropy")
    found = {
        "case": case.name,
        "implementation": implementation,
        "bytes": measure(case, implementation),
        "input_bytes": case.elements * case.dtype.itemsize,
    }
    pytestconfig.stash.setdefault(MEMORY, []).append(found)
