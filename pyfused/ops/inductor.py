"""What becomes of custom operators in Inductor's graph of forward and backward, by its patterns.

To Inductor a custom operator is a wall: what comes before it is written to memory for the operator
to read, and what it returns is read there. So an operator stays only between tensors that are in
memory anyway: inputs and outputs of the graph, and those of matrix products and the like. Any other
becomes torch's again, forward and backward, and Inductor fuses it with its neighbours.

cross_entropy stays anywhere, and loses a cast to float32 before it. The kernels compute in float32
whatever they read, and round a gradient once, as the cast's backward does. So the cast goes, on the
way in and on the way out.

The forward operator of cross_entropy computes the gradient too where that saves more than it costs,
as the gradient has to be multiplied by the loss's. On GPUs that is where matrix products alone read
it, as in a model's head: a small operand or result of theirs is multiplied instead. On CPUs that
takes as long either way and rounds once more. It pays there with few classes, where exponentials
take the time, which forward and backward both need.

The patterns stand in Inductor's own table, beside those of its users. Where a version of torch has
no such table, the graph stays as it was, and further calls are left to Inductor. Inductor keeps
compiled programs on disk, by their graphs and not by its table. So the key names this version too:
no program of another version is taken for one of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import Any

import torch

from pyfused.backends import FORCED, takes_triton
from pyfused.layout import is_dense
from pyfused.ops import NAMESPACE, TORCH_OPS
from pyfused.ops.gradients import gradients_in_forward
from pyfused.ops.reasons import FUSED, say_once
from pyfused.ops.sizes import COMPILED

Node = Any  # torch.fx.Node, whose arguments may be anything

_HALVES = (torch.bfloat16, torch.float16)
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = tuple(getattr(torch.ops.aten, op).default for op in ("view", "reshape", "permute"))

# Where a gradient computed in the forward pass pays though it is multiplied, by up to 1.5 times:
# with few classes, and in memory that malloc reuses. Otherwise the product costs more than it
# saves. Measured forward + backward, 2 threads, x86-64-v4.
_FEW_CLASSES, _REUSED_BYTES = 128, 31 << 20

# What custom operators compute, in torch's terms; those that are not here are never put back.
in_torch: dict[str, Callable[..., Any]] = {}
# By Inductor from memory into memory; so are those without code of its own.
_PRODUCTS = [
    getattr(torch.ops.aten, op)
    for op in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
]

_LINEAR = [getattr(torch.ops.aten, op) for op in ("mm", "bmm", "sum")]

_registered = False


def _version() -> str:
    """Returns what tells the code apart that decides about a program: its hash, and the backend."""
    digest = sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} {FORCED}"


torch.compiler.config.cache_key_tag += f" pyfused {_version()}"


def register() -> None:
    """Adds the patterns, once, if Inductor is compiling: nothing else imports what they go into."""
    global _registered
    table = sys.modules.get("torch._inductor.fx_passes.joint_graph")
    if _registered or table is None:
        return
    _registered = True
    try:
        from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

        # Torch's operators come back before Inductor's own patterns look for them.
        first = getattr(table, "early_patterns", table.patterns)
        rewrites = [(name, _put_back, first) for name in in_torch]
        rewrites += [("cross_entropy", _forward, table.patterns)]
        rewrites += [("cross_entropy_backward", _backward, table.patterns)]
        for name, rewrite, patterns in rewrites:
            pattern = CallFunctionVarArgs(getattr(TORCH_OPS, name).default)
            register_graph_pattern(pattern, pass_dict=patterns)(rewrite)
    except (AttributeError, ImportError, TypeError):
        for name in in_torch:
            COMPILED.pop(name, None)


# ---- operators between tensors that are in memory ------------------------------------------------


def _put_back(match: Any, *_: Any) -> None:
    node = match.output_node()
    if "pyfused_stays" not in node.meta:
        call = _call_of(node)
        stays = not _is_small(node, call) and all(_is_between_memory(part, call) for part in call)
        for part in call:
            part.meta["pyfused_stays"] = stays
        if not stays:
            left(_name(node).removesuffix("_backward"))
    if node.meta["pyfused_stays"]:
        return
    given, function = list(node.args), in_torch[_name(node)]
    places = [place for place, value in enumerate(given) if isinstance(value, torch.fx.Node)]

    def compute(*tensors: torch.Tensor) -> Any:
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return function(*given)

    match.replace_by_example(compute, [given[place] for place in places], _traced)


def _traced(compute: Callable[..., Any], tensors: Sequence[Any]) -> torch.fx.GraphModule:
    """Returns the graph of a function, which may overwrite what it has computed."""
    from torch._inductor.pattern_matcher import fwd_only
    from torch.fx.experimental.proxy_tensor import make_fx

    return fwd_only(torch.func.functionalize(make_fx(compute)(*tensors)), tensors)


def left(op: str) -> None:
    say_once(op, FUSED)


def _name(node: Node) -> str:
    """Returns the name of a node's operator if that is one of pyfused's, else an empty string."""
    namespace, _, name = str(node.target).removesuffix(".default").partition(".")
    return name if namespace == NAMESPACE else ""


def _call_of(node: Node) -> set[Node]:
    """Returns the operators of a call: forward, and backward if there is one."""
    name, forwards = _name(node).removesuffix("_backward"), [node]
    if _name(node) != name:
        saved, others = node.args[1], node.args[2:-1]
        forwards = [n for n in (saved, *saved.users) if _name(n) == name and n.args[1:] == others]
    backwards = [
        user
        for n in forwards
        for user in (*n.users, *n.args[0].users)
        if _name(user) == f"{name}_backward" and user.args[2:-1] == n.args[1:]
    ]
    return {node, *forwards, *backwards}


def _is_small(node: Node, call: set[Node]) -> bool:
    """Returns whether a table gives a call to Inductor.

    Of sizes that change the first one counts. Dispatch knows neither these nor whether there is a
    backward pass.
    """
    size = node.args[_name(node).endswith("_backward")].meta["val"].numel()
    hint = size if isinstance(size, int) else size.node.hint
    names = {_name(part) for part in call}
    op = min(names, key=len)
    below = COMPILED[op][len(names) == 1]
    return hint is not None and hint < below


def _is_between_memory(node: Node, call: set[Node]) -> bool:
    """Returns whether all tensors of the input's size are in memory anyway, in one dense order."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    backward = _name(node).endswith("_backward")
    first = node.args[backward].meta["val"]

    def is_large(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return True
        if not isinstance(value, torch.Tensor) or value.dim() < first.dim():
            return False
        return not statically_known_true(8 * value.numel() <= first.numel())

    def is_read_from_memory(read: Node) -> bool:
        value = read.meta["val"]
        alike = not is_large(value) or statically_known_true(sym_eq(value.stride(), first.stride()))
        return alike and (not is_large(value) or read in call or _is_in_memory(read))

    def is_written_to_memory(written: Node) -> bool:
        return not is_large(written.meta["val"]) or all(
            user in call
            or user.op == "output"
            or _is_extern(user)
            or (backward and _operator(user) is torch.ops.aten.sum)  # the gradient of a bias
            or (_is_view(user) and is_written_to_memory(user))
            for user in written.users
        )

    return (
        is_dense(first)
        and all(map(is_read_from_memory, node.all_input_nodes))
        and is_written_to_memory(node)
    )


def _is_in_memory(node: Node) -> bool:
    while _is_view(node):
        node = node.args[0]
    return node.op == "placeholder" or _is_extern(node)


def _is_view(node: Node) -> bool:
    return node.target in _VIEWS or node.target is getitem


def _is_extern(node: Node) -> bool:
    """Returns whether Inductor calls the node as it is, between tensors in memory."""
    from torch._inductor.lowering import fallbacks

    if _name(node) in in_torch:
        return False  # Inductor's fallbacks may be due to what became of it in another program
    foreign = getattr(node.target, "namespace", "aten") not in ("aten", "prims")
    return foreign or node.target in fallbacks or _operator(node) in _PRODUCTS


def _operator(node: Node) -> Any:
    """Whatever its overload."""
    return getattr(node.target, "overloadpacket", None)


# ---- an operator that is given a cast ------------------------------------------------------------


def _forward(match: Any, input: Node, target: Node, *_: Any) -> None:
    node = match.output_node()
    half = _before_cast(input, target)
    if half is not None:
        _replace_input(node, 0, half)
    _compute_gradient_in_forward(node)


def _backward(match: Any, _grad_output: Node, input: Node, target: Node, *_: Any) -> None:
    """Replaces a backward operator by that of half precision, where the gradient is cast to it."""
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
    operator = TORCH_OPS.cross_entropy_backward.default
    found = (n for n in input.users if n.target is operator and n.args[1:-1] == forward.args)
    backward = next(found, None)
    if backward is None or not gradients_in_forward(reduction, input.meta["val"]):
        return
    products = _products_of(backward) if takes_triton(input.meta["val"]) else None
    if products is None and not _pays(input.meta["val"]):
        return
    grad_output, *arguments = backward.args
    with graph.inserting_before(forward):
        both = graph.call_function(TORCH_OPS.cross_entropy_with_gradients.default, tuple(arguments))
        both.meta = {**forward.meta, "val": (forward.meta["val"], *backward.meta["val"])}
        both.meta.pop("eager_input_vals", None)
        loss = graph.call_function(getitem, (both, 0))
        loss.meta = forward.meta
    forward.replace_all_uses_with(loss)
    graph.erase_node(forward)
    for part in list(backward.users):
        with graph.inserting_before(part):
            gradient = graph.call_function(getitem, (both, part.args[1] + 1))
        gradient.meta = dict(part.meta)
        part.replace_all_uses_with(gradient)
        graph.erase_node(part)
        if products is None:
            _multiply(gradient, grad_output)
    for product, read in products or ():
        _multiply_product(product, read, grad_output)
    graph.erase_node(backward)


def _pays(input: torch.Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    few = input.shape[min(1, input.dim() - 1)] <= _FEW_CLASSES
    reused = input.numel() * input.element_size() <= _REUSED_BYTES
    known = statically_known_true(few) and statically_known_true(reused)
    return known and not takes_triton(input)


def _products_of(gradient: Node) -> list[tuple[Node, Node]] | None:
    """Returns the products that read views of a gradient, and which; None if it is read elsewhere.

    So are sums, which are the gradient of a bias.
    """
    found: list[tuple[Node, Node]] = []
    for user in gradient.users:
        if _is_view(user):
            behind = _products_of(user)
            if behind is None:
                return None
            found += behind
        elif _operator(user) in _LINEAR and user.args.count(gradient) == 1:
            found.append((user, gradient))
        else:
            return None
    return found if len(dict(found)) == len(found) else None  # else a product reads it twice


def _multiply_product(product: Node, read: Node, factor: Node) -> None:
    """Multiplies the operand of a product beside ``read``, or the result if that is smaller."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for other in product.all_input_nodes:
        if other is not read:
            sizes = other.meta["val"].numel(), product.meta["val"].numel()
            if statically_known_true(sizes[0] <= sizes[1]):
                _multiply(other, factor, product)
                return
    _multiply(product, factor)


def _multiply(node: Node, factor: Node, reader: Node | None = None) -> None:
    """Multiplies what ``reader`` reads of a node, or else all that do."""
    with node.graph.inserting_before(reader or node.next):
        scaled = node.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    scaled.meta = {**(reader or node).meta, "val": node.meta["val"]}
    scaled.meta.pop("eager_input_vals", None)
    if reader is None:
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    else:
        reader.replace_input_with(node, scaled)


def _before_cast(node: Node, target: Node) -> Node | None:
    """Returns the half-precision tensor that ``node`` is a float32 copy of, in its shape."""
    views, found = [], node.meta.get("pyfused_half")
    if found is not None:
        return found
    given = node
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
    with node.graph.inserting_before(given):
        for view in reversed(views):
            half = view.graph.call_function(view.target, (half, *view.args[1:]))
            half.meta.update(view.meta, val=view.meta["val"].to(value.dtype))
    given.meta["pyfused_half"] = half  # the same one for forward and backward
    return half


def _replace_input(node: Node, index: int, half: Node) -> None:
    node.update_arg(index, half)
    node.meta.pop("eager_input_vals", None)  # which Inductor would bring the input's layout to
