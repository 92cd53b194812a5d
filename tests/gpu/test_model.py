"""The model of the GPU kernels: machine code read right, queues that add up, and ceilings."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ahead
import amd
import model
import nvidia
import peers
from machine_code import demand
from model import GPUS, Step, Traffic

from pyfused.kernels import launch

KERNEL = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R4.64] ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0030*/                   LDG.E.128 R12, desc[UR4][R6.64+0x1000] ;
        /*0040*/                   FMNMX R1, R8, R12, !PT ;
        /*0050*/                   MUFU.EX2 R1, R1 ;
        /*0060*/              @P1 BRA `(.L_x_0) ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1) ;
"""


def test_instructions_loops_and_widths() -> None:
    code = nvidia.parse(KERNEL)
    assert [i.name for i in code.instructions][-2:] == ["STG", "EXIT"]
    assert code.loops == code.loading_loops() == [(2, 6)]
    assert (code.row_width(2, 6), code.loaded(2, 6)) == (16, 32)
    assert len(code.steps({2: 3})) == len(code.instructions) + 2 * 5


def test_what_only_the_last_program_does_is_left_out() -> None:
    last = """
        /*00a0*/                   ATOMG.E.ADD.STRONG.GPU PT, R6, desc[UR4][R4.64], R3 ;
        /*00b0*/               @P0 EXIT ;
.L_x_2:
        /*00c0*/                   LDG.E R7, desc[UR4][R8.64] ;
        /*00d0*/               @P1 BRA `(.L_x_2) ;
        /*00e0*/                   EXIT ;
"""
    rest = "        /*0090*/                   EXIT ;\n"
    code = nvidia.parse(KERNEL.replace(rest, last))
    assert [i.name for i in code.instructions][-2:] == ["STG", "ATOMG"]
    assert code.loops == [(2, 6)]


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("LDG.E.128 R8, desc[UR4][R6.64]", {8, 9, 10, 11}, {6}),
        ("STG.E.64 desc[UR4][R6.64], R8", set(), {6, 8, 9}),
        ("SHFL.BFLY PT, R3, R2, 0x10, 0x1f", {3}, {2}),
        ("FFMA R1, R2, R3, R4", {1}, {2, 3, 4}),
        ("LDG.E.U16 R5, desc[UR4][R6.64]", {5}, {6}),
    ],
)
def test_registers(text: str, written: set[int], read: set[int]) -> None:
    opcode, _, rest = text.partition(" ")
    instruction = nvidia.instruction(opcode, rest)
    assert (instruction.written, instruction.read) == (written, read)


def test_units() -> None:
    names = "FADD", "MUFU.EX2", "LOP3.LUT", "NOP", "LDG.E"
    steps = [nvidia.instruction(name) for name in names]
    assert demand(steps) == {"issue": 4, "fma": 1, "mufu": 8, "alu": 2, "memory": 2}


AMD_KERNEL = """
one_read_kernel:                        ; @one_read_kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tbuffer_store_dwordx4 v[6:9], v10, s[28:31], 0 offen
.LBB0_2:                                ; =>This Loop Header: Depth=1
\tbuffer_load_dwordx2 v[2:3], v1, s[28:31], 0 offen
\ts_cbranch_scc1 .LBB0_1
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
\tbuffer_load_dwordx4 v[4:7], v1, s[36:39], 0 offen
\tbuffer_load_dwordx4 v[8:11], v1, s[36:39], 0 offen offset:1024
\ts_waitcnt vmcnt(1)
\tv_exp_f32_e32 v2, v4
\ts_cbranch_scc0 .LBB0_3
\ts_cbranch_scc1 .LBB0_2
\ts_nop 1
\tglobal_atomic_add v2, v2, v3, s[4:5] offset:4 sc0
\ts_cbranch_scc1 .LBB0_5
; %bb.4:
\tglobal_load_dword v2, v2, s[4:5]
.LBB0_5:
\ts_endpgm
"""


def test_amds_instructions_loops_and_widths() -> None:
    """Of two loops that cross, as the paths of one do, the outer one is made."""
    code = amd.parse(AMD_KERNEL)
    assert code.instructions[-1].kind == "count"
    assert code.loops == [(2, 10), (5, 9)]
    assert code.loading_loops() == [(5, 9)]
    assert (code.row_width(5, 9), code.loaded(5, 9)) == (16, 32)


def test_amds_units() -> None:
    names = "v_pk_add_f32", "v_exp_f32_e32", "s_add_i32", "buffer_load_ushort", "ds_read_b64"
    steps = [amd.instruction(name) for name in names] + [amd.instruction("s_nop", "1")]
    units = {"vector": 20, "scalar": 4, "memory": 16, "shared": 16}
    assert demand(steps) == {"issue": 7, **units}


@pytest.mark.parametrize(
    ("left", "awaited"), [("vmcnt(1)", [1]), ("vmcnt(0) lgkmcnt(0)", [1, 3, 2]), ("lgkmcnt(1)", [])]
)
def test_a_wait_leaves_the_last_accesses_under_way(left: str, awaited: list[int]) -> None:
    flight = model.Flight()
    for name in ("buffer_load_dwordx4", "ds_read_b32", "global_store_dword"):
        flight.begin(amd.instruction(name))
    assert [each.number for each in flight.end(amd.instruction("s_waitcnt", left))] == awaited
    assert not flight.end(amd.instruction("s_waitcnt", left))


def test_programs_that_fit() -> None:
    """Each quarter of a multiprocessor has registers of its own, which warps take by eights."""
    fit = model.GPUS["H200"].resident
    of_one_warp = {32: 32, 64: 32, 72: 28, 80: 24, 88: 20, 128: 16}
    assert {registers: fit(1, registers, 0) for registers in of_one_warp} == of_one_warp
    assert [fit(8, registers, 0) for registers in (32, 64, 72, 80)] == [8, 4, 3, 3]
    assert fit(4, 32, 100 << 10) == 2
    assert [launch.fit(128, 64, most) for most in (2048, 1536, 1024)] == [8, 8, 8]
    assert [launch.fit(128, 32, most) for most in (2048, 1536, 1024)] == [16, 12, 8]
    fit = model.GPUS["MI300X"].resident
    assert [fit(4, registers, 0) for registers in (64, 65, 128, 130)] == [8, 7, 4, 3]


H200 = GPUS["H200"]


def test_traffic_alone_takes_what_a_copy_takes() -> None:
    size, programs = 1 << 16, 400
    steps = [Step("load", bytes=size / 2, load=1), Step("await", load=1), Step("store", bytes=size)]
    time = model.run(steps, H200, 1, 16, programs)
    copy = programs * 1.5 * size / H200.bytes_a_ns * H200.multiprocessors
    assert 1.0 <= time / copy < 1.05


def test_work_alone_takes_its_slots() -> None:
    steps = [Step("work", Counter(issue=24, mufu=80))] * 50
    time = model.run(steps, H200, 8, 4, 64)
    slots = 64 * 8 * 50 * 80 / 4 / H200.ghz / H200.efficiency
    assert 1.0 <= time / slots < 1.1


def test_a_barrier_waits_for_the_last_warp() -> None:
    steps = [Step("barrier"), Step("delay", bytes=100)]
    one, two = (model.run(steps, H200, warps, 1, 1) for warps in (1, 8))
    assert one == pytest.approx(two)


def test_second_reads_hit_below_half_of_l2_and_miss_above_it() -> None:
    assert [model.hits(mb, H200) for mb in (10, 25, 37.5, 50, 80)] == [1, 1, 0.5, 0, 0]


@pytest.mark.parametrize(("turns", "rounds"), [(8, 1), (33, 2), (1000, launch.ROUNDS)])
@pytest.mark.parametrize("classes", [10, 4096, 32_000, 50_257, 50_304, 128_256])
def test_programs_fill_a_gpu(classes: int, turns: int, rounds: int) -> None:
    """Once, or some times where there is much to do: never a little more."""

    def launched(positions: int) -> tuple[Any, int]:
        recorder = ahead.Recorder(ahead.TARGETS["sm_90"])
        with recorder as kernels:
            ahead.cross_entropy_case((positions, classes), torch.bfloat16, "").run()
        return kernels[-1][1].metadata, recorder.programs[-1]

    metadata, programs = launched(1 << 24)
    fit = H200.resident(metadata.num_warps, metadata.maxnreg, metadata.shared)
    assert fit == launch.fit(32 * metadata.num_warps, metadata.maxnreg)
    room = 132 * fit / metadata.num_ctas
    assert 0.95 * room <= programs / launch.ROUNDS <= room
    positions = turns * programs // launch.ROUNDS * (32 if classes == 10 else 1)
    assert launched(positions)[1] == programs * rounds // launch.ROUNDS


def gpu_json(folder: Path, gpu: str, shares: dict[str, float]) -> Path:
    """As benchmarks/gpu.py writes it."""
    rows = [
        {"case": case, "op": "cross_entropy", "mode": mode, "peers": {"copy": {"ratio": [0, s, 1]}}}
        for case, s in shares.items()
        for mode in ("forward", "forward+backward")
    ]
    found = {"machine_info": {"gpu": gpu}, "benchmarks": [{"extra_info": row} for row in rows]}
    file = folder / "gpu.json"
    file.write_text(json.dumps(found))
    return file


def test_what_was_measured_tells_the_efficiency(tmp_path: Path) -> None:
    """Shares that the model says for another efficiency are taken for measured ones."""
    name = "cross_entropy (1024, 1000) float32"
    others = {"cross_entropy (8192, 32000) bfloat16, 50% ignored": 0.1, "mse_loss (1 M) float32": 1}
    gpu, read = model.read_measured(gpu_json(tmp_path, "NVIDIA H200", {name: 0.5, **others}))
    assert gpu == H200
    ((case, traffic, share),) = read
    assert (case.name, share) == ("cross_entropy float32 1024x1000", 0.5)
    assert traffic == Traffic(1_024_000, 4_096_000, 4_096_000)
    slower = H200._replace(efficiency=0.65)
    measured = [(case, traffic, model.predict(case, traffic, slower).share)]
    assert model.fit(measured, H200) == slower
    said = f"{measured[0][2]:.0%} | {model.predict(case, traffic, H200).share:.0%}"
    assert f"1024x1000 | {said} | {measured[0][2]:.0%} |" in model.compare(measured, H200)


def test_a_gpu_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="'Radeon', expected one of H200, H100, A100, B200, MI300X"
    ):
        model.read_measured(gpu_json(tmp_path, "Radeon", {}))


# Case; then the most instructions an element, reads of a row, registers, launches, bytes spilled.
CEILINGS = (
    ("bfloat16 268435x1000", 15, 1, 64, 2, 0),
    ("bfloat16 65536x4096", 17, 1, 64, 2, 0),
    ("bfloat16 16384x16384", 17, 1, 64, 2, 0),
    ("bfloat16 8388x32000", 17.5, 1, 64, 2, 0),
    ("bfloat16 5341x50257", 19.5, 1, 64, 2, 0),
    ("bfloat16 5336x50304", 18, 1, 64, 2, 0),
    ("bfloat16 2092x128256", 17.5, 1, 64, 2, 0),
    ("bfloat16 1024x262144", 17, 1, 64, 2, 0),
    ("bfloat16 8388x32000 forward", 10.5, 1, 32, 2, 0),
    ("bfloat16 26843545x10", 26.5, 1, 56, 2, 0),
    ("bfloat16 16x21x512x512", 24.5, 1, 72, 2, 0),
    ("bfloat16 8x150x256x256", 28, 1, 72, 2, 40),
    ("float32 65536x4096", 19, 1, 64, 2, 0),
    ("float32 16384x16384", 20, 1, 64, 2, 0),
    ("float32 5341x50257", 23.5, 1, 64, 2, 24),
    ("float32 2092x128256", 20.5, 1, 64, 2, 0),
    ("float32 1024x262144", 20, 1, 64, 2, 0),
    ("float32 8x150x256x256", 32, 1, 80, 2, 40),
    ("bfloat16 65536x4096 smoothing", 18.5, 1, 64, 2, 0),
    ("bfloat16 8388x32000 smoothing", 20, 1, 64, 2, 56),
    ("bfloat16 65536x4096 probabilities", 31.5, 1, 64, 1, 0),
    ("bfloat16 8388x32000 probabilities", 31, 1, 96, 1, 8),
    ("float32 65536x4096 probabilities", 42, 1, 64, 1, 0),
    ("float32 8388x32000 probabilities", 37.5, 1, 96, 1, 0),
    ("softmax bfloat16 8388x32000", 19.5, 1, 64, 1, 16),
    ("softmax bfloat16 8388x32000 backward", 12, 1, 80, 1, 0),
    ("mse_loss bfloat16", 10, 1, 32, 1, 0),
    ("binary_cross_entropy_with_logits bfloat16", 38, 1, 64, 1, 0),
    ("binary_cross_entropy_with_logits float32", 36.5, 1, 32, 1, 0),
    ("gelu bfloat16", 18, 1, 32, 1, 0),
    ("tanh bfloat16", 24, 1, 40, 1, 0),
    ("tanh float32", 30, 1, 40, 1, 0),
)


@pytest.mark.skipif(not launch.CLUSTERS_COMPILE, reason="another compiler takes other registers")
@pytest.mark.parametrize("ceiling", CEILINGS, ids=lambda ceiling: ceiling[0])
def test_no_kernel_takes_more_than_it_did(ceiling: tuple[str, float, int, int, int, int]) -> None:
    name, instructions, reads, registers, launches, spills = ceiling
    cases = {case.name: (case, traffic) for case, traffic in model.cases()}
    found = model.predict(*cases.get(name) or cases[f"cross_entropy {name}"], H200)
    assert found.instructions <= instructions
    assert (found.reads, found.launches) == (reads, launches)
    assert found.registers <= registers
    assert found.spills <= spills


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger's kernels are not installed")
@pytest.mark.parametrize(
    ("dtype", "published"), [(torch.bfloat16, 2.583), (torch.float32, 4.489)], ids=str
)
def test_what_was_published_of_ligers_kernel(dtype: torch.dtype, published: float) -> None:
    """Milliseconds on an H100, with gradient."""
    shape = 8192, 128_256
    n = math.prod(shape)
    traffic = Traffic(n, n * dtype.itemsize, n * dtype.itemsize)
    share = model.predict(peers.liger(*shape, dtype), traffic, GPUS["H100"]).share
    predicted = 2 * traffic.read / GPUS["H100"].bytes_a_ns / share / 1e6
    assert predicted == pytest.approx(published, rel=0.15)


@pytest.mark.skipif(find_spec("quack") is None, reason="quack's kernels are not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_was_published_of_quacks_kernel() -> None:
    """Some 3 TB/s on an H100, which is what a copy reaches."""
    rows, classes = 32_768, 4096
    size = 2 * rows * classes
    case = ahead.Case("quack", torch.bfloat16, lambda: None)
    traffic = Traffic(rows * classes, size, size)
    found = model.predict_quack(rows, classes, case, traffic, GPUS["H100"])
    assert found.share > 0.9
    assert found.instructions < 20


def test_cases_are_those_that_users_call() -> None:
    names = [case.name for case, _ in model.cases()]
    assert len(names) == len(set(names))
    assert isinstance(next(model.cases())[0], ahead.Case)
