"""Other work on the same cores: what a machine is like that is not left alone.

    python benchmarks/load.py --seconds 60

Four processes for each core, as data loaders and compilers are: each computes for some milliseconds
and sleeps for some, of random lengths, so that now one core has more to do and now the other. Each
wants to run for half of the time, which is a load of two for each core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

PROCESSES_PER_CORE = 4
MEAN_SECONDS = 20e-3  # by the clock on the wall, of computing as of sleeping


def work() -> None:
    """Until the process that asked for it is gone."""
    draw, parent = random.Random(os.getpid()), os.getppid()
    while os.getppid() == parent:
        until = time.perf_counter() + draw.expovariate(1 / MEAN_SECONDS)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.expovariate(1 / MEAN_SECONDS))


@contextlib.contextmanager
def loaded(busy: bool = True) -> Iterator[None]:
    """Keeps the load for as long as the block runs, where asked to."""
    command = [sys.executable, __file__, "--worker"]
    count = PROCESSES_PER_CORE * (os.cpu_count() or 1) if busy else 0
    workers = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    with loaded():
        time.sleep(options.seconds)


if __name__ == "__main__":
    main()
