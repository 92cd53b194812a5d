"""patch() replaces torch's functions for all users, and unpatch() restores them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import grid
import pytest
import torch
import torch.nn.functional as F
from conftest import KernelCalls
from processes import python
from torch import Tensor, nn
from torch.nn.functional import relu as looked_before
from torch.overrides import TorchFunctionMode, get_testing_overrides, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused import checks
from pyfused.dispatch import reasons
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.softmax import Softmax
from pyfused.torch_internals import dynamo_table

NAMES = [name for name in OPERATORS if isinstance(getattr(F, name, None), FunctionType)]
BUILT_IN = [name for name, op in OPERATORS.items() if isinstance(op, (Activation, Softmax))]
OWNERS = (
    *((F, name) for name in NAMES),
    *(
        (owner, name)
        for name in BUILT_IN
        for owner in (F, torch, Tensor)
        if isinstance(getattr(owner, name, None), (BuiltinFunctionType, MethodDescriptorType))
    ),
)


as_users_run_it = pytest.mark.thresholds


def standing() -> list[Any]:
    return [getattr(owner, name) for owner, name in OWNERS]


def running() -> list[Any]:
    """Returns the code that a call runs: a function's code, or the built-in itself."""
    return [getattr(function, "__code__", function) for function in standing()]


TORCHS, TORCHS_RUNNING = standing(), running()
X, TARGET = torch.linspace(-2, 2, 30).view(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])


def patched() -> bool:
    """Returns whether all names are patched, or none; fails if only some are."""
    same = [now is then for now, then in zip(running(), TORCHS_RUNNING, strict=True)]
    assert all(same) or not any(same)
    return not any(same)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    assert not patched()
    for now, then in zip(standing(), TORCHS, strict=True):
        assert now is then
        assert not hasattr(now, "_torchdynamo_inline")
    assert not {"relu", "sigmoid"} & set(vars(Tensor))


# ---- patched functions ---------------------------------------------------------------------------


def test_patched_functions_methods_and_modules_of_torch(kernel_calls: KernelCalls) -> None:
    def results() -> list[Tensor]:
        x = X.clone().requires_grad_()
        values = [
            F.cross_entropy(x, TARGET, label_smoothing=0.1),
            nn.functional.mse_loss(x, X * 2, reduction="none"),
            F.relu(x),
            torch.relu(x),
            torch.relu(input=x),
            x.relu(),
            nn.CrossEntropyLoss(ignore_index=1)(x, TARGET),
            nn.MSELoss()(x, X * 2),
            nn.ReLU()(x),
            nn.Sequential(nn.ReLU(inplace=True))(x * 1),
        ]
        return [v.detach() for v in values] + [torch.autograd.grad(v.sum(), x)[0] for v in values]

    expected = results()
    assert not kernel_calls
    with pyfused.patch():
        got = results()
    torch.testing.assert_close(got, expected)
    assert {k: kernel_calls[k] for k in ("cross_entropy", "mse_loss", "relu")} == {
        "cross_entropy": 2,
        "mse_loss": 3,
        "relu": 5,
    }
    results()
    assert kernel_calls["relu"] == 5


WRONG = {
    "missing": lambda: F.cross_entropy(X),
    "unknown": lambda: F.mse_loss(X, X, factor=2),
    "shape": lambda: F.cross_entropy(X, TARGET[:4]),
    "range": lambda: F.cross_entropy(X, TARGET + 1),
    "reduction": lambda: F.mse_loss(X, X, reduction="most"),
    "no tensor": lambda: F.mse_loss(X, 1.0),
    "type of an option": lambda: F.gelu(X, approximate=3),
    "type of a dimension": lambda: torch.softmax(X, "1"),
    "relu of a list": lambda: F.relu([1.0]),
    "relu has no inplace": lambda: torch.relu(X, True),
    "nor by name": lambda: torch.relu(X, inplace=True),
    "nor as a method": lambda: X.relu(True),
    "inplace is pyfused's alone": lambda: F.cross_entropy(X, TARGET, inplace=True),
    "leaf": lambda: F.relu(X.clone().requires_grad_(), inplace=True),
}


@as_users_run_it
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_raise_torchs_error(call: Any) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call()
    with pyfused.patch(), pytest.raises(type(expected.value)) as got:
        call()
    assert type(got.value) is type(expected.value)
    assert str(got.value) == str(expected.value)
    assert got.value.__context__ is None


@pytest.mark.parametrize(("owner", "name"), OWNERS, ids=[f"{o.__name__}.{n}" for o, n in OWNERS])
def test_a_failing_call_is_made_once(owner: Any, name: str) -> None:
    class Refuses(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, *_: Any) -> Any:
            self.calls += 1
            raise RuntimeError("refused")

    args, kwargs = next(iter(calls_of(owner, name).values()))
    with pyfused.patch(), Refuses() as mode, pytest.raises(RuntimeError, match="refused") as raised:
        getattr(owner, name)(*args, **kwargs)
    assert raised.value.__context__ is None
    assert mode.calls == 1


def test_errors_of_checks_that_torch_does_not_raise_become_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        checks.tensor("input", 3)

    monkeypatch.setattr(type(OPERATORS["relu"]), "plan", fails)
    monkeypatch.setattr(reasons, "_reported", set())
    expected = X.relu()
    with pyfused.patch():
        for call in (F.relu, torch.relu):
            with pytest.warns(RuntimeWarning, match="pyfused: relu: .*expected a Tensor") as seen:
                assert call(X).equal(expected)
            assert [warning.filename for warning in seen] == [__file__]
            assert call(X).equal(expected)  # a second warning would raise
            reasons._reported.clear()


@pytest.mark.parametrize(
    "error", [RuntimeError, torch.OutOfMemoryError, MemoryError, KeyError, KeyboardInterrupt]
)
def test_other_errors_pass_through(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise error("of a hook, of the user or of torch")

    monkeypatch.setattr(type(OPERATORS["relu"]), "plan", fails)
    with pyfused.patch():
        for call in (F.relu, torch.relu):
            with pytest.raises(error, match="of a hook"):
                call(X)


WARNS = [
    *(F.softmax, F.log_softmax, nn.Softmax(), nn.LogSoftmax()),  # dim is missing
    lambda x: F.kl_div(x, x.exp()),  # the mean of all elements
    lambda x: F.mse_loss(x, x[:, :1], weight=x),  # shapes differ
    lambda x: F.l1_loss(x, x[:, :1].long()),
]


@as_users_run_it
@pytest.mark.parametrize("call", WARNS)
@pytest.mark.parametrize("rows", [5, 4000])
def test_warnings_name_the_same_line_as_in_torch(call: Any, rows: int) -> None:
    x = torch.zeros(rows, 500)
    lines = []
    for context in (contextlib.nullcontext(), pyfused.patch()):
        with context, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call(x)
        lines.append([(warning.filename, warning.lineno) for warning in seen])
    assert lines[0] == lines[1] != []


@pytest.mark.parametrize("inplace", [None, 0, -1.5, "yes", [], [0], torch.tensor(1)])
def test_inplace_may_be_any_object(inplace: Any) -> None:
    """torch uses its truth value."""
    for patch in (contextlib.nullcontext(), pyfused.patch()):
        with patch:
            x = X.clone()
            assert (F.relu(x, inplace=inplace) is x) == bool(inplace)


# ---- __torch_function__ --------------------------------------------------------------------------


def tensors_of(name: str) -> dict[str, Tensor]:
    operands = [operand for operand in OPERATORS[name].operands if not operand.optional]
    given = {o.name: TARGET if o.indices else X.sigmoid() for o in operands}
    linear = {"linear_weight": X[:5]} if "linear_weight" in given else {}
    return given | linear


def calls_of(owner: Any, name: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Returns arguments of valid calls, and for built-ins of invalid ones."""
    op = OPERATORS[name]
    (first, x), *others = tensors_of(name).items()
    needed = dict(others) | op.required | ({"dim": 1} if "softmax" in name else {})
    valid = {"by name": ((x,), needed), "by place": ((x, *needed.values()), {})}
    if isinstance(getattr(owner, name), FunctionType):
        return valid
    return valid | {
        "twice": ((x, *needed.values()), {first: x}),
        "too many": ((x, *needed.values(), True, 1, 1), {}),
        "unknown": ((x, *needed.values()), {"inplace": True}),
        "none": ((), {}),
    }


class Handler:
    """Records each call of ``__torch_function__``, and returns the configured result."""

    seen: list[Any] = []  # noqa: RUF012
    answer = "calls"

    @classmethod
    def handle(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        Handler.seen.append((func, types, len(args), sorted(kwargs)))
        if Handler.answer == "calls":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if Handler.answer == "raises":
            raise RuntimeError("raised by the handler")
        return NotImplemented if Handler.answer == "has none" else 42


class Sub(Tensor, Handler):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.handle(func, types, args, kwargs)


class Mode(TorchFunctionMode, Handler):
    def __repr__(self) -> str:  # part of torch's messages
        return "Mode"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, (), args, kwargs)  # types vary between functions


def outcome(call: Any) -> tuple[Any, list[float], Any]:
    """Returns the result or the error of a call, and the records of the handler."""
    Handler.seen.clear()
    try:
        result = call()
    except Exception as error:
        result = type(error), str(error), error.__context__
    seen = list(Handler.seen)
    if isinstance(result, Tensor):
        return type(result), result.as_subclass(Tensor).flatten().tolist(), seen
    return result, [], seen


SHOWN = [  # each function, with alternating answers
    (owner, name, answer)
    for i, (owner, name) in enumerate(OWNERS)
    for j, answer in enumerate(("calls", "answers", "has none", "raises"))
    if grid.FULL or i % 4 == j
]


@as_users_run_it
@pytest.mark.parametrize(("owner", "name", "answer"), SHOWN)
def test_torch_function_receives_the_same_calls_as_without_patch(
    owner: Any, name: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "answer", answer)

    def all_outcomes() -> Iterator[Any]:
        for args, kwargs in calls_of(owner, name).values():
            places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
            for place in (None, *places):
                given = [x.as_subclass(Sub) if i == place else x for i, x in enumerate(args)]
                yield outcome(lambda given=given, kw=kwargs: getattr(owner, name)(*given, **kw))
            if answer != "has none":  # some of torch's methods recurse
                with Mode():
                    yield outcome(lambda args=args, kw=kwargs: getattr(owner, name)(*args, **kw))

    expected = [*all_outcomes()]
    with pyfused.patch():
        got = [*all_outcomes()]
    for found, (kind, values, seen) in zip(got, expected, strict=True):
        assert found == (kind, pytest.approx(values, rel=1e-4, abs=1e-6), seen)


def test_tables_of_torchs_functions_made_before_or_after_patching() -> None:
    """Subclasses with ``__torch_function__`` look up the function that they receive."""
    names = [name for _, name in OWNERS]
    before = dict(zip(standing(), names, strict=True))
    with pyfused.patch():
        while_patched = dict(zip(standing(), names, strict=True))
        found = [(before[now], while_patched[now]) for now in standing()]
        found += [(before[torchs], while_patched[torchs]) for torchs in TORCHS]
    assert found == 2 * [(name, name) for name in names]


def test_a_built_in_stored_in_a_class_is_not_bound() -> None:
    with pyfused.patch():
        holder = type("Holder", (), {"activation": torch.relu})
        assert holder().activation(X).equal(X.relu())
        assert torch.relu.__get__(holder()) is torch.relu  # in Python 3.14, partials bind
        assert copy.deepcopy(torch.relu) is torch.relu
        assert torch.relu != torch.tanh


class Forms(nn.Module):
    """All operators called by all their names."""

    def forward(self, tensors: dict[str, tuple[Tensor, ...]]) -> list[Tensor]:
        options = {
            name: (1,) if "softmax" in name else OPERATORS[name].required.values()
            for name in tensors
        }
        return [getattr(o, n)(*tensors[n], *options[n]) for o, n in OWNERS if n in tensors]


CANNOT = "gaussian_nll_loss"  # torch.export fails for torch's function
EXPORTED = sorted({name for _, name in OWNERS if name in OPERATORS} - {CANNOT})


@as_users_run_it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_torchs_operators(strict: bool) -> None:
    names = BUILT_IN if strict else EXPORTED
    model, tensors = Forms(), {name: tuple(tensors_of(name).values()) for name in names}

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
def test_tracers() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(F.relu(x) + torch.relu(x), TARGET)

    with pyfused.patch():
        traced, symbolic = torch.jit.trace(Net(), (X,)), torch.fx.symbolic_trace(Net())
        jvp = torch.func.jvp(Net(), (X,), (X,))
        scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.GELU(), nn.Softmax(1)))
    torch.testing.assert_close(scripted(X), F.softmax(F.gelu(F.relu(X)), 1))
    torch.testing.assert_close(traced(X * 2), Net()(X * 2))
    torch.testing.assert_close(symbolic(X * 2), Net()(X * 2))
    torch.testing.assert_close(jvp, torch.func.jvp(Net(), (X,), (X,)))
    assert {n.target for n in symbolic.graph.nodes if n.op == "call_function"} >= {F.relu}


def test_names_imported_before_are_patched(kernel_calls: KernelCalls) -> None:
    layer = nn.TransformerEncoderLayer(4, 1, 8, activation=looked_before, batch_first=True)
    assert layer.activation_relu_or_gelu == 1
    with pyfused.patch():
        assert looked_before is F.relu
        looked_before(X)
        layer(torch.randn(2, 3, 4))
        layer = nn.TransformerEncoderLayer(4, 1, 8, activation=F.relu)
        assert layer.activation_relu_or_gelu == 1  # torch's fast path needs this
    assert kernel_calls["relu"] == 2


# ---- identity of torch's functions ---------------------------------------------------------------


def test_patched_functions_look_like_the_originals() -> None:
    def seen() -> list[Any]:
        functions = [getattr(F, name) for name in NAMES]
        return [
            (f, inspect.signature(f), inspect.getsource(f), resolve_name(f), copy.deepcopy(f))
            for f in functions
        ]

    expected = seen()
    with pyfused.patch():
        assert seen() == expected
        assert F.relu in get_testing_overrides()


@as_users_run_it
def test_pickles_do_not_reference_pyfused(tmp_path: Path) -> None:
    """A model with each patched name is saved whole, and loaded without pyfused."""
    x = torch.randn(1, 3, 4)
    with pyfused.patch():
        layer = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True, activation=torch.relu)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        torch.save((model, x, model(x), standing()), tmp_path / "model.pt")
    done = python(f"""
        import sys, torch
        sys.modules["pyfused"] = None
        model, x, expected, functions = torch.load("{tmp_path}/model.pt", weights_only=False)
        torch.testing.assert_close(model(x), expected)
        assert torch.relu in functions and torch.Tensor.relu in functions
    """)
    assert done.returncode == 0, done.stderr


def test_functions_are_compiled_once_with_the_patch_and_once_without() -> None:
    """Entering and leaving does not clear the compiler's table of functions, which is slow."""
    graphs: list[set[Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({node.target for node in graph.graph.nodes if "call" in node.op})
        return graph

    def step(x: Tensor) -> Tensor:
        return F.mse_loss(x, x + 1) + (torch.relu(x) + x.sigmoid() + F.gelu(x)).sum()

    compiled, expected, tables = torch.compile(step, fullgraph=True, backend=backend), step(X), []
    for _ in range(3):
        with pyfused.patch():
            torch.testing.assert_close(compiled(X), expected)
        torch.testing.assert_close(compiled(X), expected)
        tables.append(dynamo_table()())
    while_patched, without = graphs
    for targets in (while_patched, without):
        assert targets >= {F.mse_loss, torch.relu, "sigmoid", F.gelu}
    assert tables[0] is tables[1] is tables[2]


def test_a_compiler_that_is_imported_while_patched() -> None:
    """While patched, the compiler's table has pyfused's functions; afterwards, torch's."""
    done = python("""
        import sys, torch, torch.nn.functional as F, pyfused
        assert "torch._dynamo.trace_rules" not in sys.modules
        x, graphs = torch.ones(3), []
        def backend(graph, _):
            graphs.append({node.target for node in graph.graph.nodes})
            return graph
        compiled = torch.compile(lambda x: F.mse_loss(x, x + 1), fullgraph=True, backend=backend)
        for _ in range(2):
            with pyfused.patch():
                assert compiled(x) == 1
            assert compiled(x) == 1
        assert [F.mse_loss in graph for graph in graphs] == [True, True]
    """)
    assert done.returncode == 0, done.stderr


def test_a_compiled_activation_is_named_by_torchs_function() -> None:
    """torch's graph passes search for this name in compiled graphs."""
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.append([node.target for node in graph.graph.nodes if "call" in node.op])
        return graph

    for context in (contextlib.nullcontext(), pyfused.patch()):
        torch.compiler.reset()
        with context:
            torch.compile(lambda x: F.silu(F.relu(x)) + F.gelu(x), backend=backend)(X)
    assert targets[0] == targets[1]


USES = (
    lambda: pyfused.patch(lambda: None)(),
    lambda: pyfused.patch().__enter__().__exit__(),
    lambda: (pyfused.patch(), pyfused.unpatch()),
)


@pytest.mark.parametrize("use", USES, ids=["decorated", "block", "calls"])
def test_an_interrupt_while_functions_are_replaced_leaves_none_patched(use: Any) -> None:
    module = sys.modules["pyfused.adopt.patch"]
    changes = "_expect", "_restore", "put"
    lines = 0

    def interrupt_at(number: int) -> None:
        nonlocal lines

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            code = frame.f_code
            if code.co_filename != module.__file__ or code.co_name not in changes:
                return None
            lines += event == "line"
            if event == "line" and lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        lines, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            use()
        finally:
            sys.settrace(before)

    interrupt_at(-1)  # counts lines
    for number in range(1, lines, lines // 30):
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(number)
        assert not patched(), number
    use()


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


@pytest.mark.parametrize("decorator", [pyfused.patch, lambda f: pyfused.patch()(f)], ids=["", "()"])
def test_a_decorated_function(decorator: Any) -> None:
    @decorator
    def step(more: int) -> bool:
        return step(more - 1) if more else patched()

    assert not patched()
    assert step(2)
    assert not patched()
    assert step.__name__ == "step"


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

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [50] * 4
    finally:
        sys.setswitchinterval(interval)


# ---- errors --------------------------------------------------------------------------------------


def test_unpatch_without_patch() -> None:
    with pytest.raises(RuntimeError, match=r"^unpatch\(\) called without patch\(\)$"):
        pyfused.unpatch()
    with pyfused.patch(), pytest.raises(RuntimeError, match="ends with its block"):
        pyfused.unpatch()


def test_functions_patched_by_others_are_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return X

    for owner, name in OWNERS:
        before = standing()
        with monkeypatch.context() as context:
            context.setattr(owner, name, theirs, raising=False)
            for use in (pyfused.patch, lambda: pyfused.patch(len)([])):
                with pytest.raises(RuntimeError, match=rf"torch's function at \S*{name}, got"):
                    use()
            assert getattr(owner, name) is theirs
        if owner is torch.Tensor and "relu" in vars(torch.Tensor):
            del torch.Tensor.relu  # inherited again after monkeypatch
        assert standing() == before


def test_later_patches_by_others_are_not_undone() -> None:
    pyfused.patch()
    ours, F.relu = F.relu, len
    with pytest.raises(
        RuntimeError, match=r"pyfused's function at torch\.nn\.functional\.relu, got len"
    ):
        pyfused.unpatch()
    assert F.relu is len
    F.relu = ours
    pyfused.unpatch()


async def coroutine() -> None: ...


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("function", [3, nn.ReLU(), nn.ReLU, coroutine, generator])
def test_objects_that_cannot_be_decorated(function: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a function, got|Use 'with pyfused\.patch"):
        pyfused.patch(function)
