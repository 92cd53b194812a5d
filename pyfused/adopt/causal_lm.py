"""Language models: their head and loss as ``linear_cross_entropy``.

A model and its head get subclasses of their classes, of the same names. In training the model's own
``forward`` runs, with the model itself, and its head returns the logits of `deferred.py`,
which nobody has computed: their cross-entropy is that of the hidden states and the head's weight,
and whatever else reads them computes them, so that the results are those of the model in any case.

A head is replaced while it is nothing but its weight and bias. The first loss of a model is also
computed by torch, some rows of logits at a time, with the gradient of the head's input: if they
differ the model gets its own ``forward`` again. That takes the time of one more head and loss once,
and the memory of those rows.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Linear, Module
from torch.nn import functional as F

from pyfused.adopt import deferred, subclass
from pyfused.adopt.deferred import LOSS
from pyfused.torch_internals import active_mode

# ---- a model's forward with another head ---------------------------------------------------------

_thread = threading.local()  # its attribute call: the call of a model that runs in the thread
OUTPUT, COMPARED = "the output", "the first loss was compared"
ROWS_BYTES = 16 << 20  # of logits at once, where torch computes a loss to compare
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # which autocast casts
# torch has no public name for that. Global hooks see logits whose reads compute them.
_has_any_global_hook = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: False)


class _Call:
    """One call of a model whose head defers its logits.

    Attributes:
        told: What the model's owner has been told, and whether a loss has been compared.
        differs: How the first loss differs from torch's.
    """

    def __init__(self, model: Any, head: Any, told: set[str]) -> None:
        self.model, self.head, self.told = model, head, told
        self.families: list[deferred.Family] = []
        self.differs: str | None = None
        self.hooks = deferred.hooks()

    def run(self, kind: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
        """Returns the output of the model's own ``forward``, and who has read its logits."""
        before, _thread.call = getattr(_thread, "call", None), self
        try:
            output = _finished(kind.forward(self.model, *args, **kwargs))
            for family in self.families:
                if family.is_kept():  # beyond the call, when its weight may change
                    family.compute("what outlives its forward")
            return output, [use for family in self.families for use in family.uses]
        finally:
            _thread.call = before
            for family in self.families:
                family.nodes.clear()
            self.families.clear()

    def logits(self, hidden: Tensor) -> Any:
        """Returns the deferred logits of hidden states, or None where the head has to run."""
        if not torch.is_grad_enabled() or not _is_usable(self.head, hidden):
            return None
        reason = _reason(self.head, hidden)
        if self.hooks != deferred.hooks():
            reason = "a checkpoint within its forward calls its head"  # and again in backward
        if reason is not None:
            return _tell(self.model, self.told, reason)
        family = deferred.Family(self, hidden, self.head.weight, self.head.bias)
        self.families.append(family)
        return family.logits()

    def accepts(self, node: Any, target: Tensor, options: dict[str, Any]) -> bool:
        """Returns whether a loss is the one that torch computes; the first one is compared."""
        if COMPARED not in self.told and self.differs is None:
            differs = _loss_differs(node, target, options)
            self.differs = differs or None
            if differs == "":
                self.told.add(COMPARED)
        return self.differs is None


def _head_forward(kind: Any) -> Any:
    """Returns the ``forward`` of a head's subclass."""

    @wraps(kind.forward)
    def forward(head: Any, input: Tensor) -> Any:
        call = getattr(_thread, "call", None)
        logits = call.logits(input) if call is not None and call.head is head else None
        return kind.forward(head, input) if logits is None else logits

    return forward


_HEAD = subclass.subclass(Linear, _head_forward)


def _is_usable(head: Any, hidden: Any) -> bool:
    """Returns whether a call of a head is one that torch takes, with an ordinary gradient."""
    if is_dynamo_compiling():
        return True
    if type(hidden) not in deferred.PLAIN:
        return False
    tensors = [x for x in (hidden, head.weight, head.bias) if x is not None]
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return (
        hidden.layout is torch.strided
        and not (hidden.is_nested or hidden.is_inference())
        and hidden.numel() > 0
        and hidden.shape[-1:] == head.weight.shape[-1:]
        and all(x.dtype in _DTYPES if autocast else x.dtype is hidden.dtype for x in tensors)
        and any(x.requires_grad for x in tensors)
        and active_mode() is None
    )


def _reason(head: Any, hidden: Tensor | None = None) -> str | None:
    """Returns why a head is more than its weight and bias, which then makes its own logits.

    Args:
        hidden: What the head is called with, to which its weight and bias have to fit.
    """
    if type(head) not in (Linear, _HEAD):
        return f"its head is a {type(head).__name__}, and no plain torch.nn.Linear"
    if "forward" in vars(head):
        return "the forward of its head was replaced, as accelerate does to offload it"
    if (
        head._forward_hooks
        or head._forward_pre_hooks
        or head._backward_hooks
        or head._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return "its head has hooks"
    if head._compiled_call_impl is not None:
        return "its head is compiled by itself"
    for name, value in (("weight", head.weight), ("bias", head.bias)):
        if hidden is None or value is None:
            continue
        if not is_dynamo_compiling() and type(value) not in deferred.PLAIN:
            return f"the {name} of its head is a {type(value).__name__}"
        if value.device != hidden.device:
            return f"the {name} of its head is on {value.device}, and its input on {hidden.device}"
        if value.numel() == 0:
            return f"the {name} of its head has no elements"
    return None


def _finished(output: Any) -> Any:
    """Returns a model's output with None for logits of which the loss alone was asked."""
    if deferred.is_deferred(output):
        family = output._node.family
        if not family.computed and set(family.uses) == {LOSS}:
            return None
        family.compute(OUTPUT)
        result = deferred.computed(output)
        return result.view_as(result) if family.traced else result  # without our attribute
    if isinstance(output, tuple):
        parts = list(map(_finished, output))
        if all(part is given for part, given in zip(parts, output, strict=True)):
            return output
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, dict):
        found = {name: _finished(value) for name, value in output.items()}
        if all(found[name] is value for name, value in output.items()):
            return output
        return found if type(output) is dict else type(output)(**found)
    return output


# ---- which models --------------------------------------------------------------------------------


def _head_of(model: Any) -> str | None:
    """Returns the name of a model's head among its own modules."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_children() if module is head), None)


def has_head(module: Any) -> bool:
    """Returns whether it is a model of transformers with a head of logits."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return module.get_output_embeddings() is not None


def reason_to_leave(model: Any, vouched: str | None = None) -> str | None:
    """Returns why a model that has a head keeps its ``forward``.

    Args:
        vouched: The name of the head that a user vouches for; None for that of transformers.

    Raises:
        ValueError: There is no such head.
    """
    if subclass.is_fused(model):
        return "is pyfused's already"
    if vouched is not None:
        heads = [name for name, module in model.named_children() if type(module) in (Linear, _HEAD)]
        if vouched not in heads:
            raise ValueError(f"head: expected the name of a Linear, {heads}, got {vouched!r}")
    if "forward" in vars(model):
        return "its forward was replaced"
    head = vouched or _head_of(model)
    if head is None or type(getattr(model, head)) not in (Linear, _HEAD):
        return "its head is no plain torch.nn.Linear"
    reason = _reason(getattr(model, head))
    if vouched is not None or reason is not None:
        return reason
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return "its forward takes no labels"
    return None if getattr(model, head).weight.is_meta else _difference(model, head)


def fuse(model: Any, head: str | None = None) -> None:
    """Gives a model and its head the subclasses of their classes.

    Args:
        head: The name of the head that a user vouches for; None for that of transformers.
    """
    setattr(model, subclass.MARK, set())  # of what its owner has been told
    _fuse_head(getattr(model, head or _head_of(model) or ""))
    subclass.fuse(model, _fused_forward, head)


def _fuse_head(head: Any) -> None:
    if type(head) is Linear:
        setattr(head, subclass.MARK, True)
        subclass.fuse(head, _head_forward)


def _fused_forward(kind: Any, head: str | None) -> Any:
    """Returns the ``forward`` of a model's subclass."""
    parameters = inspect.signature(kind.forward)

    @wraps(kind.forward)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        name = head
        if name is None and _wants_loss_alone(model, parameters, args, kwargs):
            name = _head_of(model)
        if name is None or not model.training:
            return kind.forward(model, *args, **kwargs)
        layer, told = getattr(model, name), vars(model).get(subclass.MARK)
        told = told if isinstance(told, set) else set()
        reason = _reason(layer)
        if reason is not None:
            _tell(model, told, reason)
            return kind.forward(model, *args, **kwargs)
        if not is_dynamo_compiling():
            _fuse_head(layer)  # one that was put there since
        call = _Call(model, layer, told)
        output, uses = call.run(kind, args, kwargs)
        if call.differs is not None:
            _tell(model, told, f"its {call.differs}. Its own forward is used from now on")
            unfuse(model)
            return output
        reads = [use for use in dict.fromkeys(uses) if use not in (LOSS, OUTPUT)]
        if reads:
            _tell(model, told, f"its logits are read by {', '.join(reads)}")
        return output

    return forward


def unfuse(model: Any) -> None:
    """Gives a model its own ``forward``. That of its head is torch's without one of ours."""
    delattr(model, subclass.MARK)
    subclass.unfuse(model)


def _tell(model: Any, told: set[str], reason: str) -> None:
    if reason not in told and not is_dynamo_compiling():
        told.add(reason)
        message = f"pyfused.convert: {type(model).__name__} computes all of its logits: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _wants_loss_alone(
    model: Any, parameters: inspect.Signature, args: Any, kwargs: dict[str, Any]
) -> bool:
    """Returns whether a model's call has labels, and nothing that needs the logits."""
    given = parameters.bind(model, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    keep = given.get("logits_to_keep", 0)
    return (
        given.get("labels") is not None
        and "_loss_function" not in vars(model)  # one of the user's own
        and isinstance(keep, int)
        and keep == 0
        and given.get("return_dict", model.config.return_dict) is not False
    )


# ---- whether it is the same ----------------------------------------------------------------------


def _loss_differs(node: Any, target: Tensor, options: dict[str, Any]) -> str | None:
    """Returns how a loss or its gradient differs from torch's: "" not at all, None is unknown."""
    rows = node.rows.detach().requires_grad_()
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    dtype = node.family.nodes[0].example.dtype
    size = max(1, ROWS_BYTES // (4 * len(node.family.inputs[1])))
    losses, gradients = [], []
    valid = (target != options["ignore_index"]).sum() if options["reduction"] == "mean" else 1
    with deferred.saved_here():
        loss = node.loss(rows, target, options)
        upstream = torch.ones_like(loss) * valid
        (gradient,) = torch.autograd.grad(loss, rows, upstream)
        for some, targets in zip(rows.split(size), target.split(size), strict=True):
            some = some.detach().requires_grad_()
            each = F.cross_entropy(node.recompute(some), targets, **options | {"reduction": "none"})
            gradients += torch.autograd.grad(each.sum(), some)
            losses.append(each.detach())
    each = torch.cat(losses).float()
    expected = each if options["reduction"] == "none" else each.sum() / valid
    for what, ours, theirs in (
        ("loss", loss.detach(), expected),
        ("gradient", gradient, torch.cat(gradients)),
    ):
        off, size_of = (ours.float() - theirs.float()).norm(), theirs.float().norm()
        if not size_of.isfinite():
            return None
        if not off <= _tolerance(dtype) * size_of:
            return f"{what} differs from torch's by {float(off / size_of):.2g}"
    return ""


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-3, 16 * torch.finfo(dtype).eps)


TOKENS = 5


class _Decoder:
    """Stands for what computes hidden states, and returns some that are given."""

    def __init__(self, module: Module, hidden: Tensor) -> None:
        self.module, self.hidden = module, hidden

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Outputs(self.hidden)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return _Decoder(value, self.hidden) if isinstance(value, Module) else value


class _Outputs:
    """The outputs of a decoder: hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else () if isinstance(index, slice) else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _difference(model: Any, name: str) -> str | None:
    """Returns how the loss of random hidden states, or its gradient, differs, or None.

    The ``forward`` of a shallow copy of the model runs twice, once with deferred logits, and with a
    decoder that returns the hidden states. So nothing of the model changes, and a few rows of
    logits are all it takes.
    """
    head, children = getattr(model, name), dict(model.named_children())
    kinds = sys.modules["transformers"].PreTrainedModel
    bases = [n for n, m in children.items() if m is model.base_model or isinstance(m, kinds)]
    if not bases:
        return "its hidden states are no output of a base model"
    generator = torch.Generator().manual_seed(0)
    weight = head.weight
    values = torch.randn(1, TOKENS, head.in_features, generator=generator)
    hidden = values.to(weight.device, weight.dtype).requires_grad_()
    labels = torch.randint(len(weight), (1, TOKENS), generator=generator).to(weight.device)
    labels[0, 1] = -100
    given: dict[str, Any] = {"input_ids": torch.zeros_like(labels), "labels": labels}
    if "output_router_logits" in inspect.signature(type(model).forward).parameters:
        given["output_router_logits"] = False
    kind, twin, twin_head = type(model), copy.copy(model), copy.copy(head)
    _fuse_head(twin_head)
    decoders = {base: _Decoder(children[base], hidden) for base in bases}
    vars(twin)["_modules"] = model._modules | decoders | {name: twin_head}
    devices = [weight.device] if weight.is_cuda else []
    found: list[Any] = []
    uses: list[str] = []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            for of in (head, twin_head):
                output, uses = _Call(twin, of, {COMPARED}).run(kind, (), given)
                found.append((output.loss, *torch.autograd.grad(output.loss, hidden)))
    except Exception as error:
        return f"its forward was tried with given hidden states and has raised {error!r}"
    if set(uses) != {LOSS}:
        read = ", ".join(dict.fromkeys(use for use in uses if use != LOSS))
        return f"its logits are read by {read or 'no cross-entropy'}, beside its loss"
    for what, theirs, ours in zip(("loss", "gradient"), *found, strict=True):
        off = (ours - theirs).abs().max() / theirs.abs().max()
        if not off <= _tolerance(weight.dtype):
            return f"its {what} differs from that of head and cross-entropy by {float(off):.2g}"
    return None
