"""`python -m pyfused`, which prints the information for a bug report."""

from __future__ import annotations

import platform
import re

import pytest
import torch
from processes import python

import pyfused
from pyfused import __main__ as main
from pyfused.backends import cpu
from pyfused.ops.operators import OPERATORS


def test_the_report_has_all_entries() -> None:
    code = "import runpy, sys; sys.argv = ['']; runpy.run_module('pyfused', run_name='__main__')"
    isa = cpu.supported[0]
    done = python(code, PYFUSED_CPU_CAPABILITY=isa)
    assert (done.returncode, done.stderr) == (0, "")
    report = {line[:24].strip(): line[24:] for line in done.stdout.splitlines()}
    assert report["pyfused"] == pyfused.__version__
    assert report["python"] == platform.python_version()
    assert report["torch"].startswith(f"{torch.__version__}, ")
    assert re.fullmatch(r"(GCC|.*(Clang|LLVM)) \d+\.\d+.*|MSVC", report["compiler"])
    assert report["ISAs built"] == ", ".join(cpu.BUILT)
    assert report["ISAs supported"] == ", ".join(cpu.supported)
    assert report["PYFUSED_CPU_CAPABILITY"] == report["ISA chosen"] == isa
    threads = report["torch"].partition(", ")[2]
    assert report["thread runtime"].endswith(f", {threads}")  # torch's runtime
    assert report["operators"] == ", ".join(OPERATORS)
    assert report["kernels"].startswith("cpu: C++ kernels")


def test_the_report_states_that_kernels_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.native, "runtime_file", "")
    assert main.thread_runtime() == "none loaded: kernels run on one thread"
