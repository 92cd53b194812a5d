"""Language models: their head and loss as ``linear_cross_entropy``.

A model gets a subclass of its class, of the same name. In training its own ``forward`` runs, but
its head returns :class:`DeferredLogits`: what scales, caps or flattens these is noted, and their
cross-entropy is that of the hidden states and the head's weight. Whatever else reads them gets
logits that are computed then, so that the results are those of the model in any case.
"""

from __future__ import annotations

import inspect
import math
import sys
from functools import wraps
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F

from pyfused import subclass
from pyfused.functional import linear_cross_entropy

# ---- logits that nobody has computed -------------------------------------------------------------


class DeferredLogits:
    """The output of a linear layer, which is computed when something else than its loss is asked.

    The logits are ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, of ``x =
    linear(hidden, head.weight, head.bias)``.

    Attributes:
        uses: What their cross-entropy, and what else, was asked for, by name; shared by all that
            follow from one call of the head.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Linear,
        uses: list[str],
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
        cap: float | None = None,
    ) -> None:
        self.hidden, self.head, self.uses = hidden, head, uses
        self.dtype, self.scale, self.cap = dtype or hidden.dtype, scale, cap
        self.computed: Tensor | None = None

    def _with(self, **changed: Any) -> DeferredLogits:
        given = vars(self) | changed
        del given["computed"]
        return DeferredLogits(**given)

    def tensor(self, reader: str) -> Tensor:
        """Returns the logits, computed once, and notes who has read them."""
        self.uses.append(reader)
        if self.computed is None:
            x = F.linear(self.hidden, self.head.weight, self.head.bias).to(self.dtype)
            x = x if self.cap is None else self.cap * torch.tanh(x / self.cap)
            self.computed = x if self.scale == 1 else x * self.scale
        return self.computed

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], len(self.head.weight)))

    device = property(lambda self: self.hidden.device)
    ndim = property(lambda self: self.hidden.ndim)

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> DeferredLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args == (torch.float32,):
            return self._with(dtype=torch.float32)
        if not kwargs and args == (self.device,):
            return self
        return self.tensor("to").to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self.computed is None and tuple(shape)[-1:] == self.shape[-1:]:
            return self._with(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))
        return self.tensor("view").view(*shape)

    reshape = view

    def flatten(self, start: int = 0, end: int = -1) -> Any:
        if self.computed is None and end in (-2, self.ndim - 2):
            return self._with(hidden=self.hidden.flatten(start, end))
        return self.tensor("flatten").flatten(start, end)

    def __getitem__(self, index: Any) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (int, slice, EllipsisType)) for i in given)
        if self.computed is None and plain:
            few = ... not in given and len(given) < self.ndim
            if few or given[-1] in (..., slice(None)):  # which leaves the classes as they are
                return self._with(hidden=self.hidden[index])
        return self.tensor("indexing")[index]

    def __mul__(self, factor: Any) -> Any:
        if self.computed is None and isinstance(factor, (int, float)):
            scale = self.scale * factor
            return self._with(scale=1.0 if math.isclose(scale, 1.0) else scale)
        return self.tensor("multiplication") * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, (int, float)) and divisor:
            return self * (1 / divisor)
        return self.tensor("division") / divisor

    def tanh(self) -> Any:
        if self.computed is None and self.cap is None and self.scale > 0:
            return self._with(cap=1 / self.scale, scale=self.scale)
        return self.tensor("tanh").tanh()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(name), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        if args and isinstance(args[0], DeferredLogits):
            if name == "tanh":
                return args[0].tanh()
            if name == "cross_entropy":
                return args[0].cross_entropy(*args[1:], **kwargs)

        def computed(x: Any) -> Any:
            if isinstance(x, DeferredLogits):
                return x.tensor(name)
            return type(x)(map(computed, x)) if type(x) in (list, tuple) else x

        return function(*computed(args), **{key: computed(x) for key, x in kwargs.items()})

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Any = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Returns what torch's function of this name returns of the logits."""
        legacy = weight is not None or size_average is not None or reduce is not None
        rows = self.ndim == 2 and not target.is_floating_point() and self.scale > 0
        if legacy or not rows or self.computed is not None:
            options = weight, size_average, ignore_index, reduce, reduction, label_smoothing
            return F.cross_entropy(self.tensor("cross_entropy"), target, *options)
        self.uses.append(LOSS)
        return linear_cross_entropy(
            self.hidden,
            self.head.weight,
            target,
            linear_bias=self.head.bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=self.cap,
            scale=self.scale,
            loss_dtype=None if self.dtype is self.hidden.dtype else self.dtype,
        )


LOSS = "its loss"


def _reads(name: str) -> Any:
    """Returns the result of an operator of tensors, which needs the logits."""

    def read(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.tensor(name.strip("_")), name)(*others)

    return read


setattr(DeferredLogits, "float", lambda self: self.to(torch.float32))  # noqa: B010 a type's name
for _name in ("add", "radd", "sub", "rsub", "matmul", "neg", "pow", "rtruediv", "gt", "lt", "eq"):
    setattr(DeferredLogits, f"__{_name}__", _reads(f"__{_name}__"))


def _finished(output: Any) -> Any:
    """Returns a model's output with None for logits of which the loss alone was asked."""
    if isinstance(output, DeferredLogits):
        if output.computed is None and set(output.uses) == {LOSS}:
            return None
        return output.tensor("the output")
    if isinstance(output, tuple):
        parts = list(map(_finished, output))
        if all(part is given for part, given in zip(parts, output, strict=True)):
            return output
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, dict):
        found = {name: _finished(value) for name, value in output.items()}
        same = all(found[name] is value for name, value in output.items())
        return output if same else type(output)(**found)
    return output


# ---- a model's forward with another head ---------------------------------------------------------


class _Head:
    """Stands for a head, and returns deferred logits."""

    def __init__(self, head: Linear, uses: list[str]) -> None:
        self.head, self.uses = head, uses

    def __call__(self, hidden: Tensor) -> DeferredLogits:
        return DeferredLogits(hidden, self.head, self.uses)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class _Stand:
    """Stands for a model within its ``forward``, with some of its modules replaced."""

    def __init__(self, model: Any, replaced: dict[str, Any]) -> None:
        vars(self).update(_model=model, _replaced=replaced)

    def __getattr__(self, name: str) -> Any:
        replaced = vars(self)["_replaced"]
        return replaced[name] if name in replaced else getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_model"], name, value)


def _forward(kind: Any, model: Any, head: str, *args: Any, **kwargs: Any) -> Any:
    replaced = {head: _Head(getattr(model, head), [])}
    return _finished(kind.forward(_Stand(model, replaced), *args, **kwargs))


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
        heads = [name for name, module in model.named_children() if type(module) is Linear]
        if vouched not in heads:
            raise ValueError(f"head: expected the name of a Linear, {heads}, got {vouched!r}")
    if "forward" in vars(model):
        return "its forward was replaced"
    if vouched is not None:
        return None
    head = _head_of(model)
    if head is None or type(getattr(model, head)) is not Linear:
        return "its head is no plain torch.nn.Linear"
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return "its forward takes no labels"
    return None if getattr(model, head).weight.is_meta else _difference(model, head)


def fuse(model: Any, head: str | None = None) -> None:
    """Gives a model the subclass of its class.

    Args:
        head: The name of the head that a user vouches for; None for that of transformers.
    """
    subclass.fuse(model, _fused_forward, head)


def _fused_forward(kind: Any, head: str | None) -> Any:
    """Returns the ``forward`` of a model's subclass."""
    parameters = inspect.signature(kind.forward)

    @wraps(kind.forward)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        name = head
        if name is None and _wants_loss_alone(model, parameters, args, kwargs):
            name = _head_of(model)
        if name is None or not model.training or not _is_plain(getattr(model, name)):
            return kind.forward(model, *args, **kwargs)
        return _forward(kind, model, name, *args, **kwargs)

    return forward


def _is_plain(head: Any) -> bool:
    """Returns whether nobody has put something of their own where the logits would be."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is Linear and not hooks


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

    The model's ``forward`` runs twice, once with deferred logits, and with a decoder that returns
    the hidden states. So nothing of the model changes, and a few rows of logits are all it takes.
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
    uses: list[str] = []
    decoder = {base: _Decoder(children[base], hidden) for base in bases}
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            found = [
                (loss, *torch.autograd.grad(loss, hidden))
                for replaced in ({}, {name: _Head(head, uses)})
                for loss in [type(model).forward(_Stand(model, decoder | replaced), **given).loss]
            ]
    except Exception as error:
        return f"its forward was tried with given hidden states and has raised {error!r}"
    if set(uses) != {LOSS}:
        read = ", ".join(dict.fromkeys(use for use in uses if use != LOSS))
        return f"its logits are read by {read or 'no cross-entropy'}, beside its loss"
    tolerance = max(1e-3, 16 * torch.finfo(weight.dtype).eps)
    for what, ours, theirs in zip(("loss", "gradient"), *reversed(found), strict=True):
        off = (ours - theirs).abs().max() / theirs.abs().max()
        if not off <= tolerance:
            return f"its {what} differs from that of head and cross-entropy by {float(off):.2g}"
    return None
