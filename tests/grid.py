"""Cases of tests that have several parameters: each value, or with `--full` every combination."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import interpreter
import pytest

FULL = False  # the option --full


def grid(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Each value of the first parameter with each value of every other, or all with all.

    The values after the first advance side by side, from another place for each of the first, so
    that two of them meet somewhere. Interpreted kernels are slow: there all advance side by side,
    and hypothesis draws combinations in test_fuzz.py.
    """
    names, values = list(parameters), [list(each) for each in parameters.values()]
    if FULL:
        cases = list(product(*values))
    else:
        first = values[:1] if interpreter.ON else [[value] for value in values[0]]
        cases = [
            case for place, one in enumerate(first) for case in _advance([one, *values[1:]], place)
        ]
    indirect = [name for name in names if name == "isa"]
    return pytest.mark.parametrize(names, cases, ids=_id, indirect=indirect)


def _advance(values: list[list[Any]], start: int) -> list[tuple[Any, ...]]:
    rows = range(max(map(len, values)))
    return [
        tuple(each[(row + start * place) % len(each)] for place, each in enumerate(values))
        for row in rows
    ]


def _id(value: Any) -> str:
    if isinstance(value, tuple) and not all(isinstance(each, int) for each in value):
        return "-".join(map(_id, value))
    names = (getattr(value, attribute, None) for attribute in ("id", "name", "__name__"))
    named = next((name for name in names if isinstance(name, str)), str(value))
    return named.removeprefix("torch.").replace(" ", "")
