"""Which combinations of parameters are tested, where PYFUSED_TEST_LARGE=1 does not ask for all.

Losses, dtypes, reductions, shapes and layouts make tens of thousands, of code that all losses
share. Of each test function, every value of every parameter is tried with each loss
and each activation, and every pair of values where there is neither.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from itertools import combinations
from typing import Any

import pytest
from samples import Loss

from pyfused.ops.declaration import Operator

FEW = 12  # a function of no more cases is tested whole


def sample(items: list[pytest.Item], each_operator: bool = True) -> list[pytest.Item]:
    """The cases that cover, always the same ones.

    Args:
        each_operator: Cover what was said with each operator by itself; otherwise, as for kernels
            that are interpreted, an operator is a value like others.
    """
    if os.environ.get("PYFUSED_TEST_LARGE") == "1":
        return items
    cases: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        operators = _operators(item) if each_operator else ()
        cases[item.nodeid.partition("[")[0], operators].append(item)
    chosen = set()
    for (_, operators), several in cases.items():
        pairs = each_operator and not operators
        chosen.update(map(id, _covering(several, 2 if pairs else 1)))
    return [item for item in items if id(item) in chosen]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    """Those of the case, each of a tuple's by itself."""
    found = {}
    for name, value in item.callspec.params.items() if hasattr(item, "callspec") else ():
        several = value if type(value) is tuple else (value,)
        found |= {f"{name} {place}": each for place, each in enumerate(several)}
    return found


def _operators(item: pytest.Item) -> tuple[str, ...]:
    values = _parameters(item).values()
    return tuple(_name(value) for value in values if isinstance(value, (Loss, Operator)))


def _covering(items: list[pytest.Item], together: int) -> list[pytest.Item]:
    """Items among whose parameters all values appear that do in any, so many together."""
    if len(items) <= FEW:
        return items
    found = {id(item): _combinations(item, together) for item in items}
    left = set().union(*found.values())
    chosen = []
    for item in items:  # a first pass takes what is half new, a second what is left
        if 2 * len(found[id(item)] & left) >= len(found[id(item)]):
            left -= found[id(item)]
            chosen.append(item)
    for item in items:
        if found[id(item)] & left:
            left -= found[id(item)]
            chosen.append(item)
    return chosen


def _combinations(item: pytest.Item, together: int) -> set[Any]:
    values = [(name, _name(value)) for name, value in _parameters(item).items()]
    return set(combinations(values, min(together, len(values))))


def _name(value: Any) -> str:
    if isinstance(value, Loss):
        return value.id
    if isinstance(value, Operator):
        return value.name
    return (
        f"{value.__module__}.{value.__qualname__}"
        if callable(value) and hasattr(value, "__qualname__")
        else repr(value)
    )
