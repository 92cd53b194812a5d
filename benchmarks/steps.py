"""Times training steps of the examples' GPT: eager torch, with huge pages, compiled, and pyfused.

Each variant runs in its own process; they take steps in turn. With --cpu, the CPU time on one
thread is measured, which other load on the machine affects little.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from statistics import median

import report
import torch
from cases import interleaved, ratios
from pairs import Worker
from report import ROOT, spread, tabulated
from torch import Tensor

import pyfused.functional

sys.path.append(str(ROOT / "examples"))

import gpt

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# The library, whether head and loss are fused, whether the step is compiled, and the environment.
WAYS = {
    "torch": (("torch", False, False), {}),
    "torch, huge pages": (("torch", False, False), HUGE_PAGES),
    "torch.compile": (("torch", False, True), {}),
    "pyfused": (("pyfused", False, False), {}),
    "pyfused, linear_cross_entropy": (("pyfused", True, False), {}),
    "the same, compiled": (("pyfused", True, True), {}),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DTYPES = ("float32", "bfloat16")
WARM_UP = 3


def work(library: str, linear: bool, compiled: bool, dtype: str, cpu: bool) -> None:
    """Takes a training step for each line read, and prints its time in seconds."""
    clock = time.process_time if cpu else time.perf_counter
    functional = torch.nn.functional if library == "torch" else pyfused.functional
    torch.manual_seed(0)
    model = gpt.GPT(gpt.VOCABULARY, relu=functional.relu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(gpt.VOCABULARY, (gpt.BATCH, gpt.CONTEXT + 1))

    def loss_of(input: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            features = model(input).flatten(0, 1)
            return gpt.loss_of(model, features, target.flatten(), functional, linear)

    forward = torch.compile(loss_of) if compiled else loss_of
    for _ in sys.stdin:
        started = clock()
        optimizer.zero_grad()
        forward(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        print(clock() - started, flush=True)


def measure(dtype: str, rounds: int, cpu: bool) -> dict[str, list[float]]:
    threads = ONE_THREAD if cpu else {}
    workers = [
        Worker(__file__, json.dumps([*arguments, dtype, cpu]), **variables, **threads)
        for arguments, variables in WAYS.values()
    ]
    timers = [worker.ask for worker in workers]
    interleaved(timers, WARM_UP, 1)
    times = interleaved(timers, rounds, 1)
    for worker in workers:
        worker.process.communicate()
    return dict(zip(WAYS, times, strict=True))


def steps(options: Namespace) -> None:
    found = {dtype: measure(dtype, options.rounds, options.cpu) for dtype in DTYPES}
    rows = [
        [way, *(spread(ratios(times["torch"], times[way])) for times in found.values())]
        for way in WAYS
    ]
    shares = ", ".join(f"{dtype} {median(times['torch']):.0f} ms" for dtype, times in found.items())
    print(report.machine(report.measured(report.machine_info())))
    print(f"A step with eager torch: {shares}")
    print(tabulated(["times as fast as eager torch", *DTYPES], rows, names=1))


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
