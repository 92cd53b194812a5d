"""Distil the GPT of gpt.py into a student of a quarter of its width, with torch and with pyfused.

    python examples/distillation.py                 train the teacher, and a student with each
    python examples/distillation.py --steps 10      fewer steps

The teacher is trained on the text. The student is trained to match the teacher's predictions, by
the generalised Jensen-Shannon divergence. pyfused's linear_kl_div does not materialise the logits
of teacher and student, which are 131 MB each in float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpt
import torch
from common import announce, require_equal, track
from torch import Tensor, nn
from torch.nn import functional as F

import pyfused.functional

# A quarter of the teacher's width; also of the embedding, which is tied to the head.
WIDTH = gpt.WIDTH // 4
BETA, TEMPERATURE = 0.5, 2.0
TEACHER_STEPS, STEPS = 40, 20
TOLERANCE = gpt.TOLERANCE

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_torch(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    """Computes the same divergence from the full logits."""
    log_p = F.log_softmax(F.linear(x, weight) / TEMPERATURE, -1)
    log_q = F.log_softmax(F.linear(teacher_x, teacher_weight) / TEMPERATURE, -1)
    share = torch.tensor(BETA).log()
    log_m = torch.logaddexp(log_p + torch.tensor(1 - BETA).log(), log_q + share)
    of_teacher, of_student = (
        F.kl_div(log_m, log, log_target=True, reduction="batchmean") for log in (log_q, log_p)
    )
    return BETA * of_teacher + (1 - BETA) * of_student


def by_pyfused(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    return pyfused.functional.linear_kl_div(
        x, weight, teacher_x, teacher_weight, beta=BETA, temperature=TEMPERATURE
    )


LOSSES: dict[str, Loss] = {"torch": by_torch, "pyfused": by_pyfused}


def build(vocabulary: int, seed: int, width: int) -> gpt.GPT:
    torch.manual_seed(seed)
    return gpt.GPT(vocabulary, relu=F.relu, width=width)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)


def train_teacher(text: dict[str, Any], steps: int) -> gpt.GPT:
    teacher, generator = build(text["vocabulary"], 0, gpt.WIDTH), torch.Generator().manual_seed(0)
    optimizer = optimizer_of(teacher, 1e-3)
    for _ in track(range(steps), "Distillation, teacher"):
        inputs, target = gpt.sample(text["training"], generator)
        optimizer.zero_grad()
        features = teacher(inputs).flatten(0, 1)
        gpt.loss_of(teacher, features, target.flatten(), pyfused.functional, True).backward()
        optimizer.step()
    return teacher.requires_grad_(False)


def distil(
    student: gpt.GPT, teacher: gpt.GPT, text: dict[str, Any], loss_of: Loss, steps: int
) -> Iterator[tuple[float, float]]:
    """Yields each step's divergence, and the time of head and loss in milliseconds."""
    generator, optimizer = torch.Generator().manual_seed(1), optimizer_of(student, 1e-3)
    for _ in range(steps):
        inputs, _ = gpt.sample(text["training"], generator)
        with torch.no_grad():
            given = teacher(inputs).flatten(0, 1), teacher.head.weight
        optimizer.zero_grad()
        features, clock = student(inputs).flatten(0, 1), []
        features.register_hook(lambda _, clock=clock: clock.append(time.perf_counter()))
        clock.append(time.perf_counter())
        loss = loss_of(features, student.head.weight, *given)
        loss.backward()
        optimizer.step()
        yield loss.item(), 1e3 * (clock[1] - clock[0])


def held_out(model: gpt.GPT, text: dict[str, Any]) -> float:
    """Returns the cross-entropy on held-out text."""
    inputs, target = gpt.sample(text["held_out"], torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = model(inputs).flatten(0, 1)
        loss = gpt.loss_of(model, features, target.flatten(), pyfused.functional, True)
    return loss.item()


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run(text: dict[str, Any], teacher_steps: int, steps: int) -> dict[str, list[float]]:
    """Trains the same student with each implementation; returns the divergences."""
    teacher = train_teacher(text, teacher_steps)
    first = build(text["vocabulary"], 3, WIDTH)
    print(f"teacher: {size_of(teacher):,} weights, held-out loss {held_out(teacher, text):.3f}")
    print(f"student: {size_of(first):,} weights, held-out loss {held_out(first, text):.3f}")
    students = {name: copy.deepcopy(first) for name in LOSSES}
    runs = {
        name: distil(students[name], teacher, text, loss, steps) for name, loss in LOSSES.items()
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    for turn in track(zip(*runs.values(), strict=True), "Distillation, students", steps):
        for name, step in zip(runs, turn, strict=True):
            taken[name].append(step)
    for name, steps_taken in taken.items():
        losses, times = zip(*steps_taken, strict=True)
        loss, median = held_out(students[name], text), statistics.median(times)
        print(
            f"{name:<8} divergence {losses[0]:.4f} to {losses[-1]:.4f}, held-out loss {loss:.3f}, "
            f"heads and loss {median:.1f} ms"
        )
    return {name: [loss for loss, _ in steps_taken] for name, steps_taken in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="About a minute on two free cores."
    )
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--tokens", type=Path, help="cache the tokenised text in this file")
    arguments = parser.parse_args()
    announce(parser)
    text = gpt.load(arguments.tokens) if arguments.tokens else gpt.tokenise()
    losses = run(text, arguments.teacher_steps, arguments.steps)
    require_equal(*losses.values(), TOLERANCE)
    print("The student learns the same with linear_kl_div, which stores a block of logits.")
    print("Compare the milliseconds above: they are those of both heads and the loss.")
    if not losses["pyfused"][-1] < losses["pyfused"][0]:
        sys.exit("the student's divergence from the teacher has not decreased")


if __name__ == "__main__":
    main()
