"""What filter_eps gains and costs: on a trained model's logits, and on random ones.

    python benchmarks/filtering.py              trains the demo's GPT first, some minutes
    python benchmarks/filtering.py --steps 50   for less long

Forward and backward of linear_cross_entropy in one process by turns. The error is the largest of a
gradient's, as a share of the gradient's own largest element.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from measure import by_turns, ratios, settle_allocator, timed
from rich.progress import track
from torch import Tensor

import pyfused.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import gpt  # noqa: E402

THRESHOLDS = (0.0, 2.0**-16, 2.0**-12, 2.0**-8)
ROUNDS = 7


def trained(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, head and target of a batch that the model has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    path = ROOT / ".benchmarks" / "tokens.pt"
    path.parent.mkdir(exist_ok=True)
    text = gpt.load(path)
    model = gpt.GPT(text["vocabulary"], relu=F.relu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    for _ in track(range(steps), "training"):
        inputs, target = gpt.sample(text["training"], generator)
        optimizer.zero_grad()
        loss = gpt.loss_of(model, model(inputs).flatten(0, 1), target.flatten(), F, True)
        loss.backward()
        optimizer.step()
    print(f"loss after {steps} steps: {loss.item():.2f}")
    inputs, target = gpt.sample(text["held_out"], generator)
    return model(inputs).flatten(0, 1).detach(), model.head.weight.detach(), target.flatten()


def report(name: str, input: Tensor, head: Tensor, target: Tensor) -> None:
    input.requires_grad_()
    head.requires_grad_()

    def gradients(epsilon: float) -> tuple[Tensor, ...]:
        loss = F.linear_cross_entropy(input, head, target, filter_eps=epsilon)
        return torch.autograd.grad(loss, (input, head))

    exact = gradients(0.0)
    taken = by_turns([partial(timed, partial(gradients, e), 1) for e in THRESHOLDS], ROUNDS)
    print(f"{name}: {tuple(input.shape)} x {tuple(head.shape)}")
    for epsilon, times in zip(THRESHOLDS, taken, strict=True):
        errors = [
            float((mine - best).abs().max() / best.abs().max())
            for mine, best in zip(gradients(epsilon), exact, strict=True)
        ]
        low, median, high = ratios(times, taken[0])
        print(
            f"  filter_eps {epsilon:.1e}: {median:.2f} of the time ({low:.2f} to {high:.2f}), "
            f"off by {errors[0]:.1e} and {errors[1]:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    settle_allocator()
    input, head, target = trained(parser.parse_args().steps)
    report("trained", input, head, target)
    report("random", torch.randn_like(input), torch.randn_like(head) / head.shape[1] ** 0.5, target)


if __name__ == "__main__":
    main()
