"""csrc/parallel.cpp: kernels run on torch's threads, with any compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import grid
import pytest
import torch
from processes import process, python
from torch import Tensor

from pyfused import functional
from pyfused.backends import cpu

ROOT = Path(__file__).parents[2]
COMPILERS = {
    name: [path] for name in ("g++", "clang++", "clang++-14") if (path := shutil.which(name))
}
if grid.FULL and find_spec("ziglang"):  # compiles for minutes
    COMPILERS["zig"] = [sys.executable, "-m", "ziglang", "c++"]

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

IDS = """
import ctypes, os, sys
def threads():
    return {*os.listdir("/proc/self/task")}
"""
WARM = """
import torch
torch.set_num_threads(2)
torch.ones(1 << 22).exp_()
before = threads()
"""


def built(folder: Path, compiler: list[str], *more: str | Path) -> Path:
    library, here = folder / "parallel.so", Path(__file__).parent
    sources = here / "parallel.cpp", ROOT / "csrc/parallel.cpp", *more, "-ldl", "-lpthread"
    options = "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT}/csrc", "-o", library
    subprocess.run([*compiler, *options, *sources], check=True, capture_output=True)
    return library


@pytest.fixture(scope="module", params=COMPILERS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("parallel"), COMPILERS[request.param])


def test_builds_of_each_compiler_use_torchs_threads(library: Path) -> None:
    done = python(f"""{IDS}{WARM}
library = ctypes.CDLL({str(library)!r})
print(library.threads_used(64, 2), library.threads_used(64, 1), before == threads())
torch.set_num_threads(3)
torch.ones(1 << 22).exp_()
before = threads()
print(*[library.threads_used(64, count) for count in (2, 3)], before == threads())
""")
    assert done.stdout == "2 1 True\n2 3 True\n", done.stderr


def test_a_call_within_a_parallel_region_stays_on_its_thread(library: Path) -> None:
    done = python(f"""{IDS}{WARM}
library, used = ctypes.CDLL({str(library)!r}), []
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: used.append(library.threads_used(9, 2)))
ctypes.CDLL(None).GOMP_parallel(body, None, 2, 0)
print(used, before == threads())
""")
    assert done.stdout == "[1, 1] True\n", done.stderr


@pytest.mark.parametrize("warm", [WARM, "import torch\n"], ids=["after use", "before use"])
def test_a_forked_child_has_its_own_threads(library: Path, warm: str) -> None:
    """Also holds if torch has not used threads before, and in a grandchild."""
    done = python(f"""{IDS}{warm}
library = ctypes.CDLL({str(library)!r})
def in_child(depth):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    used = [library.threads_used(64, 2), library.threads_used(64, 3)]
    if depth:
        used.append(in_child(depth - 1))
    os._exit(17 if used in ([2, 3], [2, 3, 17]) else 1)
print(in_child(1), library.threads_used(64, 2), in_child(1), library.threads_used(64, 2))
""")
    assert done.stdout == "17 2 17 2\n", done.stderr


def test_allocation_failures_throw_before_the_body_runs(library: Path) -> None:
    """Covers buffers of one and of two threads; later calls are not affected."""
    done = python(f"""{IDS}{WARM}
library = ctypes.CDLL({str(library)!r})
library.blocks_run.argtypes = ctypes.c_int64, ctypes.c_int, ctypes.c_int
for huge in (True, False, True):
    print(*[library.blocks_run(9, threads, huge) for threads in (1, 2)], end=" ")
""")
    assert done.stdout == "-1 -1 9 9 -1 -1 ", done.stderr


def test_a_runtime_with_clangs_interface_only(tmp_path: Path) -> None:
    runtime = Path(__file__).with_name("openmp.cpp"), "-DLLVM_RUNTIME"
    library = built(tmp_path, next(iter(COMPILERS.values())), *runtime)
    done = process("-c", f"""{IDS}
library = ctypes.CDLL({str(library)!r})
library.omp_set_num_threads(3)
print(library.has_runtime(), *[library.threads_used(64, count) for count in (1, 2, 3)])
""")  # fmt: skip
    assert done.stdout == "1 1 2 3\n", done.stderr


# ---- the installed modules -----------------------------------------------------------------------


def test_calls_of_any_size_keep_torchs_threads() -> None:
    """libgomp ends the threads that a smaller team leaves out, and torch would start them again.

    A thread that ends stays listed for a moment, so only new ones are counted. Heads are left out,
    because MKL chooses the number of threads of a product.
    """
    done = python(f"""{IDS}
import itertools, torch
from catalogue import OF_FAMILIES
from conftest import fused_always
torch_operator, failed = torch.ones(1 << 20).exp, []
def run(threads_set, *shapes):
    torch.set_num_threads(threads_set)
    torch_operator()  # starts threads or, after a larger number, ends some
    before = threads()
    for example, shape in itertools.product(OF_FAMILIES.values(), shapes):
        if not example.name and not example.op.is_linear:
            example.call(shape=shape).ours().sum().backward()
            torch_operator()
            if threads() - before:
                failed.append((threads_set, example.id, shape))
with fused_always():
    run(8, (33, 1000), (64, 2048), (3000, 100), (1 << 20, 4))
    run(3, (64, 2048))
    run(8, (64, 2048))
print(failed)
""")
    assert done.stdout == "[]\n", done.stderr


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def of_classes(name: str, rows: int, **options: object) -> Callable[[], Tensor]:
    function, target = getattr(functional, name), torch.randint(9, (rows,))
    return partial(function, leaf(rows, 9), target, **options)


def of_head() -> Callable[[], Tensor]:
    given = leaf(64, 8), leaf(4000, 8), torch.randint(4000, (64,))
    return partial(functional.linear_cross_entropy, *given)


# csrc/README.md has the same table. A call with many targets checks them in a region of its own.
REGIONS: dict[str, tuple[Callable[[], Tensor], int, int]] = {
    "mse_loss": (partial(functional.mse_loss, leaf(1 << 17), torch.randn(1 << 17)), 1, 0),
    "relu": (partial(functional.relu, leaf(1 << 17)), 1, 1),
    "softmax": (partial(functional.softmax, leaf(99, 999), 1), 1, 1),
    "cross_entropy": (of_classes("cross_entropy", 131_071), 1, 0),
    "cross_entropy, many": (of_classes("cross_entropy", 131_072), 2, 0),
    "cross_entropy, many, weight": (of_classes("cross_entropy", 8193, weight=torch.rand(9)), 2, 0),
    "nll_loss": (of_classes("nll_loss", 9000), 1, 0),
    "nll_loss, none": (of_classes("nll_loss", 80_000, reduction="none"), 1, 1),
    "linear_cross_entropy": (of_head(), 1, 0),
}


@pytest.mark.parametrize("name", REGIONS)
def test_calls_have_few_parallel_regions(name: str, threads: Callable[[int], None]) -> None:
    call, forward, backward = REGIONS[name]
    threads(2)
    cpu.native.measure_regions(True)
    value = call()
    assert cpu.native.measured_regions()[0] == forward
    value.backward(torch.ones_like(value))
    assert cpu.native.measured_regions()[0] == forward + backward
    cpu.native.measure_regions(False)


def test_modules_without_a_runtime_warn_once() -> None:
    """Modules search for the runtime at import, here before torch loads it."""
    files = [sys.modules[cpu.load(isa).__name__].__file__ for isa in cpu.supported]
    done = process("-c", f"""{IDS}
from importlib.util import module_from_spec, spec_from_file_location
for isa, file in zip({cpu.supported}, {files}):
    name = "pyfused._cpu_" + isa.replace("-", "_")
    spec = spec_from_file_location(name, file)
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
import torch
from pyfused.backends import cpu
from pyfused.functional import gelu, mse_loss
{WARM}
x = torch.randn(2000, 1500, requires_grad=True)
(mse_loss(x, -x.detach()) + gelu(x).sum()).backward()
print(cpu.native.runtime_file == "", before == threads(), bool(x.grad.isfinite().all()))
""")  # fmt: skip
    assert done.stdout == "True True True\n", done.stderr
    assert done.stderr.count("\n") == 1
    assert "the kernels run on one thread" in done.stderr
