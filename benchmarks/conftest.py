"""Configures pytest-benchmark: its order, its output, and facts about the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
from report import machine_info
from timing import settle_allocator

from pyfused import memory


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the headline cases")
    # Raised when Inductor is imported.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
    config.option.benchmark_quiet = True  # its table contains only pyfused's times
    config.option.randomly_reorganize = False  # both modes of a case share arguments
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compiler processes while timing
    if os.environ.get("BENCHMARK_KEEP") == "1":
        memory.keep()
    settle_allocator()


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine_info()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Removes bulky data and the names of hosts and folders."""
    output_json["commit_info"] = {key: output_json["commit_info"][key] for key in ("id", "dirty")}
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"], benchmark["params"], benchmark["param"]
