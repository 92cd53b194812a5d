"""Configures pytest-benchmark's output: speed-up ratios, and facts about the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
from report import Found, machine_info, markdown
from timing import settle_allocator

from pyfused import memory

MEMORY = pytest.StashKey[list[Found]]()


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


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds memory figures; removes bulky data and the names of hosts and folders."""
    output_json["memory"] = config.stash.get(MEMORY, [])
    output_json["commit_info"] = {key: output_json["commit_info"][key] for key in ("id", "dirty")}
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"], benchmark["params"], benchmark["param"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    properties = [dict(r.user_properties) for r in terminalreporter.getreports("passed")]
    if rows := [found["row"] for found in properties if "row" in found]:
        terminalreporter.section("torch's time divided by pyfused's")
        terminalreporter.write_line(markdown(rows))
    for found in config.stash.get(MEMORY, []):
        named = f"{found['case']}, {found['implementation']}"
        terminalreporter.write_line(f"{named}: {found['bytes'] / 2**20:,.0f} MiB at the peak")
