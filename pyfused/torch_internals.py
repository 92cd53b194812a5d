"""Wraps the private attributes of torch and Triton that pyfused uses.

Some are required to detect tensors and modes that the kernels do not support. If a version of torch
lacks one of these, ``MISSING`` names it, and all calls fall back to torch's operators.
"""

from __future__ import annotations

import inspect
import operator
import pkgutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves  # no public equivalent
from torch.utils._pytree import tree_map_only as tree_map_only

MISSING: str | None = None
PLAIN = (Tensor, torch.nn.Parameter)  # the types of tensors that kernels take
Function = TypeVar("Function", bound=Callable[..., Any])


def _required(path: str) -> Any:
    """Returns an attribute by its path; if torch lacks it, records the path in ``MISSING``."""
    global MISSING
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        MISSING = MISSING or path
        return lambda *_: False


# ---- tensors -------------------------------------------------------------------------------------

# Reading data_ptr() of a copy-on-write tensor copies it.
is_lazy_clone: Callable[[Tensor], bool] = _required("torch._C._is_cow_tensor")
# Wrapped tensors of torch.func and of is_grads_batched have no storage.
is_functorch_wrapped: Callable[[Tensor], bool] = _required(
    "torch._C._functorch.is_functorch_wrapped_tensor"
)
is_batched: Callable[[Tensor], bool] = _required("torch._C._functorch.is_legacy_batchedtensor")
is_zero_tensor: Callable[[Tensor], bool] = _required("torch.Tensor._is_zerotensor")
# None since torch 2.13, which has removed named dimensions.
has_names: Callable[[Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)
# Torch's notes "Extending PyTorch" document these two.
DisableTorchFunctionSubclass: Any = _required("torch._C.DisableTorchFunctionSubclass")
make_wrapper_subclass: Callable[..., Tensor] = _required("torch.Tensor._make_wrapper_subclass")
# Makes reading the address of a tensor without memory an error, instead of returning 0.
throw_on_data_ptr: Callable[[Tensor], None] = getattr(
    torch._C, "_set_throw_on_mutable_data_ptr", lambda _: None
)
# Returns the version counter of a tensor, which in-place operations increment.
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


def is_mutable(overload: Any) -> bool:
    """Returns whether an operator passed to ``__torch_dispatch__`` mutates an argument."""
    return bool(overload._schema.is_mutable)


# ---- modes ---------------------------------------------------------------------------------------

any_autocast: Callable[[], bool] = _required("torch._C._is_any_autocast_enabled")
functorch_is_active: Callable[[], bool] = _required("torch._C._are_functorch_transforms_active")
dispatch_modes: Callable[[], int] = _required("torch._C._len_torch_dispatch_stack")
_function_modes: Callable[[], int] = _required("torch._C._len_torch_function_stack")
_function_mode_at: Callable[[int], Any] = _required("torch._C._get_function_stack_at")
_DefaultDevice: Any = _required("torch.utils._device.DeviceContext")
_tracing_state: Callable[[], Any] = _required("torch._C._get_tracing_state")
_TracingContext: Any = _required("torch._guards.TracingContext")
_required("torch.autograd.forward_ad._current_level")


def active_mode() -> str | None:
    """Returns the active mode that requires torch's operators instead of a kernel, or None."""
    if MISSING:
        return f"this version of torch lacks {MISSING}"
    if _tracing_state() is not None:
        return "torch.jit.trace"
    if functorch_is_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    if dispatch_modes() or (_function_modes() and has_function_mode()):
        if (checkpoint := _checkpoint()) is not None:
            _checkpoints.add(checkpoint)
        return "a torch dispatch or function mode"
    if _checkpoints and _checkpoint() in _checkpoints:
        return "a torch dispatch or function mode in the checkpoint's forward pass"
    return None


def has_function_mode() -> bool:
    """Returns whether a function mode is active, other than the mode of a default device."""
    return any(type(_function_mode_at(i)) is not _DefaultDevice for i in range(_function_modes()))


@contextmanager
def default_state() -> Iterator[None]:
    """Lets CPU operators of this thread run without autocast and modes, with torch's default flags.

    The flags belong to the process, so only those that differ are set.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        for guard in (torch._C.DisableTorchFunction, torch._C._DisableTorchDispatch):
            stack.enter_context(guard())
        if not torch._C._get_mkldnn_enabled():
            torch._C._set_mkldnn_enabled(True)
            stack.callback(torch._C._set_mkldnn_enabled, False)
        products = "mkldnn", "matmul"
        precision = torch._C._get_fp32_precision_getter(*products)
        if precision not in ("none", "ieee"):
            torch._C._set_fp32_precision_setter(*products, "ieee")
            stack.callback(_restore_precision, products, precision)
        yield


def _restore_precision(products: tuple[str, str], precision: str) -> None:
    """Restores the precision of products, by inheriting it if the backend has the same."""
    for value in ("none", precision):
        if torch._C._get_fp32_precision_getter(*products) != precision:
            torch._C._set_fp32_precision_setter(*products, value)


def compiler_traces() -> bool:
    """Returns whether torch.compile is compiling in this thread, in Dynamo or a later stage."""
    return is_dynamo_compiling() or (not MISSING and _TracingContext.try_get() is not None)


def is_exporting() -> bool:
    """Returns whether a program is being exported.

    In torch 2.11, ``torch.compiler.is_exporting`` is also true in compiled programs.
    """
    return getattr(torch.compiler, "_is_exporting_flag", None) or False


# ---- autograd ------------------------------------------------------------------------------------

# Whether this backward pass retains the graph. If not, saved tensors may be overwritten.
graph_is_retained: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
# A number for the backward pass that runs in this thread.
current_graph_task: Callable[[], Any] = getattr(torch._C, "_current_graph_task_id", object)


def at_end_of_backward(function: Callable[[], None]) -> bool:
    """Calls a function when the backward pass ends that runs in this thread.

    Returns False if none runs.
    """
    queue = getattr(torch.autograd.Variable._execution_engine, "queue_callback", None)
    if queue is None or current_graph_task() == -1:
        return False
    queue(function)
    return True


_NO_INPUT = torch.zeros((), device="cpu", requires_grad=True)


class _Node(torch.autograd.Function):
    """A node that only saves a tensor."""

    @staticmethod
    def forward(ctx: Any, no_input: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return no_input.clone()


class _SavedTensor:
    """A tensor saved by torch 2.11, where only a node can save one."""

    def __init__(self, tensor: Tensor, _is_output: bool) -> None:
        with torch.enable_grad():  # the result keeps its node
            self.result: Any = _Node.apply(_NO_INPUT, tensor)  # type: ignore[no-untyped-call]

    def unpack(self) -> Tensor:
        return self.result.grad_fn.saved_tensors[0]  # type: ignore[no-any-return]


# Saves one tensor as ``save_for_backward`` does; the second argument is whether it is an output.
# ``unpack()`` of the result returns the tensor, or raises if it was modified.
save_apart: Any = getattr(torch._C._autograd, "_make_saved_tensor", _SavedTensor)
# The active hooks for saved tensors, or None.
saved_tensors_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: (None, None)
)
# A context without the active transforms of torch.func.
without_transforms: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._functorch.pyfunctorch, "temporarily_clear_interpreter_stack", nullcontext
)


def apply_of(function: Any) -> Any:
    """Returns ``function.apply`` of an autograd function, without its check for torch.func.

    The check takes 1.8 of 4.3 us. The result must not be called while transforms of torch.func are
    active.
    """
    apply = vars(getattr(torch._C, "_FunctionBase", object)).get("apply")
    return function.apply if apply is None else apply.__get__(None, function)


# The checkpoints whose forward pass falls back to torch because of a mode. The recomputation, which
# runs without the mode, must also fall back, because it must save the same tensors.
_checkpoints: set[weakref.ref[Any]] = set()
_CheckpointFrame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)


def _checkpoint() -> weakref.ref[Any] | None:
    """Returns a reference to torch's frame of the current non-reentrant checkpoint, or None.

    It is only reachable through the closures of the checkpoint's saved-tensor hooks. In versions of
    torch that hide it, a mode that is active only in the forward pass makes torch raise an error.
    """
    hooks = saved_tensors_hooks(True)
    pack = inspect.unwrap(hooks[0]) if hooks else None
    for cell in getattr(pack, "__closure__", None) or ():
        record = cell.cell_contents
        record = record() if isinstance(record, weakref.ref) else record
        if type(record) is _CheckpointFrame:
            return weakref.ref(record, _checkpoints.discard)
    return None


# ---- functions -----------------------------------------------------------------------------------


def skip_frames(function: Any, *, and_calls: bool = True) -> None:
    """Makes torch.compile not compile the frames of a function, and of the functions it calls.

    Calls of the function in a compiled program are still traced.
    """
    frames: Any = getattr(torch._C._dynamo, "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        action = frames._FrameAction
        strategy = action.SKIP, action.SKIP if and_calls else action.DEFAULT
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(*strategy))


def never_traced(function: Function) -> Function:
    """Makes torch.compile trace neither a function nor the functions it calls.

    Like ``torch.compiler.disable``, without importing torch's compiler.
    """
    vars(function)["_torchdynamo_disable"] = True
    skip_frames(function)
    return function


def called_while_tracing(function: Function) -> Function:
    """Makes torch.compile call a function while it traces a program, and use the result there.

    Like ``torch.compiler.assume_constant_result``, without importing torch's compiler.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def _tracer() -> Any:
    """Returns the translator of the frame that Dynamo traces in this thread, or None."""
    translator: Any = sys.modules.get("torch._dynamo.symbolic_convert")
    try:
        return translator.InstructionTranslator.current_tx()
    except AttributeError:  # nothing is traced, or another version of torch
        return None


@called_while_tracing
def graph_is_whole() -> bool:
    """Returns whether Dynamo must not break the graph of the program that it traces."""
    return _is_whole(_tracer())


def _is_whole(tracer: Any) -> bool:
    try:
        is_part = tracer.output.current_tracer.parent is not None  # of a higher-order operator
        whole = tracer.one_graph or tracer.export or tracer.error_on_graph_break
    except AttributeError:  # another version of torch
        return True
    return bool(whole or is_part or functorch_is_active())


def size_hint(size: int) -> int:
    """Returns the value of a symbolic size in the traced call, without a guard; 0 if unknown."""
    from torch.fx.experimental import symbolic_shapes  # imported late because it is slow to import

    of_torch_2_11 = getattr(symbolic_shapes, "size_hint", None)
    hint: Any = getattr(symbolic_shapes, "optimization_hint", of_torch_2_11)
    known: int = 0 if hint is None else hint(size, 0)
    return known


def forget_functions() -> None:
    """Makes Dynamo look up torch's functions again, after others have replaced them."""
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if hasattr(rules, "get_torch_obj_rule_map"):
        rules.get_torch_obj_rule_map.cache_clear()


def leave_traced_frame() -> None:
    """Makes Dynamo leave the traced frame to Python, unless its graph must not break.

    Dynamo still compiles other frames, including the functions that this frame calls.
    """
    tracer = _tracer()
    if tracer is not None and not _is_whole(tracer):
        raise sys.modules["torch._dynamo.exc"].SkipFrame("lazy logits are not traced")


def is_compiled_module(module: Any) -> bool:
    """Returns whether a module was compiled by ``module.compile()`` or ``torch.compile``."""
    kind = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(module, kind)


def has_own_hooks(module: Any) -> bool:
    """Returns whether a module has hooks, apart from those of all modules."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fsdp_policy(module: Any) -> Any:
    """Returns the mixed-precision policy of a unit of ``fully_shard``, None for other modules."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    return getattr(state, "_mp_policy", None)


# ---- tracing of formulas -------------------------------------------------------------------------

# If the table is missing, only CompositeImplicitAutograd operators are decomposed.
decomposition_table: Mapping[Any, Callable[..., Any]] = getattr(
    torch._decomp, "decomposition_table", {}
)


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that can be entered without importing torch's compiler (one second)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# ---- Triton --------------------------------------------------------------------------------------


def triton_specializer() -> Any:
    """Returns Triton's function that specializes an argument of a launch, or None if it lacks it.

    Its arguments may differ in releases that pyfused is not tested with.
    """
    try:
        return pkgutil.resolve_name("triton._C.libtriton:native_specialize_impl")
    except (ImportError, AttributeError):
        return None
