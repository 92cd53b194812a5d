"""Kernels work in forked children, before or after use in the parent, and in spawned ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from conftest import fused_always
from processes import SECONDS, python
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyfused.backends import cpu
from pyfused.functional import cross_entropy, mse_loss, relu

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
# From 3.12 on, Python warns of forks with threads, which these tests need.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def compute(seed: int = 0) -> list[Any]:
    """Returns losses and gradients, large enough for several threads, as plain numbers.

    Operands are small for torch's kernels, which hang in a forked child of a parent that has used
    several threads. (DataLoader sets its workers to one thread for this reason.)
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 1000, generator=generator).requires_grad_()
    other = torch.randn(600, 1000, generator=generator)
    target = torch.arange(600)
    with fused_always():
        values = [
            cross_entropy(x, target),
            cross_entropy(x, target, reduction="sum") * 0.5,
            mse_loss(x, other) * 2.0,
            relu(x),
        ]
    grad_outputs = [torch.ones(()).expand(value.shape) for value in values]
    gradients = [
        torch.autograd.grad(value, x, grad_output)[0]
        for value, grad_output in zip(values, grad_outputs, strict=True)
    ]
    return [tensor.view(-1)[::50_001].tolist() for tensor in (*values, *gradients)]


class Losses(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(compute(index)[-1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@ignore_fork_warning
def test_data_loader_workers(method: str, threads: Any) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    threads(2)
    expected = torch.tensor([compute(index)[-1] for index in range(6)])
    loader = DataLoader(
        Losses(), num_workers=1, multiprocessing_context=method, timeout=SECONDS, batch_size=2
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("isa", [*cpu.supported, ""])
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    code = (
        "import torch; from pyfused.backends import cpu; from pyfused.functional import relu;"
        "print(cpu.capability, cpu.native.__name__, relu(torch.arange(-3.0, 3)).sum().item())"
    )
    done = python(code, PYFUSED_CPU_CAPABILITY=isa)
    assert done.returncode == 0, done.stderr
    capability, module, total = done.stdout.split()
    assert capability == (isa or cpu.supported[-1])
    assert module.endswith(capability.replace("-", "_"))
    assert float(total) == 3.0


ENDINGS = {
    "exit": "sys.exit(17)",
    "os._exit": "os._exit(17)",
    "an error": "raise RuntimeError",
    "threads set": "torch.set_num_threads(2); compute(); sys.exit(17)",
    "a grandchild": "child = fork(); child and wait(child, 17); sys.exit(17)",
}


@forks
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_forked_children_end(ending: str) -> None:
    """They compute the same; torch joins the threads of its pool at exit, also of their parent.

    With three threads or more, torch's own children may crash there.
    """
    status = 1 if "raise" in ending else 17
    done = python(f"""
import os, sys, time, torch
from pyfused.functional import cross_entropy
torch.set_num_threads(2)
logits, target = torch.randn(4000, 1000), torch.zeros(4000, dtype=torch.int64)
def compute():
    return cross_entropy(logits, target)
def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 1
def fork():
    child = os.fork()
    if not child:
        before = tasks()
        assert compute() == expected
        while tasks() > before:  # OpenMP's threads may still be ending
            time.sleep(0.01)
    return child
def wait(child, status):
    for _ in range(3000):
        found, ended = os.waitpid(child, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(ended) == status, ended
            return
        time.sleep(0.02)
    os.kill(child, 9)
    raise AssertionError("the child hangs")
expected = compute()
for _ in range(2):
    child = fork()
    if not child:
        {ending}
    wait(child, {status})
os._exit(3)
""")
    assert done.returncode == 3, done.stderr


@forks
def test_fork_while_another_thread_counts() -> None:
    code = """if True:
        import os, signal, sys, threading, torch, pyfused
        torch.set_num_threads(1)
        sys.setswitchinterval(1e-6)
        x, t, stop = torch.randn(2000), torch.rand(2000), []

        def call():
            pyfused.functional.sigmoid_focal_loss(x, t)

        def work():
            while not stop:
                call()

        def calls():
            return report.to_dict()["operators"].get("sigmoid_focal_loss", {}).get("calls", 0)

        with pyfused.report() as report:
            thread = threading.Thread(target=work)
            thread.start()
            for _ in range(60):
                if (child := os.fork()) == 0:
                    signal.alarm(60)
                    before = calls()
                    call()
                    os._exit(calls() - before != 1)
                assert os.waitpid(child, 0)[1] == 0
            stop.append(1)
            thread.join()
    """
    done = python(code)
    assert done.returncode == 0, done.stderr


EQUATION = """
import sys, torch, pyfused
model = pyfused.convert(torch.nn.Sequential(torch.nn.Linear(8, 131072)), head="0")
x = 3 * torch.tanh((model(torch.randn(16, 8)) + torch.ones(131072)) / 3)
torch.nn.functional.nll_loss(x.log_softmax(-1), torch.arange(16)).backward()
assert type(x).__name__ == "LazyLogits" and "torch._dynamo" not in sys.modules
"""


def test_the_equation_of_a_loss_does_not_import_the_compiler() -> None:
    result = python(EQUATION)
    assert result.returncode == 0, result.stderr
