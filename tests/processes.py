"""Runs Python code or a function in processes of their own, which have imported torch already."""

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

SECONDS = 600  # after which a process hangs, on however busy a machine
# Each process is a fork of one that has imported torch, and nothing of pyfused.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def python(code: str, **environment: str) -> CompletedProcess[str]:
    """What `python -c code` does, with the environment variables given."""
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
    """Lets the process map no more than so many bytes more."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def in_processes(function: Callable[..., None], size: int, *arguments: Any) -> list[bytes]:
    """The bytes that ``function(rank, *arguments, pipe)`` sends, of each rank."""
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    children = [
        _context.Process(target=function, args=(rank, *arguments, pipes[rank][1]))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for _, sender in pipes:
        sender.close()  # so that a child that dies is seen as the end of the file
    try:
        assert all(receiver.poll(SECONDS) for receiver, _ in pipes), "a process hangs"
        return [receiver.recv_bytes() for receiver, _ in pipes]
    finally:
        for child in children:
            child.terminate()
            child.join()
