"""Predict, from its machine code, how fast each GPU kernel is: a model, not a measurement.

    python tests/gpu/model.py             # what `make gpu-model` runs: a table in docs/gpu.md
    python tests/gpu/model.py --gpu H100 --match "bfloat16 1000"
    python tests/gpu/model.py --measured gpu.json    # beside what benchmarks/gpu.py found

One multiprocessor is followed: its resident programs, warp by warp through the instructions that
`nvidia.py` and `amd.py` read, queueing for issue slots, units, L2 and memory. One constant is
fitted, a GPU's efficiency, to times that were published for Liger's cross-entropy on an H100.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ahead
import amd
import nvidia
import peers
import torch
from machine_code import Code, Instruction, demand
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu as benchmarked  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
START, END = "<!-- model -->\n", "<!-- end of model -->"


class Gpu(NamedTuple):
    """What the model knows of a GPU; bandwidth is that of a copy where one was published."""

    target: str
    multiprocessors: int
    bytes_a_ns: float  # of memory
    ghz: float
    l2_mb: float  # the last cache in front of memory
    registers: int = 65_536
    warps: int = 64
    shared: int = 227 << 10
    efficiency: float = 0.8  # of the issue slots that busy warps fill
    # Instructions a cycle of a warp by itself, whose results wait for one another.
    alone: float = 0.4
    memory_ns: float = 600
    l2_ns: float = 220
    l2_bytes_a_ns: float = 5500

    @property
    def lanes(self) -> int:
        """Of a warp."""
        return int(ahead.TARGETS[self.target].warp_size)

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """How many programs a multiprocessor has room for, whose quarters have registers each."""
        each = -(-registers // 8) * 8 * self.lanes
        fit = min(self.warps // 4, self.registers // 4 // each) * 4
        return max(1, min(fit // warps, 32, self.shared // (shared + 1024)))


# The makers' data sheets and architecture white papers; memory at nine tenths of its peak, as
# copies reach, clocks at what full load leaves. AMD's memory is what its acceptance test asks of a
# copy, its last cache what Chips and Cheese measured.
GPUS = {
    "H200": Gpu("sm_90", 132, 4300, 1.755, 50),
    "H100": Gpu("sm_90", 132, 3010, 1.755, 50),
    "A100": Gpu("sm_80", 108, 1800, 1.41, 40, shared=163 << 10),
    "B200": Gpu("sm_100", 148, 7200, 1.85, 126),
    "MI300X": Gpu(
        "gfx942",
        304,
        4180,
        1.9,
        256,
        registers=131_072,
        warps=32,
        shared=64 << 10,
        alone=0.25,
        memory_ns=800,
        l2_ns=300,
        l2_bytes_a_ns=11_900,
    ),
}
START_NS, BARRIER_NS = 300, 12
CHUNK = 24  # instructions until another warp's turn
# Cycles that are assumed of a barrier of a cluster beyond a program's, and until stores are there.
CLUSTER, DRAINED = 600, 600


class Step(NamedTuple):
    """What a warp does next: work, load, store, await a load, or a barrier."""

    kind: str
    cycles: Mapping[str, float] = {}
    bytes: float = 0.0
    hits: float = 0.0  # the share that L2 has
    load: int = 0


@dataclass(frozen=True)
class Prediction:
    """Of the main kernel of a case."""

    case: str
    instructions: float  # an element
    registers: int
    spills: int
    warps: int  # of a program
    resident: int  # programs on a multiprocessor
    reads: int  # of each element
    launches: int
    share: float  # of a copy's speed
    limit: str


def hits(footprint_mb: float, gpu: Gpu) -> float:
    """The share of a second read that L2 still has, of so much read meanwhile."""
    return max(0.0, min(1.0, 2 * (1 - footprint_mb / gpu.l2_mb)))


@dataclass
class UnderWay:
    """An access whose result is not there yet."""

    kind: str
    number: int
    delay: int
    registers: set[int]  # that it will be in


class Flight:
    """What a warp has under way, in order."""

    def __init__(self) -> None:
        self.number = 0
        self.all: list[UnderWay] = []

    def begin(self, instruction: Instruction) -> int:
        self.number += 1
        kind = "shared" if instruction.kind == "shared" else "load"
        written = set(instruction.written)
        self.all.append(UnderWay(kind, self.number, instruction.delay, written))
        return self.number

    def end(self, instruction: Instruction) -> list[UnderWay]:
        """Those that an instruction waits for."""
        if instruction.kind == "wait":
            awaited = []
            for kind, left in instruction.left.items():
                alike = [each for each in self.all if each.kind == kind]
                awaited += alike[: max(0, len(alike) - left)]
        else:
            awaited = [each for each in self.all if each.registers & instruction.read]
            for each in self.all:
                each.registers -= instruction.written
        self.all = [each for each in self.all if each not in awaited]
        return awaited


def warp(
    code: Code, turns: dict[int, int], scale: float, second: float, lanes: int
) -> Iterator[Step]:
    """Its steps.

    Args:
        turns: How often each loop is taken, by its first instruction.
        scale: What part of a tile is within the row.
        second: The share of a second loop's loads that L2 has.
    """
    loops = code.loading_loops()
    again = range(loops[1][0], loops[1][1] + 1) if len(loops) > 1 else range(0)
    widths = {first: code.row_width(first, last) for first, last in loops or [code.whole()]}
    loop_of = {i: first for first, last in loops or [code.whole()] for i in range(first, last + 1)}
    flight = Flight()
    block: list[Instruction] = []
    stored = False

    def work() -> Iterator[Step]:
        for start in range(0, len(block), CHUNK):
            yield Step("work", demand(block[start : start + CHUNK]))
        block.clear()

    for place in code.steps(turns):
        instruction = code.instructions[place]
        for each in flight.end(instruction):
            yield from work()
            if each.delay:
                yield Step("delay", bytes=each.delay)
            else:
                yield Step("await", load=each.number)
        if instruction.kind in ("barrier", "cluster"):
            yield from work()
            yield Step("barrier")
            if instruction.kind == "cluster":
                yield Step("delay", bytes=CLUSTER)
            continue
        if instruction.kind == "fence" and stored:
            yield from work()
            yield Step("delay", bytes=DRAINED)
            stored = False
            continue
        block.append(instruction)
        if instruction.kind in ("load", "store", "shared", "slow", "count"):
            number = flight.begin(instruction)
        if instruction.kind in ("load", "store"):
            yield from work()
            row = instruction.width == widths.get(loop_of.get(place, -1))
            size = lanes * instruction.width * scale
            if instruction.kind == "store":
                yield Step("store", bytes=size if row else 0.0, load=number)
                stored = True
            else:
                hit = 1.0 if not row else second * (place in again)
                yield Step("load", bytes=size if row else 32.0, hits=hit, load=number)
    yield from work()


def run(steps: Sequence[Step], gpu: Gpu, warps: int, resident: int, programs: int) -> float:
    """Nanoseconds that a multiprocessor takes for so many programs."""
    bandwidth, l2_bandwidth = (b / gpu.multiprocessors for b in (gpu.bytes_a_ns, gpu.l2_bytes_a_ns))
    free: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(4)]
    memory = l2 = end = 0.0
    events: list[tuple[float, int, int, int]] = []
    arrivals: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
    left = dict.fromkeys(range(programs), warps)
    started = min(resident, programs)
    for program in range(started):
        events += [(START_NS + 40.0 * program, program, w, 0) for w in range(warps)]
    heapq.heapify(events)
    while events:
        now, program, w, place = heapq.heappop(events)
        if place == len(steps):
            end, left[program] = max(end, now), left[program] - 1
            if not left[program] and started < programs:
                for each in range(warps):
                    heapq.heappush(events, (now + START_NS, started, each, 0))
                started += 1
            continue
        step = steps[place]
        if step.kind == "work":
            then = now + step.cycles["issue"] / gpu.ghz / gpu.alone
            units = free[(program + w) % 4]
            for unit, cycles in step.cycles.items():
                units[unit] = max(now, units[unit]) + cycles / gpu.ghz / gpu.efficiency
                then = max(then, units[unit])
            now = then
        elif step.kind == "load":
            l2 = max(l2, now) + step.bytes / l2_bandwidth
            missed = step.bytes * (1 - step.hits)
            memory = max(memory, now) + missed / bandwidth
            arrival = memory + gpu.memory_ns if missed else l2 + gpu.l2_ns
            arrivals[program, w][step.load] = arrival
        elif step.kind == "store":
            memory = max(memory, now) + step.bytes / bandwidth
            arrivals[program, w][step.load] = memory + gpu.l2_ns
        elif step.kind == "await":
            now = max(now, arrivals[program, w].get(step.load, now))
        elif step.kind == "delay":
            now += step.bytes / gpu.ghz
        else:
            there = waiting[program]
            there.append((w, place))
            if len(there) < warps:
                continue
            for other, at in there:
                heapq.heappush(events, (now + BARRIER_NS, program, other, at + 1))
            there.clear()
            continue
        heapq.heappush(events, (now, program, w, place + 1))
    return max(end, memory)


class Traffic(NamedTuple):
    """What a case has to move at least, in bytes, and of how many elements."""

    elements: int
    read: int
    written: int


def predict(case: ahead.Case, traffic: Traffic, gpu: Gpu) -> Prediction:
    """The kernel that takes longest, with the launches of the whole call."""
    launched = launches_of(case, gpu.target, gpu.multiprocessors)
    main = [each for each in launched if each.name != "count_kernel"]
    found = [_predict(case, each, traffic, gpu, len(launched)) for each in main]
    return min(found, key=lambda p: p.share)


class Launched(NamedTuple):
    """A kernel that a case launches, and what its compilers made of it."""

    name: str
    code: Code
    used: dict[str, int]
    metadata: Any
    programs: int
    turns: int  # of each program, from block to block


def code_of(kernel: Any) -> Code:
    if "amdgcn" in kernel.asm:
        return amd.parse(kernel.asm["amdgcn"])
    return nvidia.read(kernel.asm["cubin"])


@cache
def launches_of(case: ahead.Case, target: str, multiprocessors: int) -> list[Launched]:
    recorder = ahead.Recorder(ahead.TARGETS[target], multiprocessors)
    with recorder as launched:
        case.run()
    return [
        Launched(name, code_of(kernel), ahead.used_by(kernel, 128), kernel.metadata, *grid)
        for (name, kernel), *grid in zip(launched, recorder.programs, recorder.turns, strict=True)
    ]


def _predict(
    case: ahead.Case, launched: Launched, traffic: Traffic, gpu: Gpu, launches: int
) -> Prediction:
    code, used, metadata = launched.code, launched.used, launched.metadata
    warps, programs = metadata.num_warps, launched.programs * metadata.num_ctas
    loops, share = code.loading_loops(), traffic.read / programs
    lanes = gpu.lanes * warps
    turns, covered = {}, 0
    outer = code.around(loops) if loops else []
    times = launched.turns if outer else 1
    turns |= {first: times for first, _ in outer}
    for first, last in loops:
        body = code.loaded(first, last) * lanes
        turns[first] = math.ceil(share / times / body)
        covered = times * turns[first] * body
    if not loops:
        covered = code.loaded(*code.whole()) * lanes
    resident = gpu.resident(warps, used["registers"], metadata.shared)
    footprint = min(resident * gpu.multiprocessors, programs) * share / times / 1e6
    again = hits(footprint, gpu)
    steps = list(warp(code, turns, min(1.0, share / covered), again, gpu.lanes))
    each = programs / gpu.multiprocessors
    some = max(1, min(6 * resident, round(each)))
    time = run(steps, gpu, warps, resident, some)
    if some >= 4 * resident:
        half = some // 2
        rate = (time - run(steps, gpu, warps, resident, half)) / (some - half)
        time += rate * (each - some)
    else:
        time *= max(1.0, each / some)
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.cycles)
    scale = warps * programs / gpu.multiprocessors / 4 / gpu.ghz / gpu.efficiency
    missed = traffic.read * (1 + (1 - again if len(loops) > 1 else 0)) + traffic.written
    bounds = {unit: cycles * scale for unit, cycles in total.items()}
    bounds["memory"] = missed / gpu.bytes_a_ns
    limit = max(bounds, key=lambda unit: bounds[unit])
    if bounds[limit] < 0.8 * time:
        limit = f"{resident} programs in flight"
    copy = (traffic.read + traffic.written) / gpu.bytes_a_ns
    return Prediction(
        case=case.name,
        instructions=total["issue"] * lanes * programs / traffic.elements,
        registers=used["registers"],
        spills=used["spills"],
        warps=warps,
        resident=resident,
        reads=max(1, len(loops)),
        launches=launches,
        share=min(1.0, copy / time),
        limit=limit,
    )


# ---- the cases -----------------------------------------------------------------------------------

ELEMENTS = 1 << 28
CLASSES = (1000, 1024, 4096, 8192, 16_384, 32_000, 50_257, 50_304, 128_256, 262_144)
SIDE_BY_SIDE = ((16, 21, 512, 512), (8, 150, 256, 256))


def cases() -> Iterator[tuple[ahead.Case, Traffic]]:
    for dtype in (torch.bfloat16, torch.float32):
        shapes = [(ELEMENTS // classes, classes) for classes in (*CLASSES, 10)]
        kinds = [(shape, "") for shape in (*shapes, *SIDE_BY_SIDE)]
        kinds += [((ELEMENTS // c, c), "smoothing") for c in (4096, 32_000, 128_256)]
        kinds += [((ELEMENTS // c, c), "probabilities") for c in (1000, 4096, 32_000, 128_256)]
        kinds += [((ELEMENTS // c, c), "forward") for c in (4096, 32_000, 128_256)]
        for shape, kind in kinds:
            n = math.prod(shape)
            size = n * dtype.itemsize
            both = 2 if kind == "probabilities" else 1  # which have a gradient, too
            traffic = Traffic(n, both * size, 0 if kind == "forward" else both * size)
            yield ahead.cross_entropy_case(shape, dtype, kind), traffic
    for dtype in (torch.bfloat16, torch.float32):
        yield from family_cases(dtype)


def family_cases(dtype: torch.dtype) -> Iterator[tuple[ahead.Case, Traffic]]:
    """A softmax, a loss and an activation of each kind of kernel."""
    kind, backend = str(dtype)[6:], ahead.backend
    n, size = ELEMENTS, ELEMENTS * dtype.itemsize
    for classes in (4096, 32_000):
        x = ahead.empty(dtype, ELEMENTS // classes, classes)
        name, moved = f"softmax {kind} {ELEMENTS // classes}x{classes}", x.numel() * dtype.itemsize
        forward = partial(backend.softmax, "softmax", x, 1)
        yield ahead.Case(name, dtype, forward), Traffic(x.numel(), moved, moved)
        backward = partial(backend.softmax_backward, "softmax", x, x, 1)
        yield ahead.Case(f"{name} backward", dtype, backward), Traffic(x.numel(), 2 * moved, moved)
    x, want = ahead.empty(dtype, ELEMENTS), ahead.Want(True, (True, False))
    losses = {"mse_loss": (), "smooth_l1_loss": (1.0,), "binary_cross_entropy_with_logits": ()}
    for loss, parameters in losses.items():
        arguments = loss, (x, x), parameters, None, "mean", float(n), want
        run = partial(backend.pointwise_loss, *arguments)
        yield ahead.Case(f"{loss} {kind}", dtype, run), Traffic(n, 2 * size, size)
    for activation in ("relu", "silu", "gelu", "tanh"):
        run = partial(backend.activation, activation, x)
        yield ahead.Case(f"{activation} {kind}", dtype, run), Traffic(n, size, size)


def peers_of(case: ahead.Case, traffic: Traffic, gpu: Gpu) -> list[str]:
    """Liger's and quack's share with the same rows, where they are installed and have them."""
    shape = re.fullmatch(r"cross_entropy \w+ (\d+)x(\d+)", case.name)
    if shape is None or gpu.target != "sm_90":
        return ["", ""]
    rows, classes = map(int, shape.groups())
    shares = ["", ""]
    if find_spec("liger_kernel"):
        shares[0] = f"{predict(peers.liger(rows, classes, case.dtype), traffic, gpu).share:.0%}"
    if find_spec("quack") and classes * case.dtype.itemsize % 4 == 0:  # else it does not compile
        shares[1] = f"{predict_quack(rows, classes, case, traffic, gpu).share:.0%}"
    return shares


def predict_quack(
    rows: int, classes: int, case: ahead.Case, traffic: Traffic, gpu: Gpu
) -> Prediction:
    kernel = peers.quack(rows, classes, case.dtype)
    metadata = SimpleNamespace(
        num_warps=kernel.warps, num_ctas=kernel.cluster, shared=kernel.shared
    )
    code, used = nvidia.read(kernel.cubin), ahead.usage(kernel.cubin)
    launched = Launched("quack", code, used, metadata, kernel.programs, 1)
    return _predict(case, launched, traffic, gpu, 1)


def table(found: Sequence[Prediction], others: Sequence[Sequence[str]]) -> str:
    head = "case", "instructions", "registers", "warps x programs", "reads", "launches", "share"
    lines = [
        "| " + " | ".join((*head, "Liger", "quack", "limited by")) + " |",
        "| --- |" + " ---: |" * (len(head) + 1) + " --- |",
    ]
    for p, shares in zip(found, others, strict=True):
        spills = f", {p.spills} bytes spilled" if p.spills else ""
        lines.append(
            f"| {p.case.removeprefix('cross_entropy ')} | {p.instructions:.1f} "
            f"| {p.registers}{spills} | {p.warps} x {p.resident} | {p.reads} | {p.launches} "
            f"| {p.share:.0%} | {' | '.join(shares)} | {p.limit} |"
        )
    return "\n".join(lines)


def overview(chosen: Sequence[tuple[ahead.Case, Traffic]]) -> str:
    """The share of a copy's speed on each GPU."""
    lines = ["| case | " + " | ".join(GPUS) + " |", "| --- |" + " ---: |" * len(GPUS)]
    for case, traffic in track(chosen, console=Console(stderr=True)):
        shares = (predict(case, traffic, gpu).share for gpu in GPUS.values())
        told = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {case.name.removeprefix('cross_entropy ')} | {told} |")
    return "\n".join(lines)


# ---- what was measured ---------------------------------------------------------------------------


Measured = tuple[ahead.Case, Traffic, float]  # and the share of a copy's speed


def read_measured(file: Path) -> tuple[Gpu, list[Measured]]:
    """Which GPU it was, and what benchmarks/gpu.py found of cross-entropy with its gradient."""
    found = json.loads(file.read_text(encoding="utf-8"))
    name = found["machine_info"]["gpu"]
    gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)
    if gpu is None:
        raise SystemExit(f"{file} is of {name!r}, expected one of {', '.join(GPUS)}")
    known = {case.name: case for case in benchmarked.CASES}
    measured = []
    for row in (benchmark["extra_info"] for benchmark in found["benchmarks"]):
        case = known.get(row["case"])
        if case is None or case.op != "cross_entropy" or row["mode"] != "forward+backward":
            continue
        if case.ignored or "copy" not in row["peers"]:
            continue
        options = {
            "weight": case.weight,
            "probabilities": case.probabilities,
            "smoothing": case.smoothing,
            "upstream": case.reduction == "none",
        }
        kind = " ".join(word for word, chosen in options.items() if chosen)
        size = case.elements * case.dtype.itemsize
        traffic = Traffic(case.elements, size * case.traffic("forward"), size)
        share = row["peers"]["copy"]["ratio"][1]
        measured.append((ahead.cross_entropy_case(case.shape, case.dtype, kind), traffic, share))
    return gpu, measured


def fit(measured: Sequence[Measured], gpu: Gpu) -> Gpu:
    """With the efficiency, of those in steps of 0.05, that comes closest to what was measured."""

    def error(gpu: Gpu) -> float:
        shares = [(predict(*each, gpu).share, share) for *each, share in measured]
        return sum(math.log(predicted / share) ** 2 for predicted, share in shares)

    return min((gpu._replace(efficiency=n / 20) for n in range(8, 21)), key=error)


def compare(measured: Sequence[Measured], gpu: Gpu) -> str:
    """Predicted beside measured, with the efficiency as it is and as it fits best."""
    fitted = fit(measured, gpu)
    columns = "measured", f"predicted ({gpu.efficiency})", f"fitted ({fitted.efficiency})"
    lines = ["| case | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for case, traffic, share in measured:
        shares = share, *(predict(case, traffic, each).share for each in (gpu, fitted))
        told = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {case.name.removeprefix('cross_entropy ')} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--match", help="only cases whose name holds these words; writes no page")
    parser.add_argument("--measured", type=Path, help="compare with that, and fit the efficiency")
    arguments = parser.parse_args()
    if arguments.measured is not None:
        gpu, measured = read_measured(arguments.measured)
        print(compare(measured, gpu))
        return
    gpu, words = GPUS[arguments.gpu], (arguments.match or "").split()
    chosen = [(c, traffic) for c, traffic in cases() if all(word in c.name for word in words)]
    found = [predict(*each, gpu) for each in track(chosen, console=Console(stderr=True))]
    text = table(found, [peers_of(*each, gpu) for each in chosen])
    if arguments.match is None and arguments.gpu == "H200":
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        after = rest.split(END)[1]
        text += f"\n\nThe share on other GPUs, too:\n\n{overview(chosen)}"
        PAGE.write_text(f"{before}{START}\n{text}\n\n{END}{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
