"""What the kernels can do with a compiled graph that Inductor cannot: two patterns of its table.

To Inductor a custom operator is a wall: ``cross_entropy(logits.float(), target)`` would write a
float32 copy for the operator to read. The kernels compute in float32 whatever they read, and round
a gradient once, as the cast's backward does. So the cast goes, on the way in and on the way out.

A loss of few classes takes its time for exponentials, which forward and backward both need. There
the forward operator computes the gradient too, and what is left of the backward is a product.

The patterns stand in Inductor's own table, beside those of its users. Where a version of torch has
no such table, the graph stays as it was.
"""

from __future__ import annotations

import sys
from operator import getitem
from typing import Any

import torch

from pyfused.ops.gradients import gradients_in_forward

Node = Any  # torch.fx.Node, whose arguments may be anything

_HALVES = (torch.bfloat16, torch.float16)
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = tuple(getattr(torch.ops.aten, op).default for op in ("view", "reshape", "permute"))

# Where a gradient computed in the forward pass pays, by up to 1.5 times: with few classes, and in
# memory that malloc reuses. Otherwise the product costs more than it saves. Measured forward +
# backward, 2 threads, x86-64-v4.
_FEW_CLASSES, _REUSED_BYTES = 128, 31 << 20

_registered = False


# ---- two patterns: an operator that is given a cast ----------------------------------------------


def register() -> None:
    """Adds the patterns, once, if Inductor is compiling: nothing else imports what they go into."""
    global _registered
    table = sys.modules.get("torch._inductor.fx_passes.joint_graph")
    if _registered or table is None:
        return
    _registered = True
    try:
        from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

        for op, rewrite in (
            (torch.ops.pyfused.cross_entropy.default, _forward),
            (torch.ops.pyfused.cross_entropy_backward.default, _backward),
        ):
            register_graph_pattern(CallFunctionVarArgs(op), pass_dict=table.patterns)(rewrite)
    except (AttributeError, ImportError, TypeError):
        return


def _forward(match: Any, input: Node, target: Node, *_: Any) -> None:
    node = match.output_node()
    half = _before_cast(input, target)
    if half is not None:
        _replace_input(node, 0, half)
    else:
        _compute_gradient_in_forward(node)


def _backward(match: Any, _grad_output: Node, input: Node, target: Node, *_: Any) -> None:
    """Only where the gradient is needed in half precision alone."""
    node = match.output_node()
    half = _before_cast(input, target)
    if half is None:
        return
    dtype = half.meta["val"].dtype
    casts, path = [], [user for user in node.users if user.args[1] == 0]
    for step in path:
        for user in step.users:
            if user.target in _VIEWS:
                path.append(user)
            elif user.target is _CAST and user.args[1] is dtype:
                casts.append(user)
            else:
                return
    _replace_input(node, 1, half)
    node.meta["val"] = (node.meta["val"][0].to(dtype), *node.meta["val"][1:])
    for step in path:
        step.meta["val"] = step.meta["val"].to(dtype)
    for cast in casts:
        cast.replace_all_uses_with(cast.args[0])
        cast.graph.erase_node(cast)


def _compute_gradient_in_forward(forward: Node) -> None:
    """Merges an operator and its backward, which would read the logits and exponentiate again."""
    input, reduction, graph = forward.args[0], forward.args[4], forward.graph
    operator = torch.ops.pyfused.cross_entropy_backward.default
    found = (n for n in input.users if n.target is operator and n.args[1:-1] == forward.args)
    backward = next(found, None)
    if backward is None or not _pays(input.meta["val"], reduction):
        return
    grad_output, *arguments = backward.args
    with graph.inserting_before(forward):
        both = graph.call_function(
            torch.ops.pyfused.cross_entropy_with_gradients.default, tuple(arguments)
        )
        both.meta = {**forward.meta, "val": (forward.meta["val"], *backward.meta["val"])}
        both.meta.pop("eager_input_vals", None)
        loss = graph.call_function(getitem, (both, 0))
        loss.meta = forward.meta
    forward.replace_all_uses_with(loss)
    graph.erase_node(forward)
    for part in list(backward.users):
        with graph.inserting_before(part):
            gradient = graph.call_function(getitem, (both, part.args[1] + 1))
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (gradient, grad_output))
        gradient.meta, scaled.meta = dict(part.meta), part.meta
        part.replace_all_uses_with(scaled)
        graph.erase_node(part)
    graph.erase_node(backward)


def _pays(input: torch.Tensor, reduction: str) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    few = input.shape[min(1, input.dim() - 1)] <= _FEW_CLASSES
    reused = input.numel() * input.element_size() <= _REUSED_BYTES
    known = statically_known_true(few) and statically_known_true(reused)
    return known and gradients_in_forward(reduction, input)


def _before_cast(node: Node, target: Node) -> Node | None:
    """The half-precision tensor whose float32 copy ``node`` is, in the shape of ``node``."""
    views = []
    while node.target in _VIEWS:
        views.append(node)
        node = node.args[0]
    if node.target is not _CAST or target.meta["val"].is_floating_point():
        return None
    half, dtype = node.args
    value = half.meta["val"]
    if dtype is not torch.float32 or value.dtype not in _HALVES:
        return None
    if views and value.stride() != node.meta["val"].stride():
        return None  # what is a view of the copy may be none of the original
    for view in reversed(views):
        half = view.graph.call_function(view.target, (half, *view.args[1:]))
        half.meta.update(view.meta, val=view.meta["val"].to(value.dtype))
    return half


def _replace_input(node: Node, index: int, half: Node) -> None:
    node.update_arg(index, half)
    node.meta.pop("eager_input_vals", None)  # which Inductor would bring the input's layout to
