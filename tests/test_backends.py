"""Which kernels a call takes, PYFUSED_BACKEND, and what the Triton kernels do in their own way."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.nn.functional as F
from compare import evaluate
from conftest import KernelCalls, backend
from grid import grid
from processes import python

from pyfused import backends
from pyfused.backends import cpu, versions
from pyfused.functional import cross_entropy
from pyfused.ops import dispatch, operators

on_triton = pytest.mark.skipif(backend is cpu, reason="the C++ kernels raise instead")


# ---- the choice ---------------------------------------------------------------------------------

CALL = """
import sys, torch, pyfused.functional as F
x = torch.randn(600, 500, requires_grad=True)
F.relu(F.cross_entropy(x, torch.zeros(600, dtype=torch.int64))).backward()
print("triton" in sys.modules)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(code, **{"PYFUSED_BACKEND": "", "TRITON_INTERPRET": "0"} | environment)


@pytest.mark.cpu
def test_cpu_tensors_do_not_import_triton() -> None:
    assert run(CALL).stdout == "False\n"
    assert run(CALL, PYFUSED_BACKEND="cpu").stdout == "False\n"
    assert run(CALL, PYFUSED_BACKEND="torch").stdout == "False\n"


@pytest.mark.cpu
def test_triton_takes_cpu_tensors_only_when_interpreted() -> None:
    forced = {"PYFUSED_BACKEND": "triton"}
    refused = run(CALL, **forced)
    assert "PYFUSED_BACKEND: triton cannot run on cpu: that takes TRITON_INTERPRET=1" in (
        refused.stderr
    )
    small = CALL.replace("600", "6").replace("500", "5")
    assert run(small, **forced, TRITON_INTERPRET="1").stdout == "True\n"


@pytest.mark.cpu
def test_a_missing_triton_is_named() -> None:
    hidden = "import importlib.util as u\nfind = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
    refused = run(hidden + CALL, PYFUSED_BACKEND="triton", TRITON_INTERPRET="1")
    assert "triton cannot run on cpu: Triton is not installed, expected 3.6 or later" in (
        refused.stderr
    )


@pytest.mark.cpu
def test_a_triton_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    reason = backends.without_triton.__wrapped__(torch.device("cuda"))
    assert reason == "Triton is 3.5.1, expected 3.6 or later"


@pytest.mark.cpu
@pytest.mark.parametrize("version", [*versions.TORCH_OF_TRITON, "3.7.1+gitabcdef", "3.10.0"])
def test_every_triton_since_the_oldest_is_supported(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert versions.unsupported_triton() is None


@pytest.mark.cpu
def test_the_triton_that_a_torch_requires() -> None:
    assert versions.pinned_triton("2.13.0+cu130") == "3.7.1"
    assert versions.pinned_triton("2.10.0") is None


@pytest.mark.cpu
def test_an_unknown_backend_is_an_error_that_names_the_known() -> None:
    refused = run(CALL, PYFUSED_BACKEND="cuda")
    assert "PYFUSED_BACKEND: expected cpu, triton or torch, got 'cuda'" in refused.stderr


@pytest.mark.cpu
def test_torch_takes_every_call_where_it_is_forced(
    monkeypatch: pytest.MonkeyPatch, kernel_calls: KernelCalls
) -> None:
    monkeypatch.setattr(backends, "FORCED", "torch")
    x = torch.randn(6, 5)
    assert dispatch.reason_for_torch(operators.RELU, (x,)) == "PYFUSED_BACKEND is torch"
    target = torch.arange(5).repeat(2)[:6]
    torch.testing.assert_close(cross_entropy(x, target), F.cross_entropy(x, target))
    assert not kernel_calls.total()


@pytest.mark.cpu
@pytest.mark.thresholds
def test_a_forced_backend_takes_calls_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.randn(6, 5)
    assert dispatch.reason_for_torch(operators.RELU, (small,)) is dispatch.SMALL
    monkeypatch.setattr(dispatch, "FORCED", "cpu")
    monkeypatch.setattr(dispatch, "_ALWAYS_BELOW", {})  # as it is then
    assert dispatch.reason_for_torch(operators.RELU, (small,)) is None


@pytest.mark.cpu
def test_a_forced_backend_takes_the_smallest_call() -> None:
    code = """
        import torch
        from pyfused.backends import cpu
        from pyfused.functional import relu
        kernel = cpu.activation
        cpu.activation = lambda *a, **k: print("kernel") or kernel(*a, **k)
        relu(torch.ones(1))
    """
    assert run(code, PYFUSED_BACKEND="cpu").stdout == "kernel\n"
    assert not run(code).stdout


# ---- targets that are no class ------------------------------------------------------------------


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
    if shape[0] > 1 or reduction != "mean":  # a mean over nothing is torch's NaN
        torch.testing.assert_close(got.gradients, expected.gradients)
    assert torch.equal(got.gradients[0][0], torch.zeros_like(logits[0]))


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 5), (2, 300), (3, 5, 17)], ids=str)
def test_the_same_bits_in_every_run(shape: tuple[int, ...], target_kind: str) -> None:
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape).softmax(1)
    if target_kind == "index":
        target = target.argmax(1)
    first = evaluate(cross_entropy, logits, target, label_smoothing=0.1)
    for _ in range(2):
        again = evaluate(cross_entropy, logits, target, label_smoothing=0.1)
        assert torch.equal(again.value, first.value)
        assert torch.equal(again.gradients[0], first.gradients[0])
