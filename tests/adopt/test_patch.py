"""patch() replaces torch's functions for all users, and unpatch() restores them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import KernelCalls
from processes import python
from torch import Tensor, nn

import pyfused
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS

NAMES = [x for x in OPERATORS if hasattr(F, x) and not isinstance(OPERATORS[x], Activation)]
as_users_run_it = pytest.mark.thresholds


def current() -> list[Any]:
    return [getattr(F, name) for name in NAMES]


TORCHS = current()
X, TARGET = torch.linspace(-2, 2, 30).view(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])


def patched() -> bool:
    """Returns whether all functions are patched, or none; fails if only some are."""
    same = [now is then for now, then in zip(current(), TORCHS, strict=True)]
    assert all(same) or not any(same)
    return not any(same)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    assert not patched()


# ---- patched functions ---------------------------------------------------------------------------


def test_patched_functions_methods_and_modules_of_torch(kernel_calls: KernelCalls) -> None:
    def results() -> list[Tensor]:
        x = X.clone().requires_grad_()
        values = [
            *(F.cross_entropy(x, TARGET, label_smoothing=0.1), F.softmax(x, -1)),
            *(F.mse_loss(x, X * 2, reduction="none"), F.mse_loss(input=x, target=X)),
            *(nn.CrossEntropyLoss(ignore_index=1)(x, TARGET), nn.MSELoss()(x, X * 2)),
            *(F.gelu(x), nn.ReLU()(x)),  # activations stay torch's
        ]
        return [v.detach() for v in values] + [torch.autograd.grad(v.sum(), x)[0] for v in values]

    expected = results()
    assert not kernel_calls
    with pyfused.patch():
        got = results()
    torch.testing.assert_close(got, expected)
    calls = kernel_calls.copy()
    assert [calls[name] for name in ("cross_entropy", "softmax", "relu", "gelu")] == [2, 1, 0, 0]
    results()
    assert kernel_calls == calls


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_errors_pass_through(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Mock(side_effect=error("of a hook, of the user or of torch"))
    monkeypatch.setattr(type(OPERATORS["mse_loss"]), "prepare", fails)
    with pyfused.patch(), pytest.raises(error, match="of a hook"):
        F.mse_loss(X, X)
    fails.assert_called_once()  # not caught


WITHOUT_DIM: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x),
    "log_softmax": lambda x: F.log_softmax(x),
    "Softmax": nn.Softmax(),
    "LogSoftmax": nn.LogSoftmax(),
}
WARNS = WITHOUT_DIM | {
    "the mean of all elements": lambda x: F.kl_div(x, x.exp()),
    "size_average": lambda x: F.mse_loss(x, x[:, :1], size_average=True),
    "shapes": lambda x: F.l1_loss(x[:, :1], x),
}


@as_users_run_it
@pytest.mark.parametrize("name", WARNS)
@pytest.mark.parametrize("rows", [5, 4000])
def test_warnings_are_torchs(name: str, rows: int) -> None:
    """Those about a missing dimension name the same line, too."""
    x, found = torch.zeros(rows, 500), []
    for context in (contextlib.nullcontext, pyfused.patch):
        with context(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            WARNS[name](x)
        lines = [(w.filename, w.lineno) for w in seen if name in WITHOUT_DIM]
        found.append(([str(w.message) for w in seen], lines))
    assert found[0] == found[1] != ([], [])


# ---- __torch_function__ --------------------------------------------------------------------------


def arguments_of(name: str) -> dict[str, Any]:
    operands = [operand for operand in OPERATORS[name].operands if not operand.optional]
    given = {o.name: TARGET if o.indices else X.sigmoid() for o in operands}
    linear = {"linear_weight": X[:5]} if "linear_weight" in given else {}
    return given | linear | ({"dim": 1} if "softmax" in name else {})


SEEN: list[Any] = []


class Sub(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append((func.__name__, types))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


# linear_cross_entropy supports more shapes than torch, so it reads them first.
@as_users_run_it
@pytest.mark.parametrize("name", sorted({*NAMES} - {"linear_cross_entropy"}))
def test_torch_function_receives_the_same_calls_as_without_patch(name: str) -> None:
    (_, first), *others = arguments_of(name).items()
    calls = [((first,), dict(others)), ((first, *[x for _, x in others]), {})]

    def seen() -> list[Any]:
        found = []
        for args, kwargs in calls:
            for place in [i for i, x in enumerate(args) if isinstance(x, Tensor)]:
                given = [x.as_subclass(Sub) if i == place else x for i, x in enumerate(args)]
                SEEN.clear()
                found.append((type(getattr(F, name)(*given, **kwargs)), SEEN.copy()))
        return found

    expected = seen()
    with pyfused.patch():
        assert seen() == expected


EXPORTED = sorted({*NAMES} - {"gaussian_nll_loss"})  # torch.export fails for torch's function


class Exported(nn.Module):
    def forward(self, tensors: dict[str, tuple[Any, ...]]) -> list[Tensor]:
        return [getattr(F, name)(*tensors[name]) for name in tensors]


@as_users_run_it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_torchs_operators(strict: bool) -> None:
    model, tensors = Exported(), {name: (*arguments_of(name).values(),) for name in EXPORTED}

    def exported() -> tuple[list[str], nn.Module]:
        program = torch.export.export(model, (tensors,), strict=strict)
        nodes = program.graph_module.graph.nodes
        return [str(node.target) for node in nodes if node.op == "call_function"], program.module()

    expected, _ = exported()
    with pyfused.patch():
        got, program = exported()
    assert got == expected
    assert len(got) >= len(model(tensors))
    torch.testing.assert_close(program(tensors), model(tensors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_torch_fx_records_all_arguments(name: str) -> None:
    """They are proxies, whose values cannot be read."""
    names = [*inspect.signature(getattr(F, name)).parameters]
    if name == "linear_cross_entropy":
        names.remove("ignore_index")
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    with pyfused.patch():
        getattr(F, name)(**{x: torch.fx.Proxy(graph.placeholder(x), tracer) for x in names})
    (node,) = (node for node in graph.nodes if node.op.startswith("call"))
    assert len(node.all_input_nodes) == len(names) - (name == "l1_loss")  # torch drops its weight


class Scripted(nn.Module):
    """Functions that torch.jit.script compiles by name, as attributes, in modules and libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.gelu, self.loss = F.relu, F.gelu, F.smooth_l1_loss
        self.layers = nn.Sequential(nn.GELU("tanh"), nn.SiLU(), nn.LogSoftmax(1))

    def forward(self, x: Tensor) -> Tensor:
        held = self.relu(x) + self.gelu(x) + self.loss(x, x * 2)
        return self.layers(held + F.softmax(x, 1)) + F.mse_loss(x, x * 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_programs_are_torchs() -> None:
    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(F.softmax(x, 1), torch.zeros(x.shape[0], dtype=torch.int64))

    before, expected = Scripted(), (Scripted()(X), loss(X))
    with pyfused.patch():
        modules = [torch.jit.script(module) for module in (before, Scripted())]
        function = torch.jit.script(loss)
        traced = torch.jit.trace(torch.jit.script_if_tracing(loss), (X,))
    for module in modules:
        torch.testing.assert_close(module(X), expected[0])
    assert function(X) == traced(X) == expected[1]


# ---- names and pickles ------------------------------------------------------------------


def test_patched_functions_look_like_the_originals_also_in_pickles() -> None:
    def seen() -> list[Any]:
        return [(f.__name__, f.__doc__, inspect.signature(f)) for f in current()]

    expected = seen()
    with pyfused.patch():
        assert seen() == expected
        for name, function in zip(NAMES, current(), strict=True):
            assert (function.__module__, function.__qualname__) == ("torch.nn.functional", name)
            assert copy.deepcopy(function) is function
        saved = pickle.dumps((Scripted(), current()))
    assert b"pyfused" not in saved
    model, functions = pickle.loads(saved)
    assert functions == TORCHS
    assert (model.gelu, model.loss) == (F.gelu, F.smooth_l1_loss)


def test_modules_with_functions_are_saved_while_torch_is_patched() -> None:
    with pyfused.patch():
        layers = nn.TransformerEncoderLayer(16, 2, 32), nn.TransformerDecoderLayer(16, 2, 32)
        for module in (*layers, Scripted()):
            torch.save(module, io.BytesIO())
            assert b"pyfused" not in pickle.dumps(module)


# ---- compiled programs ---------------------------------------------------------------------------


def test_compiled_programs_have_torchs_functions() -> None:
    """The compiler is imported while torch is patched, and used again afterwards."""
    done = python("""
        import torch, pyfused
        import torch.nn.functional as F
        graphs, X, TARGET = [], torch.ones(6, 5), torch.zeros(6).long()
        def backend(graph, _):
            names = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes]
            graphs.append(names)
            return graph
        def step(x):
            loss = F.mse_loss(x, x + 1) + F.cross_entropy(x, TARGET) + F.kl_div(x, x)
            return loss + (F.relu(x) + F.gelu(x) + F.softmax(x, -1)).sum()
        results = []
        for patch in (pyfused.patch, torch.no_grad):
            with patch():
                results.append(torch.compile(step, fullgraph=True, backend=backend)(X))
            torch.compiler.reset()
        assert graphs[0] == graphs[1], graphs  # kl_div warns, which Dynamo does not trace
        assert results[0] == results[1]
    """)
    assert done.returncode == 0, done.stderr


# ---- lifetime of a patch -------------------------------------------------------------------------


def test_calls_and_nested_blocks() -> None:
    """Blocks nest, calls do not. unpatch() does not end a block, and a block ends no call."""
    for _ in range(2):
        pyfused.patch()
    with pyfused.patch():
        pass
    assert patched()
    pyfused.unpatch()
    assert not patched()
    again = pyfused.patch()
    with pyfused.patch():
        with again, again:
            assert patched()
        pyfused.patch()
        pyfused.unpatch()
        assert patched()
    assert not patched()
    with pytest.raises(KeyError), pyfused.patch():
        raise KeyError
    call = pyfused.patch()
    with pytest.raises(RuntimeError, match="without being entered"):
        call.__exit__()
    assert patched()  # by the call, which lasts
    pyfused.unpatch()
    with again:
        assert patched()


@pytest.mark.usefixtures("switching")
def test_several_threads() -> None:
    """Each thread's patch is active, however other threads enter and leave theirs."""
    barrier = threading.Barrier(4)

    def work(_: int) -> int:
        barrier.wait()
        count = 0
        for _ in range(50):
            with pyfused.patch():
                count += patched()
        return count

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [50] * 4


# ---- errors --------------------------------------------------------------------------------------


def test_unpatch_without_patch() -> None:
    with pytest.raises(RuntimeError, match=r"^unpatch\(\) called without patch\(\)$"):
        pyfused.unpatch()
    with pyfused.patch(), pytest.raises(RuntimeError, match="ends with its block"):
        pyfused.unpatch()


def test_patches_by_others_are_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(F, "mse_loss", len)
        with pytest.raises(RuntimeError, match=r"torch's function at \S*mse_loss, got len"):
            pyfused.patch()
        assert F.mse_loss is len
    pyfused.patch()
    ours, F.mse_loss = F.mse_loss, len
    with pytest.raises(RuntimeError, match=r"at torch\.nn\.functional\.mse_loss, got len"):
        pyfused.unpatch()
    assert F.mse_loss is len
    F.mse_loss = ours
    pyfused.unpatch()
    with pytest.raises(RuntimeError, match="got len"), pyfused.patch():
        F.mse_loss = len
    F.mse_loss = ours
    pyfused.unpatch()


@pytest.mark.parametrize("argument", [len, nn.ReLU(), nn.ReLU, 3])
def test_patch_is_not_a_decorator(argument: Any) -> None:
    with pytest.raises(TypeError, match=r"no argument, got \w+\. Write 'with pyfused\.patch\(\):'"):
        pyfused.patch(argument)
