"""Train a recommender of 100,000 items with a full softmax, in-batch and sampled negatives.

    python examples/recommender.py                      40 seconds on two idle cores
    python examples/recommender.py --items 1000000      a million items, up to 7 GiB

A user is the mean of the embeddings of 20 items and two layers; the model predicts the next item.
"torch" and "pyfused" compute the loss over all items, pyfused without storing their logits. The
others compare with few items: with the targets of the batch, or also with random ones. All four
train for the same time, in turns, each in its own process, to measure its peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import announce, peak_memory, track
from matplotlib.figure import Figure
from palette import STYLES
from torch import Tensor, nn
from torch.nn import functional as F

import pyfused
from pyfused.functional import linear_cross_entropy

ITEMS, WIDTH, HISTORY, BATCH, NEGATIVES = 100_000, 64, 20, 512, 4096
SECONDS, TURNS, K = 8, 8, 10
PER_TASTE = 100  # items that the same users like, the first ones most


class Recommender(nn.Module):
    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(items, WIDTH, sparse=True)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.head = nn.Linear(WIDTH, items, bias=False)

    def users(self, history: Tensor) -> Tensor:
        return self.hidden(self.items(history))

    def forward(self, history: Tensor) -> Tensor:
        return self.head(self.users(history))


class Data:
    """Draws users, each with one of many tastes: items that it likes, and the next one."""

    def __init__(self, items: int) -> None:
        self.items, self.tastes = items, items // PER_TASTE
        self.generator = torch.Generator().manual_seed(0)
        self.liked = 1 / torch.arange(1, PER_TASTE + 1)
        self.liked /= self.liked.sum()

    def popularity(self) -> Tensor:
        """Returns the probability of each item to be a target."""
        return (self.liked / self.tastes).repeat_interleave(self.tastes)

    def draw(self, users: int) -> tuple[Tensor, Tensor]:
        taste = torch.randint(self.tastes, (users, 1), generator=self.generator)
        draws = users * (HISTORY + 1)
        ranks = torch.multinomial(self.liked, draws, replacement=True, generator=self.generator)
        items = ranks.view(users, -1) * self.tastes + taste
        return items[:, :-1], items[:, -1]


# ---- losses --------------------------------------------------------------------------------------


def full(model: Recommender, history: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(model(history), target)


def of_candidates(
    model: Recommender, history: Tensor, target: Tensor, popularity: Tensor, negatives: int = 0
) -> Tensor:
    """Returns the loss over the targets of a batch and random items, each of them once.

    The logits are corrected by the logarithm of the probability that an item is a candidate.
    """
    items, users = len(popularity), len(target)
    drawn = torch.randint(items, (negatives,))
    candidates, index = torch.unique(torch.cat([target, drawn]), return_inverse=True)
    expected = users * popularity[candidates] + negatives / items
    log_q = torch.log(-torch.expm1(-expected))
    table = F.embedding(candidates, model.head.weight, sparse=True)
    return linear_cross_entropy(model.users(history), table, index[:users], linear_bias=-log_q)


def sampled(model: Recommender, history: Tensor, target: Tensor, popularity: Tensor) -> Tensor:
    return of_candidates(model, history, target, popularity, NEGATIVES)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "torch": full,
    "pyfused": full,
    "in-batch": of_candidates,
    "sampled": sampled,
}
COLOURS = [STYLES[name][0] for name in ("torch", "pyfused", "torch.compile", "Liger")]


def recall(users: Tensor, table: Tensor, target: Tensor, block: int = 1 << 14) -> float:
    """Returns how often the target is among the best K items, with the scores of a block."""
    best = torch.full((len(users), K), -torch.inf)
    items = torch.zeros((len(users), K), dtype=torch.int64)
    for start in range(0, len(table), block):
        scores = users @ table[start : start + block].t()
        scores, indices = scores.topk(min(K, scores.shape[1]))
        best, order = torch.cat([best, scores], 1).topk(K)
        items = torch.cat([items, start + indices], 1).gather(1, order)
    return (items == target[:, None]).any(1).float().mean().item()


# ---- training ------------------------------------------------------------------------------------


def work(way: str, items: int) -> None:
    """Trains for the seconds of each line read, and prints the results so far as JSON."""
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, without a warning
    data, model = Data(items), Recommender(items)
    nn.init.normal_(model.head.weight, std=0.1)
    popularity, (held_out, next_item) = data.popularity(), data.draw(BATCH)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    if way == "pyfused":
        pyfused.convert(model, head="head")
    times: list[float] = []
    for line in sys.stdin:
        budget = float(line)
        while budget > 0:
            history, target = data.draw(BATCH)
            started = time.perf_counter()
            optimizer.zero_grad()
            LOSSES[way](model, history, target, popularity).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
            budget -= times[-1]
        peak = peak_memory()
        with torch.no_grad():
            users, table = model.users(held_out), model.head.weight
            loss = linear_cross_entropy(users, table, next_item).item()
            found = recall(users, table, next_item)
        result = {"seconds": sum(times), "steps": len(times), "loss": loss, "recall": found}
        print(json.dumps({**result, "ms": 1e3 * statistics.median(times), "mib": peak}), flush=True)


def train(items: int, seconds: float, turns: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of each way after each of its turns."""
    pipe = subprocess.PIPE
    workers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--worker", way, "--items", str(items)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            bufsize=1,
        )
        for way in LOSSES
    }
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in LOSSES}
    for way, worker in track([*workers.items()] * turns, "Recommender"):
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{seconds / turns}\n")
        answer = worker.stdout.readline()
        if not answer:
            sys.exit(f"{way}: the worker stopped: see its error above")
        results[way].append(json.loads(answer))
    for worker in workers.values():
        worker.communicate()
    return results


def draw(items: int, results: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"A recommender of {items:,} items, {torch.get_num_threads()} threads")
    names = {"loss": "held-out loss over all items", "recall": f"recall of the best {K}"}
    for axes, (field, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for colour, (way, turns) in zip(COLOURS, results.items(), strict=True):
            seconds, values = zip(*((turn["seconds"], turn[field]) for turn in turns), strict=True)
            axes.plot(seconds, values, "o-", color=colour, label=way, markersize=4)
        axes.set(title=title, xlabel="seconds of training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="About 40 seconds on two free cores."
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, for each way")
    parser.add_argument("--turns", type=int, default=TURNS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("demo", "recommender.png"))
    parser.add_argument("--worker", choices=LOSSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.items <= 0 or arguments.items % PER_TASTE:
        parser.error(f"--items: expected a multiple of {PER_TASTE}, got {arguments.items}")
    if arguments.worker:
        work(arguments.worker, arguments.items)
        return
    announce(parser)
    results = train(arguments.items, arguments.seconds, arguments.turns)
    print(f"A recommender of {arguments.items:,} items, batches of {BATCH}:")
    for way, turns in results.items():
        last = turns[-1]
        memory = f", peak memory {last['mib']:5,.0f} MiB" if last["mib"] else ""
        print(
            f"  {way:<9}{last['steps']:6,} steps of {last['ms']:6.1f} ms{memory}: "
            f"loss {last['loss']:.2f}, recall {last['recall']:.3f}"
        )
    first = results["torch"][-1]["ms"]
    shares = {way: turns[-1]["ms"] / first for way, turns in results.items()}
    print(f"With all items, a step of pyfused takes {shares['pyfused']:.2f} of torch's time.")
    few = f"in-batch {shares['in-batch']:.2f}, sampled {shares['sampled']:.2f}"
    print(f"With few candidates: {few}. Compare recall over seconds, not over steps.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(arguments.items, results).savefig(arguments.output, dpi=120)
    print(f"drawn in {arguments.output}")


if __name__ == "__main__":
    main()
