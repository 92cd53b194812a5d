"""Train a small GPT on the source text of Python's standard library, with torch and with pyfused.

    python examples/gpt.py                            compare all implementations
    python examples/gpt.py --implementation pyfused   run one of them
    python examples/gpt.py --keep                     reuse freed memory in all of them

With a vocabulary of 32,000 and 1,024 tokens per step, the logits take 131 MB in float32. The loss
reads and writes several times as much memory, which takes a large part of each step. "pyfused,
linear" uses linear_cross_entropy, which does not materialise the logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import announce, peak_memory, require_equal, track
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pyfused import memory

VOCABULARY = 32_000  # the most frequent tokens, and one for all others
TOKEN = re.compile(
    r" ?[^\W_]+|\n\s*|."
)  # a word or number, a line break with spaces, or a character
BATCH, CONTEXT = 8, 128
LAYERS, HEADS, WIDTH = 4, 4, 128
STEPS, EVALUATE_EVERY = 40, 20
IMPLEMENTATIONS = {
    "torch": "torch.nn.functional",
    "pyfused": "pyfused.functional",
    "pyfused, linear": "pyfused.functional",
}

# Training amplifies rounding errors: torch's loss computed in float64 differs as much. A small
# learning rate keeps the difference below the tolerance.
TOLERANCE = 1e-3


class Block(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.relu = relu
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attention = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        return x + self.down(self.relu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(
        self, vocabulary: int, relu: Callable[[Tensor], Tensor], width: int = WIDTH
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(relu, width) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the hidden states, which are the input of the head."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x))


def loss_of(model: GPT, features: Tensor, target: Tensor, functional: Any, linear: bool) -> Tensor:
    if linear:
        return functional.linear_cross_entropy(features, model.head.weight, target)
    return functional.cross_entropy(model.head(features), target)


def tokenise() -> dict[str, Any]:
    """Splits the text into words and other characters; every tenth file is held out."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "encodings", "pydoc_data"}
    left_out |= {"site-packages", "dist-packages"}
    files = [
        file
        for file in sorted(library.rglob("*.py"))
        if left_out.isdisjoint(file.relative_to(library).parts)
    ]
    texts = [
        TOKEN.findall(file.read_text("utf-8", "replace")) for file in track(files, "GPT, text")
    ]
    counts = Counter(token for text in texts for token in text)
    index = {token: i for i, (token, _) in enumerate(counts.most_common(VOCABULARY - 1))}
    tokens = [
        torch.tensor([index.get(token, len(index)) for token in text], dtype=torch.long)
        for text in texts
    ]
    held_out = torch.cat(tokens[::10])
    del tokens[::10]
    return {"training": torch.cat(tokens), "held_out": held_out, "vocabulary": len(index) + 1}


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        torch.save(tokenise(), path)
    return torch.load(path)


def sample(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


@dataclasses.dataclass
class Step:
    loss: float
    held_out_loss: float | None
    loss_ms: float  # including the head
    step_ms: float
    peak_mib: float | None


def train(functional: ModuleType, path: Path, steps: int, linear: bool = False) -> Iterator[Step]:
    """Yields the measurements of each step.

    Args:
        linear: Whether to use linear_cross_entropy, which fuses head and loss.
    """
    clock: list[float] = []

    def tick(*_: Tensor) -> None:
        clock.append(time.perf_counter())

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    text = load(path)
    model = GPT(text["vocabulary"], relu=functional.relu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    held_out = [sample(text["held_out"], generator) for _ in range(4)]

    for step in range(1, steps + 1):
        inputs, targets = sample(text["training"], generator)

        clock.clear()
        tick()
        optimizer.zero_grad()
        features = model(inputs).flatten(0, 1)
        # Head and loss are timed from here until the gradient of the head's input is ready.
        features.register_hook(tick)
        tick()
        loss = loss_of(model, features, targets.flatten(), functional, linear)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        tick()

        started, loss_started, loss_stopped, stopped = clock
        held_out_loss = None
        if step % EVALUATE_EVERY == 0 or step == steps:
            with torch.no_grad():
                losses = [
                    loss_of(model, model(x).flatten(0, 1), y.flatten(), functional, linear)
                    for x, y in held_out
                ]
            held_out_loss = torch.stack(losses).mean().item()
        yield Step(
            loss=loss.item(),
            held_out_loss=held_out_loss,
            loss_ms=1e3 * (loss_stopped - loss_started),
            step_ms=1e3 * (stopped - started),
            peak_mib=peak_memory(),
        )


def train_in_a_process(
    implementation: str, path: Path, steps: int, keep: bool = False
) -> Iterator[Step]:
    """Runs train in a new process, to measure its peak memory.

    Args:
        keep: Whether the process reuses all memory that it frees.
    """
    command = [sys.executable, __file__, "--worker", "--implementation", implementation]
    command += ["--tokens", str(path), "--steps", str(steps), *["--keep"] * keep]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for _ in range(steps):
            worker.stdin.write("step\n")
            answer = worker.stdout.readline()
            if not answer:
                sys.exit(f"training with {implementation} stopped: see its error above")
            yield Step(**json.loads(answer))


def work(implementation: str, path: Path, steps: int, keep: bool) -> None:
    """Runs one step for each line read, so that only one worker uses the cores at a time."""
    if keep:
        memory.keep()
    functional = importlib.import_module(IMPLEMENTATIONS[implementation])
    training = train(functional, path, steps, implementation.endswith("linear"))
    for _ in sys.stdin:
        print(json.dumps(dataclasses.asdict(next(training))), flush=True)


def run(names: Sequence[str], path: Path, steps: int, keep: bool) -> None:
    runs: dict[str, list[Step]] = {name: [] for name in names}
    text = load(path)
    print(f"{len(text['training']):,} tokens out of a vocabulary of {text['vocabulary']:,}")
    turns = zip(*(train_in_a_process(name, path, steps, keep) for name in names), strict=True)
    for number, turn in enumerate(track(turns, "GPT", steps), start=1):
        for name, step in zip(names, turn, strict=True):
            runs[name].append(step)
            if step.held_out_loss is not None:
                losses = f"loss {step.loss:.4f}  held out {step.held_out_loss:.4f}"
                print(f"{name:<15} step {number:>4}  {losses}", flush=True)

    for name, taken in runs.items():
        loss_ms = statistics.median(step.loss_ms for step in taken)
        step_ms = statistics.median(step.step_ms for step in taken)
        peak = f"{taken[-1].peak_mib:,.0f} MiB" if taken[-1].peak_mib else "not known"
        print(
            f"{name:<15} head and loss {loss_ms:.1f} ms, step {step_ms:.1f} ms, peak memory {peak}"
        )
    first, *others = ([step.loss for step in taken] for taken in runs.values())
    for losses in others:
        require_equal(first, losses, TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="About a minute and a half on two free cores."
    )
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: all, in turn")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--tokens", type=Path, help="cache the tokenised text in this file")
    parser.add_argument(
        "--keep", action="store_true", help="reuse all freed memory, see pyfused.memory.keep"
    )
    parser.add_argument(
        "--worker", action="store_true", help="run a step for each line read, print it as JSON"
    )
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.implementation, arguments.tokens, arguments.steps, arguments.keep)
        return
    announce(parser)
    names = [arguments.implementation] if arguments.implementation else list(IMPLEMENTATIONS)
    with tempfile.TemporaryDirectory() as folder:
        tokens = arguments.tokens or Path(folder, "tokens.pt")
        run(names, tokens, arguments.steps, arguments.keep)


if __name__ == "__main__":
    main()
