"""Random sequences of calls of all operators: results do not depend on earlier calls.

The second of two runs has another order, and caches that have seen all calls.
``python tests/contract/test_sequences.py 100000`` runs 100,000 calls.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings

import interpreter
import numpy as np
import pytest
import torch
from catalogue import EXAMPLES, Call, ours, random_call
from check_calls import ERRORS, forward
from conftest import fused_always
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from pyfused.ops.operators import OPERATORS

MODES = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "device": lambda: torch.device("cpu"),  # same as torch.set_default_device
    "save_on_cpu": save_on_cpu,
}
NUMBERS = int, np.float64, np.float32, lambda x: torch.tensor(x, dtype=torch.float64), float


def draw(rng: random.Random) -> tuple[Call, str]:
    """Draws a call, in which numbers have any type, and a mode."""
    if rng.random() < 0.5:  # shares its layouts with other calls of the operator
        call = rng.choice([*EXAMPLES.values()]).call(shape=(rng.randrange(1, 12), 5))
    else:
        call = random_call(rng.choice([*OPERATORS.values()]), rng.randrange(1 << 32), 100)
    for name, x in call.given.items():
        if type(x) is float:
            call.given[name] = rng.choice(NUMBERS)(rng.choice([x, x, 0.0, 1.0, 2.0]))
        elif isinstance(x, Tensor) and name in call.leaves and rng.random() < 0.3:
            x.requires_grad_(False)
    return call, rng.choice([*MODES, "", "", ""])


def outcome(call: Call, mode: str) -> list[Tensor] | str:
    """Returns the results and the gradients, or the error."""
    with MODES[mode]():
        try:
            results, gradients = forward(call, ours)
            return [*results, *(gradients() if results[0].requires_grad else ())]
        except ERRORS as error:
            return f"{type(error).__name__}: {error}"


def check(seed: int, calls: int) -> int:
    """Compares results with those in another order; returns the number of calls that raised."""
    rng, raised = random.Random(seed), 0
    drawn = [draw(rng) for _ in range(calls)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [(each, outcome(*each)) for each in drawn]
        for (call, mode), found in rng.sample(results, len(results)):
            expected, note = outcome(call, mode), f"seed {seed}: {call}, mode {mode}"
            assert isinstance(found, str) == isinstance(expected, str), note
            if isinstance(found, str):
                assert found == expected, note
                raised += 1
                continue
            for x, y in zip(found, expected, strict=True):
                assert x.dtype is y.dtype, note
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=note)
    return raised


@pytest.mark.parametrize("seed", [0] if interpreter.ON else range(3))
def test_results_do_not_depend_on_earlier_calls(seed: int) -> None:
    calls = 60 if interpreter.ON else 400
    assert check(seed, calls) < calls / 4


if __name__ == "__main__":
    total, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    torch.set_num_threads(1)
    with fused_always():
        for begin in range(0, total, 1000):
            print(first + begin // 1000, check(first + begin // 1000, 1000), flush=True)
