"""Combinations of test parameters: a covering subset, or with `--full` all combinations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import interpreter
import pytest

FULL = False  # whether --full was passed
SLOW = False  # whether --slow or --full was passed


def grid(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test with each value of the first parameter and each value of every other.

    With `--full`, uses all combinations. Otherwise, values after the first parameter advance
    together, with a different offset for each value of the first, so that many pairs occur. In the
    interpreter, which is slow, all parameters advance together; test_fuzz.py draws combinations.
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
