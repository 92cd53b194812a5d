"""What logits say of each target beside its loss, told by the pass that computes the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, CrossEntropyOptions, Measures, Want
from pyfused.backends.layout import accumulate_dtype, logit_at, loss_shape


class Metrics(NamedTuple):
    """What the logits say of each target, of the shape of class indices; none requires grad.

    Numbers are float32, or float64 with logits of float64, and 0 where the target is ignored.

    Attributes:
        log_probability: ``input[target] - log_sum_exp``, in nats, whatever options do to the loss;
            with class probabilities their mean of it, ``sum_c target_c * log p_c``.
        log_sum_exp: ``log sum_c exp(input_c)``.
        prediction: The class with the largest logit, the first of several, int64; ``ignore_index``
            where the target is ignored.
        correct: Whether that is the target, or the most probable class of the target; False where
            it is ignored.
        entropy: Of the predicted distribution: ``-sum_c p_c * log p_c``, in nats.
        z_loss: ``z_loss * log_sum_exp ** 2``, the part of the loss of that name.
    """

    log_probability: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor
    z_loss: Tensor


class Measured(NamedTuple):
    """What is known of each position after a pass over its logits; in float64 and int64."""

    own: Tensor  # the target's logit
    log_sum_exp: Tensor
    entropy: Tensor
    prediction: Tensor

    @classmethod
    def empty(cls, positions: int, like: Tensor) -> Measured:
        own, lse, entropy = (like.new_empty(positions, dtype=torch.float64) for _ in range(3))
        return cls(own, lse, entropy, like.new_empty(positions, dtype=torch.int64))

    def at(self, positions: slice) -> Measured:
        return Measured(*(tensor[positions] for tensor in self))

    def before(
        self, backend: Backend, logits: Tensor, target: Tensor, ignore_index: int
    ) -> Measures | None:
        """What the loss's own pass, which may overwrite the logits, is to write yet."""
        logits, measures = logits.detach(), Measures(*self[1:])
        if not target.is_floating_point():
            _, own, inside = logit_at(logits, target)
            self.own.copy_(own.double().where(inside, torch.nan).flatten())
            return measures
        plain = CrossEntropyOptions(ignore_index, "none", 0.0)
        want = Want(measures=measures)
        loss, _ = backend.cross_entropy(logits, target.detach(), None, plain, want)
        assert loss is not None
        torch.sub(self.log_sum_exp, loss.flatten(), out=self.own)
        return None

    def metrics(self, target: Tensor, options: CrossEntropyOptions, dtype: torch.dtype) -> Metrics:
        """Of a target in the shape of the logits, or of the positions."""
        own, lse, entropy, prediction = self
        if target.is_floating_point():
            label = target.argmax(min(target.dim() - 1, 1)).flatten()
            valid = torch.ones_like(label, dtype=torch.bool)
            shape = loss_shape(target, "none")
        else:
            label, shape = target.flatten(), target.shape
            valid = label != options.ignore_index
        found = Metrics(
            log_probability=own - lse,
            log_sum_exp=lse,
            prediction=prediction.where(valid, options.ignore_index),
            correct=(prediction == label) & valid,
            entropy=entropy,
            z_loss=options.z_loss * lse.square(),
        )

        def shaped(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.where(valid, 0).to(dtype)
            return tensor.reshape(shape)

        return Metrics(*map(shaped, found))


class Blocks:
    """What is measured of all classes, from that of blocks of them that follow on one another."""

    def __init__(self, positions: int, like: Tensor) -> None:
        nothing = like.new_zeros(positions, dtype=torch.float64)
        self.measured = Measured(nothing, nothing - torch.inf, nothing.clone(), nothing.long())
        self.highest = nothing - torch.inf

    def add(
        self, here: slice, logits: Tensor, target: Tensor, first_class: int, block: Measures
    ) -> None:
        """Takes in what was measured of some positions' logits, (N, C), and their first class."""
        own, lse, entropy, prediction = self.measured.at(here)
        assert block.entropy is not None
        assert block.prediction is not None
        _, found, inside = logit_at(logits, target - first_class)
        own.copy_(found.double().where(inside, own))
        top, highest = logit_at(logits, block.prediction - first_class)[1], self.highest[here]
        leads = (top > highest) | (top.isnan() & ~highest.isnan())
        prediction.copy_(block.prediction.where(leads, prediction))
        highest.copy_(top.where(leads, highest))
        together = torch.logaddexp(lse, block.log_sum_exp)
        entropy.copy_(
            _entropy_of_share(entropy, lse - together)
            + _entropy_of_share(block.entropy, block.log_sum_exp - together)
        )
        lse.copy_(together)


def _entropy_of_share(entropy: Tensor, log_share: Tensor) -> Tensor:
    """What classes add to the entropy of all, of which they have a share of the probability."""
    share = log_share.exp()
    return (share * (entropy - log_share)).where(share != 0, 0)


def of_logits(input: Tensor, target: Tensor, options: CrossEntropyOptions) -> Metrics:
    """The same in torch's terms."""
    dim, dtype = min(input.dim() - 1, 1), accumulate_dtype(input.dtype)
    input, target = input.detach().to(dtype), target.detach()
    lse = input.logsumexp(dim)
    log_p = input - lse.unsqueeze(dim)
    if target.is_floating_point():
        own = lse + (target * log_p).sum(dim)
    else:
        target = target.long().reshape(lse.shape)
        own = logit_at(input, target)[1]
    entropy = torch.special.entr(log_p.exp()).sum(dim)
    found = own, lse, entropy, input.argmax(dim)
    return Measured(*(tensor.flatten() for tensor in found)).metrics(target, options, dtype)
