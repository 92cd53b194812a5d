"""Metrics of logits and targets, computed by the pass over the logits that computes the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, cross_entropy_once
from pyfused.layout import accumulate_dtype, logit_at, loss_shape
from pyfused.types import CrossEntropyOptions, Statistics, Want


class Metrics(NamedTuple):
    """Of each target, of the shape of class indices; none of them requires grad.

    Numbers are float32, or float64 with logits of float64, and 0 where the target is ignored.

    Attributes:
        log_probability: ``input[target] - log_sum_exp``, in nats, without smoothing or weights;
            with class probabilities their mean of it, ``sum_c target_c * log p_c``.
        log_sum_exp: ``log sum_c exp(input_c)``.
        prediction: The class with the largest logit, the first of several, int64; ``ignore_index``
            where the target is ignored.
        correct: Whether that is the target, or the most probable class of the target; False where
            it is ignored.
        entropy: Of the predicted distribution: ``-sum_c p_c * log p_c``, in nats.
    """

    log_probability: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor


class RowStatistics(NamedTuple):
    """Of each row of logits, in float64 and int64."""

    target_logit: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    prediction: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> RowStatistics:
        logit, lse, entropy = (like.new_empty(rows, dtype=torch.float64) for _ in range(3))
        return cls(logit, lse, entropy, like.new_empty(rows, dtype=torch.int64))

    def at(self, rows: slice) -> RowStatistics:
        return RowStatistics(*(tensor[rows] for tensor in self))

    def before(
        self, backend: Backend, logits: Tensor, target: Tensor, options: CrossEntropyOptions
    ) -> Statistics | None:
        """What the loss's own pass, which may overwrite the logits, is still to write."""
        logits, statistics = logits.detach(), Statistics(*self[1:])
        if not target.is_floating_point():
            _, logit, in_range = logit_at(logits, target)
            logit = (logit.double() * options.scale).where(in_range, torch.nan)
            self.target_logit.copy_(logit.flatten())
            return statistics
        plain = CrossEntropyOptions(options.ignore_index, "none", scale=options.scale)
        want = Want(statistics=statistics)
        loss, _ = cross_entropy_once(backend, logits, target.detach(), None, plain, want)
        assert loss is not None
        torch.sub(self.log_sum_exp, loss.flatten(), out=self.target_logit)
        return None

    def metrics(self, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Metrics:
        """Of a target in the shape of the logits, or of the rows."""
        logit, lse, entropy, prediction = self
        if target.is_floating_point():
            label = target.argmax(min(target.dim() - 1, 1)).flatten()
            valid = torch.ones_like(label, dtype=torch.bool)
            shape = loss_shape(target, "none")
        else:
            label, shape = target.flatten(), target.shape
            valid = label != ignore_index
        found = Metrics(
            log_probability=logit - lse,
            log_sum_exp=lse,
            prediction=prediction.where(valid, ignore_index),
            correct=(prediction == label) & valid,
            entropy=entropy,
        )

        def shaped(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.where(valid, 0).to(dtype)
            return tensor.reshape(shape)

        return Metrics(*map(shaped, found))


class MergedStatistics:
    """The statistics of all classes, merged from those of some of them after those of others."""

    def __init__(self, rows: int, like: Tensor) -> None:
        zeros = like.new_zeros(rows, dtype=torch.float64)
        self.rows = RowStatistics(zeros, zeros - torch.inf, zeros.clone(), zeros.long())
        self.largest = zeros - torch.inf

    def add(
        self,
        rows: slice,
        logits: Tensor,
        target: Tensor,
        first_class: int,
        block: Statistics,
        scale: float = 1.0,
    ) -> None:
        """Merges the statistics of a block of classes, from the first class on, of some rows.

        Args:
            logits: The block's, before the scale, which is positive and so changes no order.
        """
        assert block.entropy is not None
        assert block.prediction is not None
        _, found, in_range = logit_at(logits, target - first_class)
        target_logit = (found.double() * scale).where(in_range, 0).flatten()
        top = logit_at(logits, block.prediction - first_class)[1].flatten()
        part = RowStatistics(target_logit, block.log_sum_exp, block.entropy, block.prediction)
        self.merge(rows, part, top)

    def merge(self, rows: slice, part: RowStatistics, top: Tensor) -> None:
        """Merges the statistics of further classes of some rows.

        Args:
            part: The target's logit is 0 where the target is none of these classes.
            top: The largest logit.
        """
        target_logit, lse, entropy, prediction = self.rows.at(rows)
        target_logit += part.target_logit
        largest, nan = self.largest[rows], top.isnan()
        tie = (top == largest) | (nan & largest.isnan())
        leads = (top > largest) | (nan & ~tie) | (tie & (part.prediction < prediction))
        prediction.copy_(part.prediction.where(leads, prediction))
        largest.copy_(top.where(leads, largest))
        merged = torch.logaddexp(lse, part.log_sum_exp)
        entropy.copy_(
            _entropy_of_part(entropy, lse - merged)
            + _entropy_of_part(part.entropy, part.log_sum_exp - merged)
        )
        lse.copy_(merged)


def _entropy_of_part(entropy: Tensor, log_probability: Tensor) -> Tensor:
    """What some classes add to the entropy of all, given the logarithm of their probability."""
    probability = log_probability.exp()
    return (probability * (entropy - log_probability)).where(probability != 0, 0)


def of_logits(input: Tensor, target: Tensor, ignore_index: int) -> Metrics:
    """The same in torch's terms."""
    dim, dtype = min(input.dim() - 1, 1), accumulate_dtype(input.dtype)
    input, target = input.detach().to(dtype), target.detach()
    lse = input.logsumexp(dim)
    log_p = input - lse.unsqueeze(dim)
    if target.is_floating_point():
        logit = lse + (target * log_p).sum(dim)
    else:
        target = target.long().reshape(lse.shape)
        logit = logit_at(input, target)[1]
    entropy = torch.special.entr(log_p.exp()).sum(dim)
    found = logit, lse, entropy, input.argmax(dim)
    rows = RowStatistics(*(tensor.flatten() for tensor in found))
    return rows.metrics(target, ignore_index, dtype)
