"""Reads what `nvdisasm`, which comes with Triton, writes of NVIDIA's machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from machine_code import Code, Instruction
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
    "memory": "LDG LDGSTS LD STG ST LDL STL LDS STS ATOMS SHFL REDUX ATOMG RED",
    "alu": "FMNMX FSETP FSEL FSET FCHK ISETP IADD3 LOP3 SEL PRMT SHF LEA IABS VIADD VIMNMX IMNMX "
    "PLOP3 P2R R2P MOV SGXT BMSK VIADDMNMX F2FP IADD HSETP2 HMNMX2 FLO POPC I2FP CS2R",
}
UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
KINDS = {
    "LDG": "load",
    "LDGSTS": "load",  # to shared memory
    "DEPBAR": "wait",  # for the same
    "STG": "store",
    "LDS": "shared",
    "LDL": "shared",
    "SHFL": "slow",
    "MUFU": "slow",
    "ATOMG": "count",
    "BAR": "barrier",
    "UCGABAR_WAIT": "cluster",
    "MEMBAR": "fence",
    "BRA": "branch",
    "EXIT": "end",
}
DELAYS = {"LDS": 30, "LDL": 30, "SHFL": 24, "MUFU": 18, "ATOMG": 700}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+):")
REGISTER = re.compile(r"\bR(\d+)\b")


def read(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file]
        text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return parse(text)


def parse(text: str) -> Code:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif told := INSTRUCTION.match(line):
            found.append(instruction(*told.groups()))
    return Code.of(found, labels)


def instruction(opcode: str, rest: str = "") -> Instruction:
    name, unit = opcode.split(".")[0], UNIT.get(opcode.split(".")[0], "")
    wide = re.search(r"\.(?:[US]?(8|16)|(64)|(128))(?:\.|$)", opcode)
    width = int(next(filter(None, wide.groups()))) // 8 if wide else 4
    kind = "cluster" if "TRYWAIT" in opcode else KINDS.get(name, "")  # of barriers in memory
    target = re.search(r"`\((\.L\w+)\)", rest) if name == "BRA" else None
    groups = re.search(r"0x([0-9a-f]+)$", rest) if kind == "wait" else None
    written, read = registers(name, rest, width)
    return Instruction(
        name,
        kind,
        unit,
        CYCLES.get(unit, 0),
        issued=name not in ("NOP", "EXIT"),
        width=width,
        delay=DELAYS.get(name, 0),
        target=target[1] if target else "",
        written=frozenset(written),
        read=frozenset(read),
        left={"load": int(groups[1], 16)} if groups else {},
    )


def registers(name: str, rest: str, width: int) -> tuple[set[int], set[int]]:
    """Those that are written, and those that are read."""
    first, *others = rest.split(",") if rest else [""]
    several = 1 if width < 4 else width // 4
    if name in ("STG", "STL", "STS", "BAR", "BRA") or "[" in first:
        data = [int(r) for r in REGISTER.findall(others[-1] if others else "")]
        read = {r + i for r in data for i in range(several)}
        return set(), read | {int(r) for r in REGISTER.findall(rest)}
    if name == "SHFL":  # its first operand is a predicate
        first, *others = others
    if name not in ("LDG", "LDL", "LDS"):
        several = 1
    written = {int(r) + i for r in REGISTER.findall(first) for i in range(several)}
    return written, {int(r) for part in others for r in REGISTER.findall(part)}
