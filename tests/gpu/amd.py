"""Reads the assembly that Triton's compiler writes for AMD's accelerators, gfx942.

Cycles, of 64 lanes on a quarter of a compute unit: AMD CDNA 3 white paper and "MI300" instruction
set guide. Vectors are 16 lanes wide, transcendental functions and products of integers 4; a compute
unit's scalar unit, its 64 bytes a cycle of L1 and its 128 of shared memory serve four quarters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from machine_code import Code, Instruction

INSTRUCTION = re.compile(r"^\t([a-z]\w+)(?:[ \t]+([^;\n]*))?")
LABEL = re.compile(r"^(\.LBB\w+):")
QUARTER_RATE = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos|mul_lo|mul_hi|mad_u64)_")
GLOBAL = re.compile(
    r"(?:buffer|global|flat)_(load|store|atomic)(?:_(?:[us]?(byte|short)|dword(?:x(\d))?))?"
)
KINDS = {"s_barrier": "barrier", "s_endpgm": "end", "s_waitcnt": "wait", "buffer_wbl2": "fence"}
COUNTERS = {"vmcnt": "load", "lgkmcnt": "shared"}
# Cycles that are assumed until a result is there, of shared memory, the scalar cache and L2.
SHARED, SCALAR, COUNTED = 64, 200, 1500


def parse(text: str) -> Code:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif told := INSTRUCTION.match(line):
            found.append(instruction(told[1], (told[2] or "").strip()))
    return Code.of(found, labels)


def instruction(name: str, rest: str = "") -> Instruction:
    if access := GLOBAL.match(name):
        small = {"byte": 1, "short": 2}.get(access[2])
        width = small or 4 * int(access[3] or 1)
        kind, delay = ("count", COUNTED) if access[1] == "atomic" else (access[1], 0)
        return Instruction(name, kind, "memory", max(16, 4 * width), width=width, delay=delay)
    if name.startswith("ds_"):
        width = 8 if name.endswith("b64") else 16 if name.endswith("b128") else 4
        return Instruction(name, "shared", "shared", 2 * width, width=width, delay=SHARED)
    if name.startswith("s_load"):
        return Instruction(name, "shared", "scalar", 4, delay=SCALAR)
    if name.startswith("v_"):
        return Instruction(name, "", "vector", 16 if QUARTER_RATE.match(name) else 4)
    if name == "s_nop":
        return Instruction(name, issued=int(rest, 0) + 1)
    if name.startswith(("s_branch", "s_cbranch")):
        return Instruction(name, "branch", "branch", 4, target=rest)
    kind = KINDS.get(name, "")
    if kind:
        return Instruction(name, kind, issued=kind != "end", left=allowed(rest))
    return Instruction(name, "", "scalar", 4)


def allowed(rest: str) -> Mapping[str, int]:
    """How many accesses of each kind may still be under way."""
    return {COUNTERS[c]: int(n) for c, n in re.findall(r"(\w+)\((\d+)\)", rest) if c in COUNTERS}
