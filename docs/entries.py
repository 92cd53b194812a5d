"""The formula, the sentence, the curves and the example of each operator's page.

An elementwise operator without a row gets them from its declaration and its docstring.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from pyfused import functional
from pyfused.dispatch.operator import Operand, Operator
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss
from pyfused.ops.softmax import Softmax


@dataclass(frozen=True)
class Curve:
    """The arguments after the input, by position and by name, of the call for each point.

    Floats become tensors, and integers become class indices.

    Attributes:
        others: The logits of the other classes, or the other features, besides the one drawn.
    """

    label: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    others: tuple[float, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A row of the gallery.

    Attributes:
        formula: LaTeX, with the input x and the target t; empty if only the docstring has it.
        use: A sentence about when to choose the operator.
        curves: The curves to draw. Heads have none, because the page of their loss shows them.
        axis: The label of the x axis, and its lowest and highest value.
    """

    formula: str
    use: str
    curves: tuple[Curve, ...] = (Curve(""),)
    axis: tuple[str, float, float] = ("input", -3.0, 3.0)


WIDE, GATE = ("input", -6.0, 6.0), ("gate", -3.0, 3.0)
LOGIT = "logit of the first class of three", -6.0, 6.0
LOGIT_CURVES = (
    Curve("the target", (0,), others=(0.0, 0.0)),
    Curve("another class", (1,), others=(0.0, 0.0)),
)
SOFTMAX_CURVES = tuple(
    Curve(f"others 0, {logit:g}", options={"dim": 1}, others=(0.0, logit)) for logit in (0.0, 3.0)
)
ALPHA = Curve(""), Curve("alpha 0.5", options={"alpha": 0.5})
WEIGHT = torch.tensor([2.0, 1.0, 1.0])
TARGETS = Curve("target 0", (0.0,)), Curve("target 1", (1.0,))
UP = Curve("up 1", (1.0,)), Curve("up -0.5", (-0.5,))
SIGNS = Curve("target 1", (1.0,)), Curve("target -1", (-1.0,))

GALLERY: dict[str, dict[str, Entry]] = {}
GALLERY["Regression"] = {
    "mse_loss": Entry(
        r"(x - t)^2",
        "For regression without outliers: one large error outweighs many small ones.",
        TARGETS,
    ),
    "l1_loss": Entry(
        r"|x - t|", "For regression with outliers: the model predicts the median.", TARGETS
    ),
    "smooth_l1_loss": Entry(
        r"\begin{cases} \dfrac{(x - t)^2}{2 \beta} & |x - t| < \beta \\"
        r" |x - t| - \dfrac{\beta}{2} & \text{else} \end{cases}",
        "Like l1_loss, with a gradient that shrinks near the target; common for bounding boxes.",
        tuple(Curve(f"beta {beta:g}", (0.0,), {"beta": beta}) for beta in (0.5, 1.0, 2.0)),
    ),
    "huber_loss": Entry(
        r"\begin{cases} \dfrac{(x - t)^2}{2} & |x - t| < \delta \\"
        r" \delta \left(|x - t| - \dfrac{\delta}{2}\right) & \text{else} \end{cases}",
        "For regression with outliers, if the size of normal errors is known.",
        tuple(Curve(f"delta {delta:g}", (0.0,), {"delta": delta}) for delta in (0.5, 1.0, 2.0)),
    ),
    "log_cosh_loss": Entry(
        r"\log\, \cosh (x - t)",
        "Like huber_loss, but smooth everywhere and without a parameter.",
        TARGETS,
    ),
    "quantile_loss": Entry(
        r"\max\left(q \, (t - x),\; (q - 1) (t - x)\right)",
        "For predicting a quantile: errors in one direction cost more, as for stock levels, or"
        " for prediction intervals between two quantiles.",
        tuple(Curve(f"quantile {q:g}", (0.0,), {"quantile": q}) for q in (0.1, 0.5, 0.9)),
    ),
}
GALLERY["Distributions"] = {
    "gaussian_nll_loss": Entry(
        r"\frac{1}{2} \left(\log\, v + \frac{(x - t)^2}{v}\right)",
        "For models that also predict their uncertainty, as a variance v for each mean.",
        tuple(Curve(f"variance {v:g}", (0.0, v)) for v in (0.25, 1.0, 4.0)),
    ),
    "poisson_nll_loss": Entry(
        r"e^x - t \, x",
        "For counts: the model predicts the logarithm of their rate.",
        tuple(Curve(f"target {t:g}", (t,)) for t in (0.0, 1.0, 4.0)),
    ),
    "kl_div": Entry(
        r"t \, (\log\, t - x)",
        "For matching a target distribution, given log-probabilities x, as in distillation.",
        tuple(Curve(f"target {t:g}", (t,)) for t in (0.1, 0.5, 0.9)),
        axis=("input, a logarithm", -4.0, 0.0),
    ),
    "kl_div_with_logits": Entry(
        r"\beta \, \mathrm{KL}(q \| m) + (1 - \beta) \, \mathrm{KL}(p \| m), \quad"
        r" m = \beta q + (1 - \beta) p",
        "For distillation from logits: the student's softmax p approaches the teacher's q."
        " With beta 0 the loss is KL(q || p), and with beta 1 KL(p || q).",
        tuple(Curve(f"beta {b:g}", (0.0,), {"beta": b}, (0.0, 0.0)) for b in (0.0, 0.5, 1.0)),
        axis=(LOGIT[0], -5.0, 5.0),
    ),
    "linear_kl_div": Entry(
        r"\mathrm{kl\_div\_with\_logits}(W x + b, \; V y + c)",
        "For distillation of language models from the inputs of their last layers, without"
        " holding all logits.",
        (),
    ),
    "linear_topk_kl_div": Entry(
        r"\sum_{c \in K} q_c (\log\, q_c - \log\, p_c) + q_r (\log\, q_r - \log\, p_r)",
        "For distillation if only the k largest probabilities of the teacher were saved; r"
        " stands for the rest.",
        (),
    ),
}
GALLERY["Binary and multi-label classification"] = {
    "binary_cross_entropy_with_logits": Entry(
        r"-p \, t \log\, \sigma(x) - (1 - t) \log (1 - \sigma(x))",
        "For independent yes-or-no outputs; use pos_weight p if positives are rare.",
        (
            Curve("target 0", (0.0,)),
            Curve("target 1", (1.0,)),
            Curve("target 1, pos_weight 3", (1.0,), {"pos_weight": torch.tensor(3.0)}),
        ),
        axis=("logit", -5.0, 5.0),
    ),
    "binary_cross_entropy": Entry(
        r"-t \log\, x - (1 - t) \log (1 - x)",
        "For models that output probabilities, if the logits are not available.",
        tuple(Curve(f"target {t:g}", (t,)) for t in (0.0, 0.3, 1.0)),
        axis=("probability", 0.02, 0.98),
    ),
    "sigmoid_focal_loss": Entry(
        r"-\alpha \, (1 - p)^\gamma \log\, p",
        "For heavily imbalanced labels, as in dense detection: elements that are already"
        " right, with p near 1 for the target, contribute little.",
        tuple(
            Curve(f"gamma {gamma:g}", (1.0,), {"alpha": -1.0, "gamma": gamma})
            for gamma in (0.0, 1.0, 2.0, 5.0)
        ),
        axis=("logit, target 1", -5.0, 5.0),
    ),
    "soft_margin_loss": Entry(
        r"\log \left(1 + e^{-t x}\right)",
        "Like binary_cross_entropy_with_logits, for targets of -1 and 1.",
        SIGNS,
    ),
    "hinge_loss": Entry(
        r"\max(0,\; m - t \, x)",
        "For classifiers that need no probabilities: elements beyond the margin m have no loss.",
        (*SIGNS, Curve("target 1, squared", (1.0,), {"squared": True})),
    ),
}
GALLERY["Similarity and ranking"] = {
    "triplet_margin_loss": Entry(
        r"\max(0,\; m + \lVert x - y \rVert_p - \lVert x - z \rVert_p)",
        "For embeddings: x should be closer to a similar y than to a different z, by a margin m.",
        (
            Curve("p 2, margin 1", (0.0, 1.0), others=(0.0,)),
            Curve("p 2, margin 2", (0.0, 1.0), {"margin": 2.0}, (0.0,)),
            Curve("p 1, margin 1", (0.0, 1.0), {"p": 1}, (0.0,)),
        ),
        axis=("first of two features, y at 0, z at 1", -3.0, 3.0),
    ),
    "cosine_embedding_loss": Entry(
        r"\begin{cases} 1 - \cos(x, y) & t = 1 \\ \max(0,\; \cos(x, y) - m) & t = -1 \end{cases}",
        "For embeddings whose length has no meaning: only the angle of a pair counts.",
        (
            Curve("target 1", (1.0, 1), others=(1.0,)),
            Curve("target -1", (1.0, -1), others=(1.0,)),
            Curve("target -1, margin 0.5", (1.0, -1), {"margin": 0.5}, (1.0,)),
        ),
        axis=("first of two features, the second is 1", -3.0, 3.0),
    ),
    "hinge_embedding_loss": Entry(
        r"\begin{cases} x & t = 1 \\ \max(0,\; m - x) & t = -1 \end{cases}",
        "For distances x: similar pairs should be close, and others at least a margin m apart.",
        SIGNS,
        axis=("input, a distance", 0.0, 2.0),
    ),
    "margin_ranking_loss": Entry(
        r"\max(0,\; m - t \, (x_1 - x_2))",
        "For ranking: only the order of two scores matters, by a margin m.",
        (
            Curve("first higher", (0.0, 1.0)),
            Curve("second higher", (0.0, -1.0)),
            Curve("first higher, margin 1", (0.0, 1.0), {"margin": 1.0}),
        ),
        axis=("first score, the second is 0", -3.0, 3.0),
    ),
}
GALLERY["Classification"] = {
    "cross_entropy": Entry(
        r"\log\, \sum_c e^{x_c} - x_t",
        "For single-label classification: tokens, digits, pixels.",
        (
            *LOGIT_CURVES,
            Curve("the target, smoothing 0.2", (0,), {"label_smoothing": 0.2}, (0.0, 0.0)),
            Curve("the target, gamma 2", (0,), {"gamma": 2.0}, (0.0, 0.0)),
        ),
        axis=LOGIT,
    ),
    "linear_cross_entropy": Entry(
        r"\log\, \sum_c e^{w_c \cdot x} - w_t \cdot x",
        "For many classes, such as the tokens of a language model: takes blocks of logits, not"
        " all of them.",
        (),
    ),
    "log_probs": Entry(
        r"x_t - \log\, \sum_c e^{x_c}",
        "For reinforcement learning: the log-probability of each sampled token and,"
        " optionally, entropy and log-sum-exp, all with gradients.",
        (*LOGIT_CURVES, Curve("the target, temperature 2", (0,), {"temperature": 2.0}, (0.0, 0.0))),
        axis=LOGIT,
    ),
    "linear_log_probs": Entry(
        r"w_t \cdot x - \log\, \sum_c e^{w_c \cdot x}",
        "For log-probabilities of a language model from the input of its last layer, without"
        " holding all logits.",
        (),
    ),
    "nll_loss": Entry(
        r"-w_t \, x_t",
        "For models that output log-probabilities.",
        (
            Curve("the target", (0,), others=(-1.0, -1.0)),
            Curve("the target, weight 2", (0,), {"weight": WEIGHT}, (-1.0, -1.0)),
            Curve("another class", (1,), others=(-1.0, -1.0)),
        ),
        axis=("log-probability of the first class", -4.0, 0.0),
    ),
    "softmax": Entry(
        r"\frac{e^{x_c}}{\sum_k e^{x_k}}",
        "For turning scores into probabilities, as in attention.",
        SOFTMAX_CURVES,
        axis=LOGIT,
    ),
    "log_softmax": Entry(
        r"x_c - \log\, \sum_k e^{x_k}",
        "For log-probabilities that do not underflow, as input of nll_loss, kl_div and sampling.",
        SOFTMAX_CURVES,
        axis=LOGIT,
    ),
}
GALLERY["Activations"] = {
    "relu": Entry(r"\max(0,\; x)", "The default choice, and the cheapest."),
    "leaky_relu": Entry(
        r"\begin{cases} x & x > 0 \\ s \, x & \text{else} \end{cases}",
        "Like relu, but the slope s keeps the gradient of negative values from being zero.",
        tuple(Curve(f"slope {s:g}", options={"negative_slope": s}) for s in (0.01, 0.2)),
    ),
    "gelu": Entry(
        r"x \, \Phi(x)",
        "For transformers. Φ is the normal distribution, which tanh approximates.",
        (Curve("exact"), Curve("tanh", options={"approximate": "tanh"})),
        axis=("input", -4.0, 3.0),
    ),
    "silu": Entry(
        r"x \, \sigma(x)",
        "For convolutional networks, and gated layers of language models.",
        axis=("input", -6.0, 3.0),
    ),
    "tanh": Entry(
        r"\tanh\, x", "For outputs between -1 and 1: recurrent networks, bounded actions."
    ),
    "elu": Entry(
        r"\begin{cases} x & x > 0 \\ \alpha (e^x - 1) & \text{else} \end{cases}",
        "Like relu, with an exponential below 0 that brings the mean of outputs closer to 0.",
        ALPHA,
    ),
    "selu": Entry(
        r"\lambda \begin{cases} x & x > 0 \\ \alpha (e^x - 1) & \text{else} \end{cases}",
        "For deep networks without normalization layers.",
    ),
    "celu": Entry(
        r"\begin{cases} x & x > 0 \\ \alpha (e^{x / \alpha} - 1) & \text{else} \end{cases}",
        "Like elu, with a continuous slope for every alpha.",
        ALPHA,
    ),
    "mish": Entry(
        r"x \, \tanh(\log(1 + e^x))", "For detectors of the YOLO family.", axis=("input", -6.0, 3.0)
    ),
    "softplus": Entry(
        r"\frac{1}{\beta} \log(1 + e^{\beta x})",
        "For outputs that must be positive: variances, rates.",
        (Curve(""), Curve("beta 3", options={"beta": 3.0})),
    ),
    "logsigmoid": Entry(
        r"-\log(1 + e^{-x})", "For log-probabilities of labels, and for preference losses."
    ),
    "softsign": Entry(r"\frac{x}{1 + |x|}", "Like tanh, but it saturates slowly.", axis=WIDE),
    "tanhshrink": Entry(r"x - \tanh\, x", "For damping values near 0."),
    "swiglu": Entry(
        r"u \, x \, \sigma(x)",
        "For the gated layers of Llama, Qwen and Mistral; u is the other half of the layer.",
        UP,
        axis=GATE,
    ),
    "geglu": Entry(r"u \, x \, \Phi(x)", "For the gated layers of Gemma and T5.", UP, axis=GATE),
    "reglu": Entry(r"u \, \max(x, 0)", "For gated layers without an exponential.", UP, axis=GATE),
    "softcap": Entry(
        r"c \, \tanh\, \frac{x}{c}",
        "For logits of language models that should stay bounded.",
        tuple(Curve(f"cap {c:g}", options={"cap": c}) for c in (1.0, 3.0)),
        axis=WIDE,
    ),
    "sigmoid": Entry(
        r"\sigma(x) = \frac{1}{1 + e^{-x}}",
        "For gates, and for probabilities; for training, a loss of logits is more accurate.",
        axis=WIDE,
    ),
}

# The code after the imports of torch, and of pyfused.functional as F; the backward pass follows.
EXAMPLES = {
    "quantile_loss": """
# An interval that holds 80% of the targets.
low, high = torch.randn(2, 64, requires_grad=True)
target = torch.randn(64)
loss = F.quantile_loss(low, target, quantile=0.1)
loss = loss + F.quantile_loss(high, target, quantile=0.9)
""",
    "kl_div": """
student, teacher = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
log_probabilities = F.log_softmax(student, dim=1)
loss = F.kl_div(log_probabilities, F.softmax(teacher, dim=1), reduction="batchmean")
""",
    "binary_cross_entropy_with_logits": """
logits = torch.randn(64, 10, requires_grad=True)
target = torch.randint(2, (64, 10)).float()
rare = torch.full((10,), 3.0)
loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=rare)
""",
    "sigmoid_focal_loss": """
logits = torch.randn(64, 100, requires_grad=True)
target = (torch.rand(64, 100) < 0.01).float()  # nearly all are 0
loss = F.sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0, reduction="mean")
""",
    "triplet_margin_loss": """
anchor, positive, negative = torch.randn(3, 64, 128, requires_grad=True)
loss = F.triplet_margin_loss(anchor, positive, negative, margin=0.5)
""",
    "cosine_embedding_loss": """
first, second = torch.randn(2, 64, 128, requires_grad=True)
target = torch.randn(64).sign()  # 1 for similar pairs, -1 for others
loss = F.cosine_embedding_loss(first, second, target, margin=0.5)
""",
    "cross_entropy": """
logits = torch.randn(64, 1000, requires_grad=True)
target = torch.randint(1000, (64,))
loss = F.cross_entropy(logits, target, label_smoothing=0.1)

images = torch.randn(2, 21, 32, 32)  # a class for each pixel
classes = torch.randint(21, (2, 32, 32))
loss = loss + F.cross_entropy(images, classes, ignore_index=0)
""",
    "linear_cross_entropy": """
hidden = torch.randn(64, 32, requires_grad=True)  # the output of a model's last layer
head = torch.nn.Linear(32, 1000, bias=False)
target = torch.randint(1000, (64,))
loss = F.linear_cross_entropy(hidden, head.weight, target)
""",
    "log_probs": """
logits = torch.randn(64, 1000, requires_grad=True)
tokens = torch.randint(1000, (64,))  # sampled by an older policy
old_log_p, advantage = torch.full((64,), -7.0), torch.randn(64)  # computed with that policy
result = F.log_probs(logits, tokens, return_entropy=True)
ratio = (result.log_probability - old_log_p).exp()
loss = -(ratio * advantage).mean() - 0.01 * result.entropy.mean()
""",
    "linear_log_probs": """
hidden = torch.randn(64, 32, requires_grad=True)  # the output of a model's last layer
head = torch.nn.Linear(32, 1000, bias=False)
tokens = torch.randint(1000, (64,))
result = F.linear_log_probs(hidden, head.weight, tokens, return_lse=True)
loss = -result.log_probability.mean() + 1e-4 * result.log_sum_exp.square().mean()
""",
    "nll_loss": """
logits = torch.randn(64, 10, requires_grad=True)
target = torch.randint(10, (64,))
loss = F.nll_loss(F.log_softmax(logits, dim=1), target)
""",
    "kl_div_with_logits": """
teacher_logits = torch.randn(2, 16, 1000)
logits = torch.randn(2, 16, 1000, requires_grad=True)
loss = F.kl_div_with_logits(logits, teacher_logits, dim=-1, beta=0.5, temperature=2.0)
""",
    "linear_kl_div": """
hidden, head = torch.randn(32, 64, requires_grad=True), torch.nn.Linear(64, 1000)
teacher_hidden, teacher_weight = torch.randn(32, 128), torch.randn(1000, 128)
loss = F.linear_kl_div(
    hidden, head.weight, teacher_hidden, teacher_weight, linear_bias=head.bias
)
""",
    "linear_topk_kl_div": """
hidden, head = torch.randn(32, 64, requires_grad=True), torch.nn.Linear(64, 1000, bias=False)
log_probs, indices = torch.randn(32, 1000).log_softmax(-1).topk(20)
loss = F.linear_topk_kl_div(hidden, head.weight, indices, log_probs)
""",
}
# The options of examples that follow from declarations.
OPTIONS = {
    "smooth_l1_loss": "beta=0.1",
    "huber_loss": "delta=0.5",
    "hinge_loss": "squared=True",
    "margin_ranking_loss": "margin=0.5",
    "leaky_relu": "negative_slope=0.2",
    "gelu": 'approximate="tanh"',
    "elu": "alpha=0.5",
    "celu": "alpha=0.5",
    "softplus": "beta=2.0",
    "softcap": "cap=2.0",
    **dict.fromkeys(("softmax", "log_softmax"), "dim=1"),
}


# ---- entries from declarations -------------------------------------------------------------------


def drawn(operand: Operand) -> str:
    """Returns a call that draws an operand of an example."""
    if operand.sign:
        return "torch.randn(64, 10).sign()"
    return "torch.randn(64, 10)" if operand.low < 0 else "torch.rand(64, 10)"


def example(op: Operator) -> str:
    first, *others = (operand for operand in op.operands if not operand.optional)
    given = [first.name, *(operand.name for operand in others)]
    given += [OPTIONS[op.name]] if op.name in OPTIONS else []
    lines = [f"{first.name} = {drawn(first)}.requires_grad_()"]
    lines += [f"{operand.name} = {drawn(operand)}" for operand in others]
    result = "loss" if "reduction" in op.names else "y"
    return "\n".join([*lines, f"{result} = F.{op.name}({', '.join(given)})"])


def entry(op: Activation | PointwiseLoss) -> Entry:
    """Returns an entry that draws the second operand at two values, and the others at 1."""
    first, *others = (operand for operand in op.operands if not operand.optional)
    curves = [Curve("", (), {})]
    if others:
        name, ones, ends = others[0].name, (1.0,) * len(others[1:]), (0.0, 1.0)
        ends = (-1.0, 1.0) if others[0].sign else ends
        curves = [Curve(f"{name} {end:g}", (end, *ones), {}) for end in ends]
    summary = (inspect.getdoc(getattr(functional, op.name)) or "").partition("\n\n")[0]
    low, high = max(first.low + 0.02, -3.0), min(first.high - 0.02, 3.0)
    use = re.sub(r":func:(`\w+`)", r"\1", " ".join(summary.split()))
    return Entry("", use, tuple(curves), (first.name, low, high))


_WRITTEN = {name for group in GALLERY.values() for name in group}
for _op in OPERATORS.values():
    if isinstance(_op, (Activation, PointwiseLoss, Softmax)) and hasattr(functional, _op.name):
        EXAMPLES.setdefault(_op.name, example(_op))
        if _op.name not in _WRITTEN:
            _group = "Other losses" if "reduction" in _op.names else "Activations"
            GALLERY.setdefault(_group, {})[_op.name] = entry(_op)
ENTRIES = {name: entry for group in GALLERY.values() for name, entry in group.items()}
