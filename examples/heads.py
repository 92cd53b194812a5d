"""Measure time and memory of a language model's head with three losses, with and without logits.

    python examples/heads.py    half a minute on two idle cores

The head computes 32,000 logits for each of 1,024 tokens, which take 131 MB in float32. The losses
are cross-entropy (pretraining), log-probabilities with entropy (GRPO, PPO), and the divergence from
a teacher's logits (distillation). Each is computed forward and backward by torch's operators, by
pyfused's loss of logits, and by pyfused's linear loss, which computes the logits of a few tokens at
a time. Each implementation runs in its own process, to measure its peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import announce, draw_bars, peak_memory, resident_memory, threads, track
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import pyfused.functional

TOKENS, FEATURES, CLASSES, ROUNDS = 1024, 128, 32_000, 3
TOLERANCE = 1e-5  # for a float32 mean over all tokens
NAMES = "torch", "pyfused", "pyfused, linear"

Head = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def torch_log_probs(x: Tensor, w: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    log_p = F.linear(x, w).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return -(log_p.gather(1, target[:, None])[:, 0] + 0.01 * entropy).mean()


def torch_divergence(x: Tensor, w: Tensor, _: Tensor, y: Tensor, v: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, v).log_softmax(-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def log_probs(x: Tensor, w: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    results = pyfused.functional.log_probs(F.linear(x, w), target, return_entropy=True)
    return -(results.log_probability + 0.01 * results.entropy).mean()


def linear_log_probs(x: Tensor, w: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    results = pyfused.functional.linear_log_probs(x, w, target, return_entropy=True)
    return -(results.log_probability + 0.01 * results.entropy).mean()


# The implementations of each loss, in the order of NAMES. They take the input and the weight of the
# head, the targets, and the input and the weight of the teacher's head.
LOSSES: dict[str, tuple[Head, Head, Head]] = {
    "cross-entropy": (
        lambda x, w, target, *_: F.cross_entropy(F.linear(x, w), target),
        lambda x, w, target, *_: pyfused.functional.cross_entropy(F.linear(x, w), target),
        lambda x, w, target, *_: pyfused.functional.linear_cross_entropy(x, w, target),
    ),
    "log-probabilities": (torch_log_probs, log_probs, linear_log_probs),
    "divergence": (
        torch_divergence,
        lambda x, w, _, y, v: pyfused.functional.kl_div_with_logits(F.linear(x, w), F.linear(y, v)),
        lambda x, w, _, y, v: pyfused.functional.linear_kl_div(x, w, y, v),
    ),
}


@dataclasses.dataclass
class Measurement:
    value: float
    ms: float
    mib: float | None  # peak memory, including the gradients but not the arguments


def work(loss: str, implementation: int) -> None:
    """Computes the loss and its gradients for each line read, and prints time and memory."""
    torch.manual_seed(0)
    x, w = torch.randn(TOKENS, FEATURES), torch.randn(CLASSES, FEATURES) / FEATURES**0.5
    y, v = torch.randn(TOKENS, FEATURES), torch.randn(CLASSES, FEATURES) / FEATURES**0.5
    target = torch.randint(CLASSES, (TOKENS,))
    x.requires_grad_(), w.requires_grad_()
    before = resident_memory()
    for _ in sys.stdin:
        started = time.perf_counter()
        value = LOSSES[loss][implementation](x, w, target, y, v)
        torch.autograd.grad(value, (x, w))
        ms, peak = 1e3 * (time.perf_counter() - started), peak_memory()
        mib = None if before is None or peak is None else peak - before
        print(json.dumps(dataclasses.asdict(Measurement(value.item(), ms, mib))), flush=True)


def measure(loss: str, rounds: int) -> dict[str, list[Measurement]]:
    """Returns the measurements of each implementation, after a warm-up round."""
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", loss, str(implementation)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            bufsize=1,
        )
        for implementation in range(len(NAMES))
    ]
    measurements: list[list[Measurement]] = [[] for _ in workers]
    # Workers take turns, so other load affects all of them alike.
    turns = [*zip(workers, measurements, strict=True)] * (rounds + 1)
    for worker, results in track(turns, f"Heads, {loss}"):
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("step\n")
        answer = worker.stdout.readline()
        if not answer:
            sys.exit(f"{loss}: a worker stopped: see its error above")
        results.append(Measurement(**json.loads(answer)))
    for worker in workers:
        worker.communicate()
    return {name: results[1:] for name, results in zip(NAMES, measurements, strict=True)}


def draw(results: dict[str, dict[str, list[Measurement]]]) -> Figure:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(
        f"A head of {CLASSES:,} classes and its loss, {TOKENS:,} tokens of {FEATURES} features, "
        f"forward and backward in float32, {threads()}"
    )
    titles = {
        "ms": "Milliseconds, medians and quartiles (ratio: torch / pyfused)",
        "mib": "Peak memory, MiB (ratio: torch / pyfused)",
    }
    has_memory = all(
        measurements[0].mib is not None
        for by_name in results.values()
        for measurements in by_name.values()
    )
    panels = figure.subplots(1, 1 + has_memory, squeeze=False)[0]
    for axes, (field, title) in zip(panels, titles.items(), strict=False):
        first = 0 if field == "ms" else -1  # the peak memory includes earlier rounds
        groups = {
            loss: {
                name: [getattr(measurement, field) for measurement in measurements[first:]]
                for name, measurements in by_name.items()
            }
            for loss, by_name in results.items()
        }
        draw_bars(axes, groups)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Half a minute on two free cores."
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo", "heads.png"),
        help="the output file of the plot (default: %(default)s)",
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        loss, implementation = arguments.worker
        work(loss, int(implementation))
        return

    announce(parser)
    results = {}
    for loss in LOSSES:
        results[loss] = measure(loss, arguments.rounds)
        print(f"{loss}, forward and backward:")
        expected = results[loss]["torch"][0].value
        for name, measurements in results[loss].items():
            ms, mib = statistics.median(x.ms for x in measurements), measurements[-1].mib
            memory = "" if mib is None else f", peak memory {mib:5,.0f} MiB"
            print(f"  {name:<22} {ms:6.0f} ms{memory}", flush=True)
            if not abs(measurements[0].value - expected) <= TOLERANCE * abs(expected):
                sys.exit(f"{loss}: expected torch's value, {expected}, got {measurements[0].value}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(arguments.output, dpi=150)
    print(f"drawn in {arguments.output}")
    loss = results["cross-entropy"]
    time_of, memory_of = (
        {name: statistics.median(getattr(x, field) or 1 for x in loss[name]) for name in NAMES}
        for field in ("ms", "mib")
    )
    linear = NAMES[-1]
    print(
        f"With cross-entropy, {linear} takes {time_of[linear] / time_of['torch']:.2f} of torch's"
        f" time and {memory_of[linear] / memory_of['torch']:.2f} of its memory."
    )
    print("Blocks of logits make smaller products, which save memory but not always time.")


if __name__ == "__main__":
    main()
