"""The choice of a backend, PYFUSED_BACKEND, and behaviour particular to the Triton kernels."""

from __future__ import annotations

import re
import subprocess
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from compare import evaluate
from conftest import KernelCalls, backend
from grid import grid
from processes import python

from pyfused import backends, explain
from pyfused.backends import cpu
from pyfused.formula_compiler import program
from pyfused.functional import cross_entropy

on_triton = pytest.mark.skipif(backend is cpu, reason="the C++ kernels raise instead")


# ---- choice of the backend -----------------------------------------------------------------------

CALL = """
import sys, torch, pyfused.functional as F
x = torch.randn(600, 500, requires_grad=True)
F.relu(F.cross_entropy(x, torch.zeros(600, dtype=torch.int64))).backward()
print("triton" in sys.modules)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(code, **{"PYFUSED_BACKEND": "", "TRITON_INTERPRET": "0"} | environment)


@pytest.mark.cpu
@pytest.mark.parametrize("forced", ["", "cpu", "torch"])
def test_cpu_tensors_do_not_import_triton(forced: str) -> None:
    assert run(CALL, PYFUSED_BACKEND=forced).stdout == "False\n"


@pytest.mark.cpu
def test_triton_supports_cpu_tensors_only_in_the_interpreter() -> None:
    error = "PYFUSED_BACKEND: triton cannot run on cpu: CPU tensors need TRITON_INTERPRET=1"
    assert error in run(CALL, PYFUSED_BACKEND="triton").stderr
    small = CALL.replace("600", "6").replace("500", "5")
    assert run(small, PYFUSED_BACKEND="triton", TRITON_INTERPRET="1").stdout == "True\n"


@pytest.mark.cpu
def test_the_reason_names_the_error_if_triton_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles its driver's module when it starts; a container may have no C compiler."""
    runtime = pytest.importorskip("triton.runtime")

    driver = Mock(**{"active.get_current_target.side_effect": RuntimeError("no C compiler")})
    monkeypatch.setattr(runtime, "driver", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = backends._without_triton.__wrapped__(torch.device("cuda"))
    assert reason == "Triton cannot start: no C compiler"


WRONG: dict[str, tuple[str, ...]] = {  # what is expected, and wrong values
    "PYFUSED_BACKEND": ("cpu, triton or torch", "cuda", "CPU"),
    "PYFUSED_CPU_CAPABILITY": ("one of .*", "avx2"),
    "PYFUSED_HALF_PRODUCTS": ("half or float32", "bfloat16"),
    "PYFUSED_HOST_US": ("a positive number of microseconds", "abc", "0", "-1", "nan", "inf"),
    "PYFUSED_RECYCLE": ("0 or a number of bytes", "1GB", "-1", "True"),
}


@pytest.mark.parametrize(("name", "value"), [(n, x) for n in WRONG for x in WRONG[n][1:]])
def test_errors_of_environment_variables_name_them(name: str, value: str) -> None:
    error = f"^ImportError: {name}: expected {WRONG[name][0]}, got '{value}'$"
    assert re.search(error, run("import pyfused", **{name: value}).stderr, re.MULTILINE)


@pytest.mark.cpu
def test_torch_as_the_backend(monkeypatch: pytest.MonkeyPatch, kernel_calls: KernelCalls) -> None:
    monkeypatch.setattr(backends, "FORCED", "torch")
    x, target = torch.randn(6, 5), torch.arange(5).repeat(2)[:6]
    assert explain("relu", x).reason == "PYFUSED_BACKEND is torch"
    torch.testing.assert_close(cross_entropy(x, target), F.cross_entropy(x, target))
    assert not kernel_calls.total()


@pytest.mark.cpu
def test_a_forced_backend_runs_a_kernel_for_the_smallest_call() -> None:
    code = "import pyfused, torch\nprint(pyfused.explain('relu', torch.ones(1)).backend)"
    assert run(code, PYFUSED_BACKEND="cpu").stdout == "cpu\n"
    assert run(code).stdout == "torch\n"


# ---- out-of-range targets ------------------------------------------------------------------------


@on_triton
@grid(
    shape=[(6, 5), (2, 5, 3), (6, 130), (1, 300)],
    wrong=[5, -1, 2**40, -(2**40)],
    reduction=["none", "mean", "sum"],
    smoothing=[0.0, 0.1],
)
def test_an_out_of_range_target_gives_nan_and_no_gradient(
    shape: tuple[int, ...], smoothing: float, wrong: int, reduction: str
) -> None:
    wrong = wrong if wrong != 5 else shape[1]
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target[0] = wrong
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = evaluate(cross_entropy, logits, target, **options)
    expected = evaluate(F.cross_entropy, logits, target.where(target != wrong, -100), **options)
    if reduction == "none":
        assert bool(got.value[0].isnan().all())
        torch.testing.assert_close(got.value[1:], expected.value[1:])
    else:
        assert bool(got.value.isnan())
    if shape[0] > 1 or reduction != "mean":  # the mean of no elements is NaN, as in torch
        torch.testing.assert_close(got.gradients, expected.gradients)
    assert torch.equal(got.gradients[0][0], torch.zeros_like(logits[0]))


# ---- invalid programs ----------------------------------------------------------------------------

# The slots of a program: four operands, five results, registers, and constants.
FIRST = program.CONSTANTS
MUL = ("mul", 4, (0, 1))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (("cube", 4, (0,)), "no instruction cube"),
        (("mul", 4, ()), "mul: expected 2 operands, got 0"),
        (("mul", 3, (0, 1)), f"mul: result: expected a slot from 4 to {FIRST - 1}, got 3"),
        (("mul", FIRST, (0, 1)), f"mul: result: expected a slot from 4 to {FIRST - 1}, got"),
        (("mul", 4, (0, -1)), f"mul: operand: expected a slot from 0 to {FIRST + 1}, got -1"),
        (("mul", 4, (FIRST + 2, 0)), f"mul: operand: expected a slot from 0 to {FIRST + 1}, got"),
    ],
)
def test_instructions_are_checked(instruction: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cpu.native.Program([], [MUL, instruction], [0.0, 2.0], 0)


@pytest.mark.cpu
@pytest.mark.parametrize("value", [0.5, 1e30], ids=str)
@pytest.mark.parametrize(
    ("name", "places"),
    [("sin", (FIRST + 1,)), ("cos", (FIRST + 1,)), ("pow_less", (0, FIRST + 1, FIRST + 1))],
)
def test_instructions_on_constants_read_one_element(
    name: str, places: tuple[int, ...], value: float, isa: str
) -> None:
    """Instructions that inspect all elements to choose a loop do not read beyond a constant."""
    n = 1000
    x, out = torch.full((n,), value).pow(value + 1), torch.empty(n)
    program = cpu.native.Program([], [(name, 4, places)], [0.0, value], 0)
    none = (0, 0)
    operands = [(x.data_ptr(), 1), *[none] * 3]
    outputs = out.data_ptr(), 0, (0, 0, 0, 0)
    program(0, n, operands, [], none, 1.0, none, outputs, 1, [])
    constant = torch.tensor(value)
    expected = constant.pow(constant) if name == "pow_less" else getattr(torch, name)(constant)
    torch.testing.assert_close(out, expected.expand(n))
