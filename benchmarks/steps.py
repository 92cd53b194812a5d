"""Times whole training steps: torch, torch.compile, and each way to use pyfused.

Each way runs in its own process. The processes of a model take turns, also with one that only uses
torch. With --cpu, the CPU time on one thread is measured, which other load on the machine hardly
affects.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import report
import torch
from report import OUTPUT, ROOT, spread, tabulated
from timing import Worker, interleaved, ratios, status
from torch import Tensor, nn

import pyfused
import pyfused.functional

WAYS = ("torch.compile", "patch", "convert", "linear_cross_entropy")
# Patched models run torch's functions in compiled programs.
WAYS += tuple(f"{way}, torch.compile" for way in WAYS[-2:])
KEEP = ", keep"  # appended to the name of a way
# The ways that take turns with torch on a CPU, whose memory does not hold more models.
OF_HEADS = ("torch.compile", "torch, keep", "convert", "convert, keep", "convert, torch.compile")
OF_IMAGES = "torch.compile", "torch, keep", "torch.compile, keep"
RATIO = ("ratio, lower quartile", "ratio, median", "ratio, upper quartile")
WARM_UP, SECONDS = 1, 0.5  # steps; the least time of a measurement


# ---- models --------------------------------------------------------------------------------------


class Model(nn.Module):
    """A model whose ``forward`` returns the cross-entropy of its output layer ``head``."""

    linear = False  # whether head and loss are one call

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.loss = body, head, nn.CrossEntropyLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        features, head = self.body(input), self.head
        if self.linear:
            linear = pyfused.functional.linear_cross_entropy
            return linear(features, head.weight, target, linear_bias=head.bias)
        loss: Tensor = self.loss(head(features), target)
        return loss


Step = tuple[Model, Tensor, Tensor]  # a model, its input and the target


class Transformer(nn.Module):
    def __init__(self, classes: int, width: int, layers: int, masked: bool, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(classes, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        mask = None if masked else nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        x = self.tokens(input) + self.positions.weight
        features: Tensor = self.norm(self.layers(x, self.mask, is_causal=self.mask is not None))
        return features.flatten(0, 1)


def language_model(
    classes: int, width: int, layers: int, masked: bool, batch: int, length: int
) -> Step:
    """Returns a model that is causal like GPT, or masked like BERT, where 15 % of tokens count."""
    body = Transformer(classes, width, layers, masked, length)
    model = Model(body, nn.Linear(width, classes, bias=masked))
    model.head.weight = body.tokens.weight
    tokens = torch.randint(classes, (batch, length + 1))
    target = tokens[:, 1:]
    if not masked:
        return model, tokens[:, :-1], target.flatten()
    return model, target, target.where(torch.rand(batch, length) < 0.15, -100).flatten()


class Level(nn.Module):
    """A level of a U-Net and those below it, whose images have half the height and width."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        width, *deeper = widths
        self.down, self.below = convolutions(channels, width), None
        if deeper:
            below = nn.MaxPool2d(2), Level(width, deeper), nn.Upsample(scale_factor=2)
            self.below, self.up = nn.Sequential(*below), convolutions(width + deeper[0], width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x if self.below is None else self.up(torch.cat([self.below(x), x], 1))


def convolutions(channels: int, width: int) -> nn.Module:
    pairs = (channels, width), (width, width)
    blocks = [(nn.Conv2d(*p, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for p in pairs]
    return nn.Sequential(*blocks[0], *blocks[1])


def unet(width: int, levels: int, batch: int, size: int) -> Step:
    """Returns a model that segments images into 21 classes."""
    model = Model(Level(3, [width << level for level in range(levels)]), nn.Conv2d(width, 21, 1))
    return model, torch.randn(batch, 3, size, size), torch.randint(21, (batch, size, size))


class Residual(nn.Module):
    """Adds two convolutions to their input; a wider one has half the height and width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = width // channels
        first, second = convolution(channels, width, stride), convolution(width, width)
        self.convolutions = nn.Sequential(first, nn.ReLU(), second)
        wider = nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(*wider)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.convolutions(x) + self.shortcut(x))
        return result


def convolution(channels: int, width: int, stride: int = 1) -> nn.Module:
    layer = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width))


def resnet(blocks: int, batch: int, size: int) -> Step:
    """Returns a model for images of 10 classes, like those for CIFAR-10 of He et al. (2015)."""
    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    body = [Residual(*pair) for pair in itertools.pairwise(widths)]
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = Model(nn.Sequential(convolution(3, 16), nn.ReLU(), *body, *pool), nn.Linear(64, 10))
    return model, torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def recommender(items: int, width: int, batch: int) -> Step:
    """Returns a model that predicts the next item from the last 20."""
    hidden = nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, width)
    model = Model(nn.Sequential(nn.EmbeddingBag(items, width), *hidden), nn.Linear(width, items))
    return model, torch.randint(items, (batch, 20)), torch.randint(items, (batch,))


class Case(NamedTuple):
    """A model and its training step.

    Attributes:
        sizes: The model's sizes, and below, the batch on a CPU and on a GPU.
        dtype: float32, or bfloat16 for autocast.
    """

    name: str
    prepare: Callable[..., Step]
    sizes: tuple[Any, ...]
    on_cpu: tuple[int, ...]
    on_gpu: tuple[int, ...]
    unit: str
    dtype: str = "float32"

    def batch(self) -> tuple[int, ...]:
        return self.on_gpu if torch.cuda.is_available() else self.on_cpu


GPT2, BERT = (50_257, 768, 12, False), (30_522, 768, 12, True)
CASES = (
    Case("GPT-2 small", language_model, GPT2, (2, 128), (8, 1024), "tokens"),
    Case("GPT-2 small", language_model, GPT2, (2, 128), (8, 1024), "tokens", "bfloat16"),
    Case("BERT, masked tokens", language_model, BERT, (2, 128), (32, 512), "tokens"),
    Case("U-Net, 21 classes", unet, (32, 4), (2, 128), (16, 256), "images"),
    Case("ResNet-20, 10 classes", resnet, (3,), (128, 64), (512, 64), "images"),
    Case("recommender, 100,000 items", recommender, (100_000, 64), (1024,), (8192,), "samples"),
)


# ---- one way, in its own process -----------------------------------------------------------------


def work(index: int, way: str, cpu: bool) -> None:
    """Reads a number of training steps per line, and prints their time in seconds.

    For the line "loss", it prints the last loss; for "peak", the peak memory in bytes of model,
    optimizer and steps, without the libraries.
    """
    case = CASES[index]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if cpu else time.perf_counter
    before = 0 if device == "cuda" else status("VmRSS")
    if way.endswith(KEEP):
        pyfused.memory.keep()
    torch.manual_seed(0)
    model, *drawn = case.prepare(*case.sizes, *case.batch())
    input, target = (tensor.to(device) for tensor in drawn)
    model.to(device)
    model.linear = way.startswith("linear_cross_entropy")
    if way.startswith("convert"):
        pyfused.convert(model, head="head" if isinstance(model.head, nn.Linear) else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if "torch.compile" in way else model
    autocast = torch.autocast(device, torch.bfloat16, case.dtype == "bfloat16")
    loss = torch.zeros(())

    with pyfused.patch() if way.startswith("patch") else contextlib.nullcontext():
        for line in sys.stdin:
            if "loss" in line:
                print(loss.item(), flush=True)
            elif "peak" in line and device == "cuda":
                print(torch.cuda.max_memory_allocated(), flush=True)
            elif "peak" in line:
                print(status("VmHWM") - before, flush=True)
            else:
                started = clock()
                for _ in range(*json.loads(line)):
                    optimizer.zero_grad()
                    with autocast:
                        loss = forward(input, target)
                    loss.backward()
                    optimizer.step()
                    loss = loss.detach()
                if device == "cuda":
                    torch.cuda.synchronize()
                print(clock() - started, flush=True)


# ---- comparison ----------------------------------------------------------------------------------


def compare(index: int, ways: Sequence[str], rounds: int, cpu: bool) -> list[dict[str, Any]]:
    """Returns times, their ratios and peak memory of torch and of each way that does not fail."""
    one_thread = {"OMP_NUM_THREADS": "1"} if cpu else {}
    workers = {
        way: Worker(__file__, json.dumps([index, way, cpu]), **one_thread)
        for way in ("torch", *ways)
    }
    with ThreadPoolExecutor() as pool:  # models are compiled at the same time
        warmed_up = {way: pool.submit(worker.ask, WARM_UP) for way, worker in workers.items()}
    for way, future in warmed_up.items():
        if (error := future.exception()) is not None:
            print(f"{way}: {error}", flush=True)
            del workers[way]
    losses = {way: worker.ask("loss") for way, worker in workers.items()}
    for way, loss in losses.items():
        assert math.isclose(loss, losses["torch"], rel_tol=0.01), (way, loss, losses)
    timers = [worker.ask for worker in workers.values()]
    calls = math.ceil(SECONDS / timers[0](1))
    all_times = dict(zip(workers, interleaved(timers, rounds, calls), strict=True))
    peaks = {way: worker.ask("peak") for way, worker in workers.items()}
    for worker in workers.values():
        worker.process.communicate()
    of_torch = all_times.pop("torch")
    return [
        {
            "way": way,
            "torch, ms": median(of_torch),
            "ms": median(times),
            **dict(zip(RATIO, ratios(of_torch, times), strict=True)),
            "torch, peak": peaks["torch"],
            "peak": peaks[way],
        }
        for way, times in all_times.items()
    ]


def revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            ", ".join((row["model"], row["dtype"], row["batch"])),
            row["way"],
            *(f"{row[name]:,.1f}" for name in ("torch, ms", "ms")),
            spread([row[name] for name in RATIO]),
            *(f"{row[name] / 2**30:.2f}" for name in ("torch, peak", "peak")),
        ]
        for row in rows
    ]
    columns = ["model, dtype, batch", "way", "torch, ms", "ms", "torch / way"]
    return tabulated([*columns, "peak, GiB: torch", "of the way"], lines, names=2)


def steps(options: Namespace) -> None:
    """Prints the rows of each case, and writes those of all cases so far."""
    started, on_gpu = time.perf_counter(), torch.cuda.is_available()
    info = report.machine_info() | ({"threads": 1} if options.cpu else {})
    if on_gpu:
        info = {"gpu": torch.cuda.get_device_name(), **info}
    how = "CPU time on one thread, while other programs ran" if options.cpu else "idle machine"
    machine = f"{report.machine(report.measured(info))}, revision {revision()}; {how}"
    file = options.file or OUTPUT / report.slug({"machine_info": info}) / "steps.csv"
    print(f"{machine}.\n")
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(CASES):
        name = f"{case.name} {case.dtype}"
        if options.only not in name or time.perf_counter() - started > options.seconds:
            continue
        on_cpu = OF_IMAGES if case.unit == "images" else OF_HEADS
        ways = options.ways or (WAYS if on_gpu else on_cpu)
        described = {
            "model": case.name,
            "batch": " x ".join(map(str, case.batch())),
            "dtype": case.dtype,
            "count": math.prod(case.batch()[: 2 if case.unit == "tokens" else 1]),
            "unit": case.unit,
        }
        found = compare(index, ways, options.rounds, options.cpu)
        rows += [{**described, **row, "machine": machine} for row in found]
        print(table(rows[-len(found) :]), flush=True)
        report.write_csv(file, rows)
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
