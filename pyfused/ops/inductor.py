"""Logits made float32 just before a compiled loss reach the kernels as they were.

To Inductor a custom operator is a wall: ``cross_entropy(logits.float(), target)`` would write a
float32 copy for the operator to read. The kernels compute in float32 whatever they read, and round
a gradient once, as the cast's backward does. So the cast can go, on the way in and on the way out.

This is a pattern of Inductor's own table, beside those of its users. Where a version of torch has
no such table the copy stays.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

Node = Any  # torch.fx.Node, whose arguments may be anything

_HALVES = (torch.bfloat16, torch.float16)
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = tuple(getattr(torch.ops.aten, op).default for op in ("view", "reshape", "permute"))
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
