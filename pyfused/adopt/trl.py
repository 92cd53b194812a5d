"""Makes the trainers of TRL compute log-probabilities and divergences with pyfused.

The trainers for SFT, DPO, GRPO, KTO and RLOO do not compute all logits. They pass hidden states to
``trl.trainer.utils._ChunkedLogProbFunction.apply``, which `patch_trl` replaces. They pass the rows
whose label counts if ``trl.trainer.utils._use_triton`` is true for the device, else all rows.
`patch_trl` replaces this name, too. TRL's functions have names of their own for their kernels.
``trl.trainer.distillation_trainer`` has both for ``ChunkedDivergenceFunction``.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused.dispatch.reasons import warn_once
from pyfused.dispatch.run import fallback_reason
from pyfused.dispatch.sizes import torch_computes
from pyfused.functional import linear_kl_div, linear_log_probs
from pyfused.ops.operators import LINEAR_KL_DIV, LINEAR_LOG_PROBS

# The results besides the log-probabilities, and the parameters of TRL's forward, both in order.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_PARAMETERS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_DIVERGENCE_PARAMETERS = (
    *("ctx", "student_hidden", "student_weight", "student_bias"),
    *("teacher_hidden", "teacher_weight", "teacher_bias", "beta", "temperature"),
    *("student_logit_scale", "student_final_logit_softcapping"),
    *("teacher_logit_scale", "teacher_final_logit_softcapping"),
)


def patch_trl() -> None:
    """Makes TRL's trainers compute losses with pyfused: SFT, DPO, GRPO, KTO, RLOO, distillation.

    TRL computes the log-probabilities, entropies and statistics of tokens from hidden states by
    ``trl.trainer.utils._ChunkedLogProbFunction``. ``patch_trl`` replaces it with a function
    with the same arguments and results, which calls :func:`~pyfused.functional.linear_log_probs`.
    In ``trl.trainer.distillation_trainer``, it replaces ``ChunkedDivergenceFunction`` by one that
    calls :func:`~pyfused.functional.linear_kl_div`, and ``linear_log_probs`` for the entropy.
    On CPUs, it also makes the trainers leave out prompts and padding before the head, as TRL does
    on GPUs, so that the time and memory of the head are those of the tokens that count.

    TRL's functions still compute the calls that pyfused cannot: with a weight that ZeRO-3
    partitions, on other devices, in other dtypes, or whose student and teacher differ in the scale
    of the logits. A warning names each reason once. If one of TRL's functions differs, in another
    version of TRL, nothing is replaced, and a warning says so.

    Raises:
        ImportError: TRL is not installed.
    """
    try:
        importlib.import_module("trl")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError("patch_trl: TRL is not installed") from None
    for module, name, is_known, _ in _REPLACED:
        if not is_known(_original(importlib.import_module(module), name)):
            message = f"pyfused.patch_trl: TRL is left unchanged, because {module}.{name} "
            message += "differs from that of TRL 1.16"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
    for module, name, _, patched in _REPLACED:
        setattr(sys.modules[module], name, patched(_original(sys.modules[module], name)))


def unpatch_trl() -> None:
    """Restores TRL's functions.

    Raises:
        RuntimeError: TRL is not patched.
    """
    module, name, *_ = _REPLACED[0]
    if not isinstance(getattr(sys.modules.get(module), name, None), _Patched):
        raise RuntimeError("unpatch_trl() called without patch_trl()")
    for module, name, *_ in _REPLACED:
        setattr(sys.modules[module], name, _original(sys.modules[module], name))


def _original(module: Any, name: str) -> Any:
    """Returns TRL's function of a name, None if there is none."""
    function = getattr(module, name, None)
    return function.original if isinstance(function, _Patched) else function


def _is_log_prob_function(function: Any) -> bool:
    """Returns whether it is an autograd function with the arguments and results of TRL 1.16."""
    if not hasattr(function, "forward"):
        return False
    parameters = inspect.signature(function.forward).parameters
    return (*parameters,) == _PARAMETERS and parameters["outputs"].default == _OUTPUTS


def _is_divergence_function(function: Any) -> bool:
    """Returns whether it is an autograd function with the arguments of TRL 1.16."""
    if not hasattr(function, "forward"):
        return False
    return (*inspect.signature(function.forward).parameters,) == _DIVERGENCE_PARAMETERS


def _is_selection(function: Any) -> bool:
    """Returns whether it is a function of a device that selects no rows on CPUs, as in TRL 1.16."""
    if not callable(function) or (*inspect.signature(function).parameters,) != ("device",):
        return False
    return function(torch.device("cpu")) is False


class _Patched:
    """Takes the place of a function of TRL."""

    def __init__(self, original: Any) -> None:
        self.original = original


class _Selection(_Patched):
    """Makes trainers pass only the rows that count, on CPUs too.

    TRL's own function takes any number of rows, so calls that pyfused leaves to it get fewer, too.
    A program that ``torch.compile`` traces keeps all rows: their number is known to the compiler.
    """

    def __call__(self, device: torch.device) -> bool:
        is_eager_on_cpu = device.type == "cpu" and not is_dynamo_compiling()
        return is_eager_on_cpu or bool(self.original(device))


class _LogProbFunction(_Patched):
    """Takes the place of TRL's autograd function."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _OUTPUTS,
    ) -> Any:
        """Returns the log-probabilities and the other requested outputs."""
        softcap = final_logit_softcapping
        factors = temperature, logit_scale, 1.0 if softcap is None else softcap
        call = LINEAR_LOG_PROBS, (hidden, weight, bias, targets), LINEAR_LOG_PROBS.options()
        small = not is_dynamo_compiling() and torch_computes(*call[:2])
        reason = None if small else _reason_not_fused(call, factors)
        if small or reason is not None:
            _warn(reason)
            arguments = hidden, weight, bias, targets, temperature, chunk_size, softcap
            return self.original.apply(*arguments, logit_scale, outputs)
        # softcap(scale x) / temperature, with the scale folded into softcap and temperature
        tensors, temperature = (hidden, weight, targets), temperature / logit_scale
        softcap = None if softcap is None else softcap / logit_scale
        log_sum_sq_probs = None
        results = linear_log_probs(
            *tensors,
            linear_bias=bias,
            softcap=softcap,
            temperature=temperature,
            return_entropy="entropy" in outputs,
            return_metrics="mean_logits" in outputs or "is_top1" in outputs,
        )
        if "log_sum_sq_probs" in outputs:
            # With half the temperature, the log-probability of the target t is 2 z_t - lse(2 z).
            with torch.no_grad():
                doubled = linear_log_probs(
                    *tensors, linear_bias=bias, softcap=softcap, temperature=temperature / 2
                )
                log_sum_sq_probs = (2 * results.log_probability - doubled.log_probability).float()
        return (  # TRL's result is float32 even for float64 inputs
            results.log_probability.float(),
            results.entropy.float() if "entropy" in outputs else None,
            log_sum_sq_probs,
            results.mean_logit.float() if "mean_logits" in outputs else None,
            results.is_top1 if "is_top1" in outputs else None,
        )


class _DivergenceFunction(_Patched):
    """Takes the place of the autograd function of TRL's distillation."""

    def apply(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the divergence of each row, and the student's entropy without a gradient."""
        student = student_hidden, student_weight, student_bias
        tensors = teacher_hidden, teacher_weight, teacher_bias
        teacher = [None if x is None else x.detach() for x in tensors]
        scale, teacher_scale = student_logit_scale, teacher_logit_scale
        softcap, teacher_softcap = student_final_logit_softcapping, teacher_final_logit_softcapping
        factors = [temperature, scale, *[x for x in (softcap, teacher_softcap) if x is not None]]
        call = LINEAR_KL_DIV, (*student, *teacher, None, None), LINEAR_KL_DIV.options(beta=beta)
        small = not is_dynamo_compiling() and torch_computes(*call[:2])
        reason = None if small else _reason_not_fused(call, factors)
        if not small and scale != teacher_scale:
            reason = "the scales of the student and the teacher differ"
        if small or reason is not None:
            _warn(reason)
            options = beta, temperature, scale, softcap, teacher_scale, teacher_softcap
            divergence, entropy = self.original.apply(*student, *tensors, *options)
            return divergence, entropy
        # softcap(scale x) / temperature, with the scale folded into softcap and temperature
        softcap = None if softcap is None else softcap / scale
        divergence = linear_kl_div(
            *student[:2],
            *teacher[:2],  # type: ignore[arg-type]
            linear_bias=student_bias,
            teacher_linear_bias=teacher[2],
            beta=beta,
            softcap=softcap,
            teacher_softcap=None if teacher_softcap is None else teacher_softcap / scale,
            temperature=temperature / scale,
            reduction="none",
        )
        with torch.no_grad():
            entropy = linear_log_probs(
                *student[:2],
                student_hidden.new_zeros(len(student_hidden), dtype=torch.int64),  # of any target
                linear_bias=student_bias,
                softcap=softcap,
                temperature=temperature / scale,
                return_entropy=True,
            ).entropy
        return divergence.float(), entropy.float()


_UTILS, _DISTILLATION = "trl.trainer.utils", "trl.trainer.distillation_trainer"
# The module and name of each function, the check of TRL's version, and what replaces it.
_REPLACED: tuple[tuple[str, str, Any, Any], ...] = (
    (_UTILS, "_ChunkedLogProbFunction", _is_log_prob_function, _LogProbFunction),
    (_UTILS, "_use_triton", _is_selection, _Selection),
    (_DISTILLATION, "ChunkedDivergenceFunction", _is_divergence_function, _DivergenceFunction),
    (_DISTILLATION, "_use_triton", _is_selection, _Selection),
)


def _warn(reason: str | None) -> None:
    """Warns once that TRL's function computes a call, unless the call is only small."""
    if reason is not None and not is_dynamo_compiling():
        warn_once("trl", reason, f"pyfused.patch_trl: TRL's own function ran, because {reason}")


def _reason_not_fused(call: Any, factors: Sequence[float]) -> str | None:
    """Returns why TRL's function has to compute a call, None if pyfused can.

    Args:
        call: The operator, its tensors and its options.
        factors: The temperature, the scale and the softcaps.
    """
    heads = [call[1][:3], *[call[1][3:6]] * (call[0] is LINEAR_KL_DIV)]
    for hidden, weight, bias in heads:
        if hasattr(weight, "ds_id"):
            return "the weight is partitioned by ZeRO-3"
        dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
        casts = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes
        if len(dtypes) > 1 and not casts:
            return "the hidden states and the layer differ in dtype"
    if min(factors) <= 0:
        return "the temperature, the scale or the softcap is not positive"
    return fallback_reason(*call)
