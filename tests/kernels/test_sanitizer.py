"""AddressSanitizer reports errors of the kernels; `make sanitize` runs these tests."""

from __future__ import annotations

import os

import pytest
from processes import process

pytestmark = pytest.mark.skipif(
    "asan" not in os.environ.get("LD_PRELOAD", ""), reason="make sanitize runs it"
)

OVERRUN = """
x = torch.zeros(5)
cpu.native.relu(0, 6, x.data_ptr(), x.data_ptr(), (0.0, 0.0, 0.0), 1, ())
"""
USE_AFTER_FREE = """
x = torch.ones(9 << 20)
address = cpu.empty(x.shape, x.dtype, x).data_ptr()
cpu.native.relu(0, 9 << 20, address, x.data_ptr(), (0.0, 0.0, 0.0), 1, ())
"""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        pytest.param(OVERRUN, "heap-buffer-overflow", id="instrumented kernels"),
        pytest.param(USE_AFTER_FREE, "use-after-poison", id="poisoned free blocks"),
    ],
)
def test_an_error_is_reported(code: str, error: str) -> None:
    done = process("-c", f"import torch\nfrom pyfused.backends import cpu\n{code}")
    assert done.returncode != 0
    assert error in done.stderr
