"""Runs a program under :func:`pyfused.patch`, and says what it was worth.

``python -m pyfused run script.py``; ``startup/sitecustomize.py`` prints what is counted here.
"""

from __future__ import annotations

import functools
import getopt
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn import functional as F

from pyfused import functional
from pyfused.formula import Formula
from pyfused.ops import custom_operators, dispatch, inductor, reasons
from pyfused.ops.activation import Activation
from pyfused.ops.composed import Composed
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import compiler_traces
from pyfused.ops.operators import OPERATORS
from pyfused.ops.originals import original
from pyfused.ops.pointwise_loss import PointwiseLoss
from pyfused.patch import (
    C_FUNCTIONS,
    MethodStandIn,
    StandIn,
    code_calling,
    one_frame_further,
    patch,
    stands_for,
)
from pyfused.startup import sitecustomize
from pyfused.startup.sitecustomize import KERNEL, SMALL, Calls, Key

SHARE = 0.008  # of the program's time that repeated calls may take
MOST = 1 << 24  # elements of a repeated call; one of more is cut, for the sake of memory
TIMED = 32  # of so many small calls two are timed: to time each takes longer than most of them
WARM = 0.01  # seconds: a shorter call is made once before it counts

_LOSSES = (
    *(name for name in dir(F) if name.endswith("_loss")),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "linear_cross_entropy"),
)
_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "gumbel_softmax", "hardshrink", "hardsigmoid", "hardswish"),
    *("hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "prelu", "relu6", "rrelu"),
    *("selu", "silu", "softmax", "softmin", "softplus", "softshrink", "softsign", "tanh"),
    *("tanhshrink", "threshold"),
)


class _Inside(threading.local):
    """Whether a thread is within a call that is counted: those within that one are not."""

    call = False


_inside = _Inside()


def counted(kinds: dict[Key, Calls]) -> Callable[..., Tensor]:
    """:func:`pyfused.ops.dispatch.call`, which counts the path of each call, and takes its time.

    The program never sees an error of counting: its call is made, once, and is not counted.
    """
    function, repeat = dispatch.call, Repeat()

    def count(
        path: str, seconds: float, op: Operator, arguments: Arguments, inplace: bool, result: Any
    ) -> None:
        input = arguments[0]
        elements = input.numel()
        if type(elements) is not int:  # a tensor, to torch.jit.trace
            elements = 0
        needs_grad = getattr(result, "requires_grad", False) and torch.is_grad_enabled()
        calls = kinds[op.name, path, elements.bit_length(), needs_grad]
        calls.count += 1
        calls.elements += elements
        if elements > calls.largest:
            calls.largest = elements
        if input.is_cpu:  # another device computes later
            calls.seconds += seconds
            calls.latest = seconds
            if calls.count >= calls.due:
                repeat(calls, op, arguments, inplace, path is KERNEL, result)

    def call(op: Operator, arguments: Arguments, inplace: bool = False, *patched: Any) -> Any:
        # What is traced is called while it is traced, and not when it runs.
        if is_dynamo_compiling() or _inside.call:
            return function(op, arguments, inplace, *patched)
        if len(arguments) == 4 and arguments[1] is None:  # a softmax that is to warn
            arguments = one_frame_further(op, arguments)
        try:
            path = _path(op, arguments, inplace)
        except Exception:
            path = None
        if path is None:
            return function(op, arguments, inplace, *patched)
        _inside.call = True
        try:
            start = perf_counter()
            result = function(op, arguments, inplace, *patched)
            seconds = perf_counter() - start
            with suppress(Exception):
                count(path, seconds, op, arguments, inplace, result)
        finally:
            _inside.call = False
        return result

    return call


def _path(op: Operator, arguments: Arguments, inplace: bool) -> str | None:
    """Which way a call takes, None where the compiler traces it."""
    if dispatch.is_small(op, arguments):
        return SMALL
    if compiler_traces():
        return None
    reason = dispatch.reason_for_torch(op, arguments, inplace)
    return KERNEL if reason is None else f"torch: {reason}"


def counted_if_small(kinds: dict[Key, Calls]) -> Callable[[Operator, Arguments], bool]:
    """:func:`pyfused.ops.dispatch.is_small`, which counts calls of patched functions on their way
    to torch's, but for some: these take the long way, where they are timed.
    """

    def is_small(op: Operator, arguments: Arguments) -> bool:
        if not dispatch.is_small(op, arguments):
            return False
        if _inside.call:
            return True
        input = arguments[0]
        elements = input.numel()
        needs_grad = input.requires_grad and torch.is_grad_enabled()
        calls = kinds.get((op.name, SMALL, elements.bit_length(), needs_grad))
        if calls is None or calls.count % TIMED < 2:  # the second one may be repeated
            return False
        calls.count += 1
        calls.elements += elements
        calls.largest = max(calls.largest, elements)
        calls.seconds += calls.latest
        return True

    return is_small


def count_compiled(kinds: dict[Key, Calls]) -> None:
    """Counts the calls of custom operators, and the places where compiled programs have torch's."""
    compute, left = custom_operators.compute, inductor.left

    def counting(op: str, function: Callable[..., Any], given: Arguments, *backward: Any) -> Any:
        start = perf_counter()
        result = compute(op, function, given, *backward)
        calls = kinds[op, f"{KERNEL}, compiled", 0, False]
        calls.seconds += perf_counter() - start
        calls.count += not backward
        with suppress(Exception):
            calls.largest = max(calls.largest, given[0].numel())
        return result

    def counting_left(op: str) -> None:
        left(op)
        kinds[op, f"torch: {reasons.FUSED}", 0, False].count += 1

    setattr(custom_operators, "compute", counting)  # noqa: B010 mypy knows it as a function
    setattr(inductor, "left", counting_left)  # noqa: B010


# ---- compared with torch -------------------------------------------------------------------------


class Repeat:
    """Repeats some calls, by pyfused and by torch, and takes the time of both.

    Of each kind of calls the second, and then one more whenever there are a quarter more of them,
    as long as that takes no more than SHARE of the program's time. The program sees nothing of it:
    the tensors are detached, none is overwritten, no random number is drawn, and nothing is
    repeated where hooks or modes look on.
    """

    def __init__(self) -> None:
        self.began, self.spent, self.torch_first = perf_counter(), 0.0, False

    def __call__(
        self,
        calls: Calls,
        op: Operator,
        arguments: Arguments,
        inplace: bool,
        fused: bool,
        result: Any,
    ) -> None:
        """Repeats a call that has returned this result, from a kernel if ``fused``."""
        start = perf_counter()
        expected = calls.cost or 10 * calls.seconds / calls.count
        share = SHARE / 2 if calls.cost else SHARE  # half of it for kinds not seen yet
        if self.spent + expected > share * (start - self.began):
            return  # until there is time
        calls.due = calls.count + max(1, calls.count // 4)
        if not _can_be_repeated(op, arguments, inplace, result):
            return
        # An input that has been overwritten holds the result.
        given = _cut(op, (result, *arguments[1:]) if inplace else arguments)
        if _elements(op, given) > 4 * MOST:
            return
        reference: Any = op.aten_ if inplace else op.aten
        ours: Any = (lambda *given: op.fused(given, inplace)) if fused else reference
        functions = [ours, reference] if fused else [ours]
        if self.torch_first:
            functions.reverse()
        self.torch_first = not self.torch_first
        try:
            if not calls.cost:  # a function's first time takes longer: kernels' for new memory
                _times(ours, given, inplace)
            times = {function: _times(function, given, inplace) for function in functions}
            if not calls.cost and perf_counter() - start < WARM:
                times = {function: _times(function, given, inplace) for function in functions}
        except Exception:
            calls.due = math.inf
        else:
            elements = given[0].numel()
            calls.repeats.append((times[ours][1] / elements, sum(times[reference]) / elements))
        calls.cost = perf_counter() - start
        self.spent += calls.cost


def _can_be_repeated(op: Operator, arguments: Arguments, inplace: bool, result: Any) -> bool:
    """Whether nobody sees it, neither a hook or mode nor who reads warnings."""
    named = dict(zip(op.arguments, arguments, strict=True))
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    pointwise = isinstance(op, (PointwiseLoss, Composed))
    return (
        type(result) is Tensor
        and tensors[0].numel() > 0
        and all(type(tensor) in (Tensor, Parameter) and tensor.is_cpu for tensor in tensors)
        and not (inplace and not isinstance(op, Activation))  # whose input holds a gradient now
        and not (pointwise and any(t.shape != tensors[0].shape for t in tensors[1:2]))
        and (named.get("size_average"), named.get("reduce")) == (None, None)
        and not (op.name == "kl_div" and named["reduction"] == "mean")
        and named.get("dim", 0) is not None
        and dispatch._active_mode() is None
        and torch._C._current_graph_task_id() == -1  # no backward pass is running
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch.is_anomaly_enabled()
        and not torch._C._autograd._profiler_enabled()
    )


def _elements(op: Operator, arguments: Sequence[Any]) -> int:
    """Returns the number of elements of the input, or of a linear layer's logits."""
    input = arguments[0]
    if not op.name.startswith("linear_"):
        return int(input.numel())
    features = input.shape[-1]
    return int(input.numel() // features * (arguments[1].numel() // features))


def _cut(op: Operator, arguments: Arguments) -> Arguments:
    """The arguments, or the same of the first rows if there are too many."""
    elements = _elements(op, arguments)
    if elements <= MOST:
        return arguments
    rows = len(arguments[0])
    kept = math.ceil(rows * MOST / elements)
    return tuple(
        value[:kept] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for value in arguments
    )


def _times(function: Callable[..., Tensor], given: Arguments, inplace: bool) -> tuple[float, float]:
    """Seconds that the forward and the backward pass take."""
    arguments = [
        value.detach().requires_grad_(value.requires_grad and torch.is_grad_enabled())
        if isinstance(value, Tensor)
        else value
        for value in given
    ]
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    if inplace:
        arguments[0] = arguments[0].clone()
    start = perf_counter()
    result = function(*arguments)
    forward = perf_counter() - start
    if not leaves:
        return forward, 0.0
    grad_output = torch.ones_like(result)
    start = perf_counter()
    grad(result, leaves, grad_output, allow_unused=True)
    return forward, perf_counter() - start


# ---- what pyfused does not have ------------------------------------------------------------------


def count_others(missing: Counter[str]) -> None:
    """Makes torch's losses and activations count their calls, for the rest of the process.

    They stay the objects that they are, as under :func:`pyfused.patch`, where they are no
    built-ins. No mode counts: with one active pyfused's own operators would be torch's.
    """
    for owner, name in _places():
        torch_function = getattr(owner, name)
        path = f"{'torch.Tensor' if owner is Tensor else owner.__name__}.{name}"
        call = _counting(path, original(torch_function), missing)
        if not isinstance(torch_function, FunctionType):
            stand_in = (MethodStandIn if owner is Tensor else StandIn)(call)
            functools.update_wrapper(stand_in, torch_function)
            stands_for(torch_function, stand_in)
            module = "torch" if owner is Tensor else owner.__name__
            stand_in.__module__, stand_in.__qualname__ = module, path.removeprefix(f"{module}.")
            setattr(owner, name, stand_in)
        elif torch_function.__globals__ is vars(F):
            code = torch_function.__code__
            by_place = code.co_varnames[: code.co_argcount]
            by_name = code.co_varnames[len(by_place) :][: code.co_kwonlyargcount]
            further = [f"{name} + 2" if name == "_stacklevel" else name for name in by_place]
            arguments = ", ".join((*further, *(f"{name}={name}" for name in by_name)))
            torch_function.__code__ = code_calling(call, f"callee({arguments})", code)


def _places() -> Iterator[tuple[Any, str]]:
    for name in _LOSSES:
        if name not in OPERATORS:
            yield F, name
    for owner in (F, torch, Tensor):
        for name in _ACTIVATIONS:
            for spelled in (name, f"{name}_"):
                is_one = isinstance(getattr(owner, spelled, None), (FunctionType, *C_FUNCTIONS))
                if name not in OPERATORS and is_one:
                    yield owner, spelled


def _counting(
    path: str, torch_function: Callable[..., Any], missing: Counter[str]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if compiler_traces() or _inside.call:
            return torch_function(*args, **kwargs)
        _inside.call = True
        try:
            result = torch_function(*args, **kwargs)
        finally:
            _inside.call = False
        missing[path] += 1
        return result

    return functools.update_wrapper(call, torch_function)


# ---- the program ---------------------------------------------------------------------------------


def run(arguments: list[str]) -> None:
    """Becomes ``python`` with these arguments, patched and counting, and so do its children.

    It prints what the calls took, to the standard error, when it ends.
    """
    flags = sys.flags.ignore_environment or sys.flags.no_site
    if flags or not _reads_environment(arguments):
        raise SystemExit("pyfused: run: expected a Python that reads PYTHONPATH, got -E, -I or -S")
    if sitecustomize.open_file() is None:  # else another run counts, as its child
        descriptor, path = tempfile.mkstemp(prefix="pyfused-run-")
        unnamed = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        if unnamed.exists():  # on Linux: the file ends with the last process that has it open
            Path(path).unlink()
            os.set_inheritable(descriptor, True)
            path = str(unnamed)
        sitecustomize.name_file(path, descriptor)
        folder, others = Path(sitecustomize.__file__).parent, os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{others}" if others else str(folder)
    # What python was given before "-m pyfused run".
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) - 1]
    command = [sys.executable, *options, *arguments]
    if sys.platform != "win32":
        os.execv(sys.executable, command)
    # Windows cannot replace a process: the program is a child, and this one prints.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program answers it
    code = subprocess.call(command)
    sitecustomize.leave()
    sys.exit(code)


def _reads_environment(arguments: list[str]) -> bool:
    """Whether Python with these arguments reads PYTHONPATH and imports sitecustomize."""
    try:
        options, _ = getopt.getopt(
            arguments, "bBdEhiIOPqRsSuvVxc:m:W:X:?", ["check-hash-based-pycs="]
        )
    except getopt.GetoptError:  # Python says what is wrong with them
        return True
    for option, _ in options:
        if option in ("-c", "-m"):  # what follows is the program's
            return True
        if option in ("-E", "-I", "-S"):
            return False
    return True


def start(kinds: dict[Key, Calls], missing: Counter[str]) -> None:
    """Patches this process and counts, until it ends."""
    dispatch.call = counted(kinds)
    setattr(functional, "call", dispatch.call)  # noqa: B010 it is there by name
    vars(sys.modules["pyfused.patch"])["is_small"] = counted_if_small(kinds)
    setattr(Formula, "__call__", Formula.dispatched)  # noqa: B010
    count_compiled(kinds)
    count_others(missing)
    patch().__enter__()
