"""Runs Python code or functions in new processes, which have imported torch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import textwrap
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


def in_processes(function: Callable[..., None], size: int, *arguments: Any) -> list[bytes]:
    """Runs ``function(rank, *arguments, pipe)`` in each rank; returns the bytes that they send."""
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    children = [
        _context.Process(target=function, args=(rank, *arguments, pipes[rank][1]))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for _, sender in pipes:
        sender.close()  # so that recv raises EOFError if a child dies
    try:
        assert all(receiver.poll(SECONDS) for receiver, _ in pipes), "a process hangs"
        return [receiver.recv_bytes() for receiver, _ in pipes]
    finally:
        for child in children:
            child.terminate()
            child.join()
