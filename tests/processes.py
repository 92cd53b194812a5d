"""Runs Python code or functions in new processes, which have imported torch already."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

SECONDS = 600  # the time limit of a process, generous for busy machines
# Processes are forked from a server that has imported torch, but not pyfused.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def python(code: str, **environment: str) -> CompletedProcess[str]:
    """Runs `python -c code` with additional environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        given = textwrap.dedent(code), {**os.environ, **environment}, folder
        child = _context.Process(target=_execute, args=given)
        child.start()
        try:
            child.join(SECONDS)
            assert child.exitcode is not None, "the process hangs"
        finally:
            child.kill()
        out, err = (Path(folder, name).read_text("utf-8") for name in ("out", "err"))
    return CompletedProcess(code, child.exitcode, out, err)


def process(*arguments: str, cwd: Any = None, **environment: str) -> CompletedProcess[str]:
    """Runs Python in a process that imports everything anew, with these variables."""
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=cwd,
        capture_output=True, text=True, check=False, timeout=3 * SECONDS,
    )  # fmt: skip


def _execute(code: str, environment: dict[str, str], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def left(size: int) -> Iterator[None]:
    """Limits the address space of this process to `size` more bytes."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def resident(key: str = "VmRSS") -> int:
    """Returns the bytes of this process in memory; VmHWM is their peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(key + r":\s+(\d+)", status)[1]) << 10


def run_checks(checks: Callable[[int], dict[Any, Any]], size: int) -> dict[Any, str]:
    """Runs ``checks(rank)`` in each rank of a gloo group; returns tracebacks of failed checks."""
    with tempfile.TemporaryDirectory() as folder, _context.Pool(size) as pool:
        given = [(rank, checks, size, folder) for rank in range(size)]
        found = pool.starmap_async(_run_checks, given, chunksize=1).get(SECONDS)
    failures: dict[Any, str] = {}
    for rank, of_rank in enumerate(found):
        for name, text in of_rank.items():
            failures[name] = f"{failures.get(name, '')}rank {rank}: {text}"
    return failures


def _run_checks(rank: int, checks: Any, size: int, folder: str) -> dict[Any, str]:
    import torch
    import torch.distributed as dist
    from conftest import fused_always

    torch.set_num_threads(1)
    store, wait = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    failures = {}
    with fused_always():
        for name, check in checks(rank).items():
            try:
                check()
            except Exception:  # noqa: PERF203
                failures[name] = traceback.format_exc()
    dist.barrier()
    dist.destroy_process_group()
    return failures
