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
from pyfused.functional import cross_entropy

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
# From 3.12 on, Python warns of forks with threads, which these tests need.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Gradients(Dataset[Tensor]):
    """Gradients that are computed by several threads."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.linspace(-index, 2, 600_000).view(600, 1000).requires_grad_()
        with fused_always():
            return torch.autograd.grad(cross_entropy(x, torch.arange(600)), x)[0][index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@ignore_fork_warning
def test_data_loader_workers(method: str, threads: Any) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    threads(2)
    expected = torch.stack([Gradients()[index] for index in range(6)])
    loader = DataLoader(
        Gradients(), num_workers=1, multiprocessing_context=method, timeout=SECONDS, batch_size=2
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("isa", [*cpu.supported, ""])
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    done = python(
        "import torch; from pyfused.backends import cpu; from pyfused.functional import relu;"
        "print(cpu.capability, cpu.native.__name__, relu(torch.arange(-3.0, 3)).sum().item())",
        PYFUSED_CPU_CAPABILITY=isa,
    )
    assert done.returncode == 0, done.stderr
    capability, module, total = done.stdout.split()
    assert capability == (isa or cpu.supported[-1])
    assert module.endswith(capability.replace("-", "_"))
    assert float(total) == 3.0


ENDINGS = {
    "exit": "sys.exit(17)",
    "threads set": "torch.set_num_threads(2); compute(); sys.exit(17)",
    "a grandchild": "check(fork() or sys.exit(17)); sys.exit(17)",
}


@forks
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_forked_children_end(ending: str) -> None:
    """They compute the same; torch joins the threads of its pool at exit, also of their parent.

    With three threads or more, torch's own children may crash there.
    """
    done = python(f"""
import os, signal, sys, time, torch
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
        signal.alarm(60)
        before = tasks()
        assert compute() == expected
        while tasks() > before:  # OpenMP's threads may still be ending
            time.sleep(0.01)
    return child
def check(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
expected = compute()
for _ in range(2):
    child = fork()
    if not child:
        {ending}
    check(child)
os._exit(3)
""")
    assert done.returncode == 3, done.stderr


LOCKS = "adopt.patch._lock", "backends.cpu._lock", "dispatch.report._lock", "memory._lock"


@forks
@pytest.mark.parametrize("lock", LOCKS)
def test_fork_while_another_thread_holds_a_lock(lock: str) -> None:
    """The process forks when the lock is released, so it is free in the child."""
    done = python(f"""
import os, threading, time, torch, pyfused
import pyfused.adopt.patch
lock, held = pyfused.{lock}, threading.Event()
def hold():
    with lock:
        held.set()
        time.sleep(0.3)
thread = threading.Thread(target=hold)
thread.start()
held.wait()
if not (child := os.fork()):
    with pyfused.patch(), pyfused.report(), pyfused.memory.keep():
        torch.nn.functional.hinge_embedding_loss(torch.ones(5), torch.ones(5))
    os._exit(lock.acquire(blocking=False))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout == "1\n", done.stderr


def test_the_equation_of_a_loss_does_not_import_the_compiler() -> None:
    result = python("""
import sys, torch, pyfused
model = pyfused.convert(torch.nn.Sequential(torch.nn.Linear(8, 131072)), head="0")
x = 3 * torch.tanh((model(torch.randn(16, 8)) + torch.ones(131072)) / 3)
torch.nn.functional.nll_loss(x.log_softmax(-1), torch.arange(16)).backward()
assert type(x).__name__ == "LazyLogits" and "torch._dynamo" not in sys.modules
""")
    assert result.returncode == 0, result.stderr
