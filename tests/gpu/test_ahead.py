"""Kernels compile for GPUs that are not here, without spills and with wide loads: some of them."""

from __future__ import annotations

import re
import sys
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

import ahead
import triton
import triton.language as tl

from pyfused.backends import CrossEntropyOptions, Head, Shaping, Want
from pyfused.kernels import launch
from pyfused.ops import chunked

QUICK = (
    "cross_entropy bfloat16 4096x8192",
    "cross_entropy bfloat16 4096x16384",
    "cross_entropy bfloat16 4096x16384 smoothing",
    "cross_entropy bfloat16 4096x16",
    "cross_entropy float32 4096x4096 weight smoothing",
    "cross_entropy bfloat16 4096x1000",
    "cross_entropy bfloat16 2x262144 forward",
    "cross_entropy float32 8x1000x4096",
    "cross_entropy float32 8x21x1000",
    "mse_loss float32",
    "binary_cross_entropy float64",
    "relu bfloat16 backward",
    "softcap float64",
)


clusters = pytest.mark.skipif(not launch.CLUSTERS_COMPILE, reason="its clusters do not compile")


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_nothing_spills_and_loads_are_wide(target: str) -> None:
    found = ahead.compile_cases(target, QUICK)
    assert {kernel.kernel for kernel in found} >= {
        "one_read_kernel",
        "two_read_kernel",
        "split_kernel",
        "count_kernel",
        "pointwise_loss_kernel",
        "activation_kernel",
    }
    for kernel in found:
        if (target, kernel.kernel) == (
            "sm_100",
            "two_read_kernel",
        ) and triton.__version__ == "3.8.0":
            continue  # that compiler spills there, those before and after it do not
        assert not kernel.wrong, kernel
        assert kernel.registers > 0
        if kernel.kernel == "activation_kernel":
            assert kernel.store == 128


def compile_with(
    monkeypatch: pytest.MonkeyPatch, row: launch.Row, classes: int
) -> list[ahead.Compiled]:
    for table in ("FORWARD", "SHORT_CLASSES_INNER"):
        monkeypatch.setattr(launch, table, {4: (row,)})
    case = ahead.cross_entropy_case((4096, classes), torch.float32, "forward")
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        case.run()
    return [ahead.inspect("sm_90", case, name, kernel) for name, kernel in launched]


def test_a_spill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = launch.Row(launch.ANY, 32_768, 1, 64)
    assert "spills" in [kernel.wrong for kernel in compile_with(monkeypatch, row, 32_768)]


def test_narrow_loads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = launch.Row(launch.ANY, 1024, 2, 128)  # two rows, of which the second begins anywhere
    assert "narrow loads" in [kernel.wrong for kernel in compile_with(monkeypatch, row, 1023)]


@triton.jit
def loop_kernel(
    x: tl.tensor, out: tl.tensor, n: tl.tensor, step: tl.constexpr, block: tl.constexpr
) -> None:
    """Loads wide before its loop, and within if the step is 1."""
    lanes = tl.arange(0, block)
    total = tl.load(x + lanes)
    for start in range(0, n, block):
        total += tl.load(x + (start + lanes) * step)
    tl.store(out + lanes, total)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("step", "wrong"), [(1, ""), (3, "narrow loads")])
def test_narrow_loads_in_a_loop_are_found(target: str, step: int, wrong: str) -> None:
    x = ahead.empty(torch.float32, 1 << 20)
    with ahead.Recorder(ahead.TARGETS[target]) as launched:
        loop_kernel[(1,)](x, x, 1 << 18, step=step, block=1024, **launch.options(128))
    case = ahead.Case("a loop", x.dtype, lambda: None)
    found = ahead.inspect(target, case, *launched[0])
    assert found.wrong == wrong
    assert found.load == (32 if wrong else 128)
    assert found.wide == (0 if wrong else 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_of_a_register_stay_in_order(dtype: torch.dtype) -> None:
    """Of two elements that are loaded as one register, and whose gradients are stored as one."""
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        ahead.cross_entropy_case((4096, 4096), dtype, "").run()
    ptx = dict(launched)["one_read_kernel"].asm["ptx"]
    statements = re.findall(r"([\w.]+)\s+(%\w+), ([^;]*);", ptx)
    made = {
        register: (operation, re.findall(r"%\w+\d|\b[ab]\b", operands))
        for operation, register, operands in statements
    }

    def half(gradient: str) -> str:
        """The conversion that its logit comes from."""
        exponential = next(r for r in made[gradient][1] if made[r][0].startswith("ex2"))
        scaled = made[exponential][1][0]
        logit = made[made[scaled][1][0]][1][0]
        return made[logit][0] if dtype is torch.bfloat16 else made[logit][1][0]

    stored = re.search(r"st\.global\.v4\.b32 \[[^]]*\], \{ (%\w+)", ptx)
    assert stored is not None
    high, low = made[stored[1]][1]
    assert (half(low), half(high)) == (
        ("shl.b32", "and.b32") if dtype is torch.bfloat16 else ("a", "b")
    )


def accesses_of_a_cluster(dtype: torch.dtype, kind: str) -> list[str]:
    """What its programs do with memory, and where they wait for one another, in order."""
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        ahead.cross_entropy_case((4096, 128_256), dtype, kind).run()
    kernel = dict(launched)["one_read_kernel"]
    assert kernel.metadata.num_ctas == 16
    return re.findall(r"[ls][dt]\.global(?:\.v4)?|cluster\.wait", kernel.asm["ptx"])


@clusters
def test_a_target_is_read_before_its_cluster_overwrites_it() -> None:
    """Though the log-sum-exp is given, and no sum brings the programs together."""
    events = accesses_of_a_cluster(torch.float32, "block upstream inplace")
    first_store = events.index("st.global.v4")
    assert events[first_store - 1] == "cluster.wait"
    assert "ld.global" in events[: first_store - 1]


@clusters
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_targets_gradient_waits_for_the_whole_cluster(dtype: torch.dtype) -> None:
    events = accesses_of_a_cluster(dtype, "")
    events = [event for event in events if not event.startswith("ld")]
    after = len(events) - events[::-1].index("st.global.v4")
    assert events[after : after + 3] == [
        "cluster.wait",
        "st.global",  # the target's gradient
        "cluster.wait",  # before the next row's sums
    ]
    assert events[-1] == "cluster.wait"  # so that no memory goes while another program reads it


def test_a_branch_from_behind_the_end_is_no_loop() -> None:
    loop = ".LBB0_1:\n\ts_cbranch_scc1 .LBB0_1"
    aside = ".LBB0_2:\n\ts_endpgm\n.LBB0_3:\n\ts_branch .LBB0_2\n"
    assert ahead.loops(f"{loop}\n{aside}") == [loop]


@pytest.mark.parametrize("stride", [0, 1])
def test_offsets_beyond_32_bits(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pyfused.kernels.cross_entropy_launch"]
    monkeypatch.setattr(module, "run", record := Mock(wraps=module.run))
    x = ahead.empty(torch.float32, 2, 2**31 // 2 if stride else 2**31)
    x = x.as_strided(x.shape, (2 * x.shape[1], 2 * stride))
    options = CrossEntropyOptions(-100, "mean", 0.0)
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        ahead.backend.cross_entropy(x, ahead.empty(torch.int64, 2), None, options, Want())
    assert [name for name, _ in launched] == ["split_kernel", "two_read_kernel"]
    *_, plan = record.call_args[0]
    assert plan.constants.INDEX is tl.int64


@clusters
@pytest.mark.parametrize("classes", [1000, 4096, 128_256])
@pytest.mark.parametrize(
    ("positions", "kernels"),
    [(512, ["one_read_kernel"]), (513, ["count_kernel", "one_read_kernel"])],
)
def test_launches_of_a_mean(positions: int, kernels: list[str], classes: int) -> None:
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        ahead.cross_entropy_case((positions, classes), torch.bfloat16, "").run()
    assert [name for name, _ in launched] == kernels


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "capped"])
def test_launches_for_each_chunk_of_a_linear_layers_logits(softcap: float | None) -> None:
    """Beside the products: the loss with its gradient, and the cap's two."""
    x, weight = ahead.empty(torch.bfloat16, 1024, 64), ahead.empty(torch.bfloat16, 32_000, 64)
    target = ahead.empty(torch.int64, 1024)
    head = Head(x, weight, None, target, None, Shaping(softcap))
    options = CrossEntropyOptions(-100, "mean", 0.0)
    wanted = chunked.Wanted(True, True)
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        chunked.by_rows(ahead.backend, head, options, 256, True, wanted, None, 0.0)
    assert len(launched) == 4 * (1 if softcap is None else 3)
