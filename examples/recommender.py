"""Train a recommender of 100,000 items with torch, and converted by pyfused.

    python examples/recommender.py                      half a minute on two idle cores
    python examples/recommender.py --items 1000000      a million items, up to 7 GiB

A user is the mean of the embeddings of 20 items and two layers; the model predicts the next item.
The loss is over all items; a converted model does not store their logits. Both train for the same
time, in turns, each in its own process, to measure its peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import STYLES, announce, peak_memory, threads, track
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import pyfused
from pyfused.functional import linear_cross_entropy

ITEMS, WIDTH, HISTORY, BATCH = 100_000, 64, 20, 512
SECONDS, TURNS, K = 8, 8, 10
TASTES = 50  # each likes its own items, the first ones most
WAYS = "torch", "pyfused"


class Recommender(nn.Module):
    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(items, WIDTH, sparse=True)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.head = nn.Linear(WIDTH, items)
        nn.init.zeros_(self.head.weight)  # the first loss is that of guessing
        nn.init.zeros_(self.head.bias)

    def users(self, history: Tensor) -> Tensor:
        return self.hidden(self.items(history))

    def forward(self, history: Tensor) -> Tensor:
        return self.head(self.users(history))


class Data:
    """Draws users, each with one of many tastes: items that it likes, and the next one."""

    def __init__(self, items: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.liked = torch.arange(1, items // TASTES + 1) ** -1.5

    def draw(self, users: int) -> tuple[Tensor, Tensor]:
        taste = torch.randint(TASTES, (users, 1), generator=self.generator)
        draws = users * (HISTORY + 1)
        ranks = torch.multinomial(self.liked, draws, replacement=True, generator=self.generator)
        items = ranks.view(users, -1) * TASTES + taste
        return items[:, :-1], items[:, -1]


def recall(users: Tensor, head: nn.Linear, target: Tensor, block: int = 1 << 14) -> float:
    """Returns how often the target is among the best K items, with the scores of a block."""
    best = torch.full((len(users), K), -torch.inf)
    items = torch.zeros((len(users), K), dtype=torch.int64)
    for start in range(0, len(head.weight), block):
        part = slice(start, start + block)
        scores = F.linear(users, head.weight[part], head.bias[part])
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
    head, (held_out, next_item) = model.head, data.draw(BATCH)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.015)
    if way == "pyfused":
        pyfused.convert(model, head="head")
    times: list[float] = []
    for line in sys.stdin:
        budget = float(line)
        while budget > 0:
            history, target = data.draw(BATCH)
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(history), target).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
            budget -= times[-1]
        peak = peak_memory()
        with torch.no_grad():
            users = model.users(held_out)
            loss = linear_cross_entropy(users, head.weight, next_item, linear_bias=head.bias)
            found = recall(users, head, next_item)
        result = {"seconds": sum(times), "steps": len(times), "loss": loss.item(), "recall": found}
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
        for way in WAYS
    }
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
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
    figure.suptitle(f"A recommender of {items:,} items, {threads()}")
    names = {"loss": "held-out loss over all items", "recall": f"recall of the best {K}"}
    for axes, (field, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for way, turns in results.items():
            seconds, values = zip(*((turn["seconds"], turn[field]) for turn in turns), strict=True)
            axes.plot(seconds, values, "o-", color=STYLES[way][0], label=way, markersize=4)
        axes.set(title=title, xlabel="seconds of training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Half a minute on two free cores."
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, for each way")
    parser.add_argument("--turns", type=int, default=TURNS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("demo", "recommender.png"))
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.items <= 0 or arguments.items % TASTES:
        parser.error(f"--items: expected a multiple of {TASTES}, got {arguments.items}")
    if arguments.worker:
        work(arguments.worker, arguments.items)
        return
    announce(parser)
    results = train(arguments.items, arguments.seconds, arguments.turns)
    guess = math.log(arguments.items)
    print(f"A recommender of {arguments.items:,} items, whose loss is {guess:.2f} by guessing:")
    for way, turns in results.items():
        last = turns[-1]
        memory = f", peak memory {last['mib']:5,.0f} MiB" if last["mib"] else ""
        print(
            f"  {way:<8}{last['steps']:6,} steps of {last['ms']:6.1f} ms{memory}: "
            f"loss {last['loss']:.2f}, recall {last['recall']:.3f}"
        )
    ours, theirs = (results[way][-1]["ms"] for way in ("pyfused", "torch"))
    print(f"A step of pyfused takes {ours / theirs:.2f} of torch's time.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(arguments.items, results).savefig(arguments.output, dpi=120)
    print(f"drawn in {arguments.output}")


if __name__ == "__main__":
    main()
