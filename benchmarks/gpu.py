"""Time pyfused and its peers on a GPU, by turns, beside a copy of as many bytes.

    python benchmarks/gpu.py gpu.json               # all cases, for as long as --seconds
    python benchmarks/gpu.py gpu.json --match mse
    python benchmarks/report.py gpu.json            # a table and a picture

The bytes are those that a call has to move: logits read once, the gradient that is wanted written
once. The copy reads half of them and writes the other half; its time divided by pyfused's is the
share of the copy's bandwidth that was reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from cases import (
    ACTIVATIONS,
    BF16,
    F32,
    MODES,
    POINTWISE,
    Arguments,
    Case,
    Compiled,
    M,
    assert_right,
    draw,
    step,
)
from measure import Peer, Row, Step, ratios
from torch.nn import functional as F

import pyfused.functional
from pyfused.__main__ import installed

QUERY = "--query-gpu=driver_version"
SECONDS, WARM_UP, FEWEST, MOST = 0.4, 3, 9, 100
SMALL = 1 << 20  # elements below which the call itself is what takes time
CALLS = 100  # of a small call between two looks at the clock
VOCABULARIES = (
    (262_144, 1024),
    (65_536, 4096),
    (16_384, 16_384),
    (8192, 32_000),
    (2048, 128_256),
    (1024, 262_144),
)
TINY = (Case("cross_entropy", (8, 10)), Case("mse_loss", (100,)), Case("relu", (100,), BF16))
CASES = (
    *(Case("cross_entropy", s, t, headline=True) for s in VOCABULARIES for t in (BF16, F32)),
    *(
        Case(op, (64 * M,), t, headline=True)
        for op in (*POINTWISE, *ACTIVATIONS)
        for t in (BF16, F32)
    ),
    Case("cross_entropy", (8, 10)),
    Case("mse_loss", (100,)),
    Case("relu", (100,)),
    Case("cross_entropy", (8192, 32_000), BF16, weight=True, smoothing=0.1),
    Case("cross_entropy", (8192, 32_000), BF16, probabilities=True),
    Case("cross_entropy", (8192, 32_000), BF16, reduction="none"),
    Case("cross_entropy", (8192, 32_000), BF16, ignored=0.5),
    Case("cross_entropy", (16, 262_144), BF16),
    Case("cross_entropy", (8192, 50_257), BF16),
    Case("cross_entropy", (1 << 22, 10)),
    Case("cross_entropy", (16, 21, 512, 512)),
    Case("cross_entropy", (1024, 1000)),
    *(Case(op, (M,)) for op in (*POINTWISE, *ACTIVATIONS)),
)


# ---- who is timed -------------------------------------------------------------------------------


def peers_of(case: Case) -> dict[str, Any]:
    """torch as it comes and compiled, and where it takes the case Liger."""
    peers: dict[str, Any] = {"torch": F, "torch.compile": Compiled()}
    plain = case.op == "cross_entropy" and len(case.shape) == 2 and not case.probabilities
    if plain and case.reduction == "mean":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            peers["liger"] = SimpleNamespace(cross_entropy=liger_cross_entropy)
    return peers


def copy_step(case: Case, mode: str, device: str) -> Step:
    size = case.traffic(mode) * case.elements * case.dtype.itemsize
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy


# ---- timing -------------------------------------------------------------------------------------


AHEAD = 1_000_000  # cycles, half a millisecond, in which the launches of a call are queued


class Clock:
    """Milliseconds of a call: by events on a GPU, after its L2 was overwritten."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        if self.gpu:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def of(self, call: Step) -> float:
        if not self.gpu:
            return self.of_many(call, 1)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)  # or the GPU would idle between launches, and that be timed
        self.flushed.zero_()
        started.record()
        call()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended)

    def of_many(self, call: Step, calls: int) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return 1e3 * (time.perf_counter() - started) / calls

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def peak_gradients(call: Step, arguments: Arguments) -> float | None:
    """The most memory that a first call takes beyond what was there, in gradients of the input."""
    if not arguments.input.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    size = arguments.input.numel() * arguments.input.element_size()
    return (torch.cuda.max_memory_allocated() - before) / size


def measure(case: Case, mode: str, arguments: Arguments, clock: Clock) -> Row:
    device = arguments.input.device.type
    ours = step(pyfused.functional, case, arguments, mode)
    steps: dict[str, Step] = {}
    for name, operators in peers_of(case).items():
        own = arguments
        if name == "liger":  # it writes the gradient over its logits
            own = replace(own, input=own.input.detach().clone().requires_grad_())
        steps[name] = step(operators, case, own, mode)
    small = arguments.input.numel() < SMALL
    if not small:
        steps["copy"] = copy_step(case, mode, device)
    calls = CALLS if small else 1

    def once(call: Step) -> float:
        return clock.of_many(call, calls) if small else clock.of(call)

    for call in (*steps.values(), ours):
        for _ in range(WARM_UP):
            once(call)
    times: dict[str, list[float]] = {name: [] for name in ("pyfused", *steps)}
    until = time.perf_counter() + SECONDS * (1 + len(steps))
    while len(times["pyfused"]) < MOST:
        for name, call in (*steps.items(), ("pyfused", ours)):
            times[name].append(once(call))
        if len(times["pyfused"]) >= FEWEST and time.perf_counter() > until:
            break
    mine = times.pop("pyfused")
    return Row(
        case=case.name,
        op=case.op,
        mode=mode,
        headline=case.headline,
        curve=case.curve,
        elements=case.elements,
        classes=case.shape[1] if case.op == "cross_entropy" else 1,
        rounds=len(mine),
        calls_per_round=calls,
        peers={n: Peer(median(t), median(mine), ratios(t, mine)) for n, t in times.items()},
        peak_gradients=peak_gradients(step(pyfused.functional, case, arguments, mode), arguments),
    )


# ---- the run ------------------------------------------------------------------------------------


def driver() -> str:
    """The GPU driver's version, as its own tool tells it."""
    amd = torch.version.hip is not None
    command = (
        ["rocm-smi", "--showdriverversion"]
        if amd
        else ["nvidia-smi", QUERY, "--format=csv,noheader"]
    )
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        told = subprocess.run(command, check=True, text=True, capture_output=True).stdout
        if found := re.search(r"\d+(\.\d+)+", told):
            return found.group()
    return "unknown"


def machine_info(device: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "liger": installed("liger-kernel"),
        "gpu": "none",
        "driver": "none",
    }
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
        info["driver"] = driver()
    return info


def run(cases: Sequence[Case], device: str, seconds: float, save: Callable[[Any], None]) -> None:
    """Measures case by case, and saves after each one, so that nothing is lost to a failure."""
    until = time.perf_counter() + seconds
    found: dict[str, Any] = {
        "machine_info": machine_info(device),
        "datetime": datetime.now(timezone.utc).isoformat(),
        "benchmarks": [],
        "memory": [],
        "left_out": [],
    }
    clock = Clock(device)
    for case in cases:
        if time.perf_counter() > until:
            found["left_out"].append(f"{case.name}: out of time")
            continue
        try:
            torch.compiler.reset()
            arguments = draw(case, device)
            assert_right(case, arguments)
            for mode in MODES if case.headline else MODES[1:]:
                row = measure(case, mode, arguments, clock)
                found["benchmarks"].append({"extra_info": asdict(row)})
                print(f"{row.case}, {mode}: {row.peers['torch'].pyfused_ms:.4g} ms", flush=True)
        except Exception as error:  # the other cases are still worth their time
            found["left_out"].append(f"{case.name}: {type(error).__name__}: {error}"[:500])
        save(found)
    save(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="where to write what was found")
    parser.add_argument("--seconds", type=float, default=240, help="start no case after these")
    parser.add_argument("--match", default="", help="only cases whose name holds these words")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to rehearse"
    )
    parser.add_argument("--tiny", action="store_true", help="cases of microseconds, as a rehearsal")
    arguments = parser.parse_args()

    cases = [c for c in (TINY if arguments.tiny else CASES) if arguments.match in c.name]

    def save(found: Any) -> None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    run(cases, arguments.device, arguments.seconds, save)


if __name__ == "__main__":
    main()
