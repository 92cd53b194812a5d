"""Runs a function in several processes, as a test of torch.distributed needs it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

SECONDS = 120  # far beyond what it takes, so that only a hang is cut short


def in_processes(function: Callable[..., None], size: int, *arguments: Any) -> list[bytes]:
    """The bytes that ``function(rank, *arguments, pipe)`` sends, of each rank."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    children = [
        context.Process(target=function, args=(rank, *arguments, pipes[rank][1]))
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
