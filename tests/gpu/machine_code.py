"""What NVIDIA's machine code makes a warp do: instructions by unit, loops, what they wait for.

`nvdisasm`, which comes with Triton, writes the text that is read here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs

# Cycles that a warp's instruction holds a unit of its quarter of a multiprocessor, 32 lanes over
# the unit's width: CUDA C++ Programming Guide, throughput of arithmetic instructions, 9.0.
CYCLES = {"alu": 2, "fma": 1, "imad": 2, "mufu": 8, "conversion": 8, "memory": 2, "fp64": 2}
UNITS = {
    "fma": "FADD FMUL FFMA",
    "imad": "IMAD HFMA2 HADD2 HMUL2",
    "mufu": "MUFU",
    "conversion": "F2I I2F F2F FRND I2I",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "memory": "LDG LD STG ST LDS STS ATOMS SHFL REDUX ATOMG RED",
    "alu": "FMNMX FSETP FSEL FSET FCHK ISETP IADD3 LOP3 SEL PRMT SHF LEA IABS VIADD VIMNMX IMNMX "
    "PLOP3 P2R R2P MOV SGXT BMSK VIADDMNMX F2FP IADD HSETP2 HMNMX2 FLO POPC I2FP CS2R",
}
UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
WAITS = {"LDS": 30, "SHFL": 24, "MUFU": 18, "ATOMG": 700}  # cycles until the result is there
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+):")
REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    rest: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes of a lane's access."""
        found = re.search(r"\.(?:[US]?(8|16)|(64)|(128))(?:\.|$)", self.opcode)
        return int(next(filter(None, found.groups()))) // 8 if found else 4

    def registers(self) -> tuple[set[int], set[int]]:
        """Those that are written, and those that are read."""
        first, *others = self.rest.split(",") if self.rest else [""]
        registers = 1 if self.width < 4 else self.width // 4
        if self.name in ("STG", "STS", "BAR", "BRA") or "[" in first:
            data = [int(r) for r in REGISTER.findall(others[-1] if others else "")]
            read = {r + i for r in data for i in range(registers)}
            return set(), read | {int(r) for r in REGISTER.findall(self.rest)}
        if self.name == "SHFL":  # its first operand is a predicate
            first, *others = others
        written = {int(r) + i for r in REGISTER.findall(first) for i in range(registers)}
        wide = self.name in ("LDG", "LDS")
        return (
            written if wide else {int(r) for r in REGISTER.findall(first)},
            {int(r) for part in others for r in REGISTER.findall(part)},
        )


@dataclass
class Code:
    """A kernel: its instructions, and its loops as first and last of them."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, kernel: Any) -> Code:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            command = [knobs.nvidia.nvdisasm.path, "-c", cubin]
            text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Code:
        found: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(found)
            elif instruction := INSTRUCTION.match(line):
                found.append(Instruction(*instruction.groups()))
        ends: dict[int, int] = {}
        counted = next((i for i, each in enumerate(found) if each.name == "ATOMG"), len(found))
        end = next((i for i in range(counted, len(found)) if found[i].name == "EXIT"), len(found))
        for place, instruction in enumerate(found[:end]):
            target = re.search(r"`\((\.L\w+)\)", instruction.rest)
            if instruction.name != "BRA" or target is None:
                continue
            start = labels.get(target[1], place + 1)
            if start == place:  # to itself: what stands behind a kernel's end
                end = place
                break
            if start < min(place, counted):  # what only the last program does is left out
                ends[start] = place
        return cls(found[:end], sorted(ends.items()))

    def loading_loops(self) -> list[tuple[int, int]]:
        """Those that read memory, the innermost."""
        loading = [
            (a, b)
            for a, b in self.loops
            if any(i.name == "LDG" for i in self.instructions[a : b + 1])
        ]
        return [
            (a, b) for a, b in loading if not any(a <= c and d < b for c, d in loading if c != a)
        ]

    def around(self, loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Loops that hold all of these, and more."""
        return [
            (a, b)
            for a, b in self.loops
            if (a, b) not in loops and all(a <= c and d <= b for c, d in loops)
        ]

    def whole(self) -> tuple[int, int]:
        return 0, len(self.instructions) - 1

    def row_width(self, first: int, last: int) -> int:
        """Bytes of a lane's load between two instructions, as wide as what most is loaded by."""
        loads: Counter[int] = Counter()
        for instruction in self.instructions[first : last + 1]:
            if instruction.name == "LDG":
                loads[instruction.width] += instruction.width
        return max(loads, key=lambda width: loads[width], default=0)

    def loaded(self, first: int, last: int) -> int:
        """Bytes that a lane loads there so."""
        width, instructions = self.row_width(first, last), self.instructions[first : last + 1]
        return sum(width for i in instructions if i.name == "LDG" and i.width == width)

    def steps(self, turns: dict[int, int]) -> list[int]:
        """A warp's instructions one after the other; each loop as often as is said of its first."""
        ends = {first: last for first, last in self.loops if first in turns}

        def between(place: int, end: int) -> list[int]:
            order: list[int] = []
            while place < end:
                last = ends.pop(place, None)
                if last is None:
                    order.append(place)
                    place += 1
                else:
                    order += between(place, last + 1) * turns[place]
                    place = last + 1
            return order

        return between(0, len(self.instructions))


def demand(steps: list[Instruction]) -> Counter[str]:
    """Cycles of each unit, and of ``issue``, that one warp takes."""
    cycles: Counter[str] = Counter()
    for instruction in steps:
        if instruction.name in ("NOP", "EXIT"):
            continue
        cycles["issue"] += 1
        if unit := UNIT.get(instruction.name):
            cycles[unit] += CYCLES[unit]
    return cycles
