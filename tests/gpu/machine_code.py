"""What machine code makes a warp do: instructions by unit, loops, what they wait for.

`nvidia.py` and `amd.py` read the text of each maker's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One of a warp's.

    What it waits for is said by the registers that it reads, of results that are under way, or
    by how many accesses of each kind may still be.
    """

    name: str
    kind: str = ""  # load, store, shared, slow, barrier, cluster, fence, count, wait, branch, end
    unit: str = ""
    cycles: float = 0  # that it holds the unit
    issued: float = 1  # slots of its quarter of a multiprocessor
    width: int = 4  # bytes of a lane's access
    delay: int = 0  # cycles until the result is there, of one that is no load
    target: str = ""  # label that it branches to
    written: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    left: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass
class Code:
    """A kernel: its instructions, and its loops as first and last of them."""

    instructions: Sequence[Instruction]
    loops: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, found: Sequence[Instruction], labels: Mapping[str, int]) -> Code:
        """Without what only the last program does, behind where the others end."""
        counted = next((i for i, each in enumerate(found) if each.kind == "count"), len(found))
        end = next((i for i in range(counted, len(found)) if ends(found, labels, i)), len(found))
        loops: dict[int, int] = {}
        for place, instruction in enumerate(found[:end]):
            if not instruction.target:
                continue
            start = labels.get(instruction.target, place + 1)
            if start == place:  # to itself: what stands behind a kernel's end
                end = place
                break
            if start < min(place, counted):
                loops[start] = place
        return cls(found[:end], nested(sorted(loops.items())))

    def loading_loops(self) -> list[tuple[int, int]]:
        """Those that read memory, the innermost."""
        loading = [
            (a, b)
            for a, b in self.loops
            if any(i.kind == "load" for i in self.instructions[a : b + 1])
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
            if instruction.kind == "load":
                loads[instruction.width] += instruction.width
        return max(loads, key=lambda width: loads[width], default=0)

    def loaded(self, first: int, last: int) -> int:
        """Bytes that a lane loads there so."""
        width, instructions = self.row_width(first, last), self.instructions[first : last + 1]
        return sum(width for i in instructions if i.kind == "load" and i.width == width)

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


def nested(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each within another or apart: those that cross are one, with two ways back to its start."""
    whole: list[tuple[int, int]] = []
    for first, last in loops:
        crossed = next((loop for loop in whole if loop[0] < first <= loop[1] < last), None)
        if crossed is None:
            whole.append((first, last))
        else:
            whole[whole.index(crossed)] = crossed[0], last
    return whole


def ends(found: Sequence[Instruction], labels: Mapping[str, int], place: int) -> bool:
    """Whether a program may end there, itself or by a branch to where nothing else follows."""
    to = labels.get(found[place].target, place)
    rest = (each.kind for each in found[to:] if each.kind in ("end", "branch", "count", "load"))
    return next(rest, "") == "end"


def demand(steps: Sequence[Instruction]) -> Counter[str]:
    """Cycles of each unit, and of ``issue``, that one warp takes."""
    cycles: Counter[str] = Counter()
    for instruction in steps:
        cycles["issue"] += instruction.issued
        if instruction.unit:
            cycles[instruction.unit] += instruction.cycles
    return cycles
