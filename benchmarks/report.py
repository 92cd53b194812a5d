"""Writes tables from the results of pytest-benchmark and of the GPU suite.

The pages of docs/ show files of benchmarks/results/<machine>.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import Case
from timing import Quartiles, Times, ratios

from pyfused.backends import cpu

ROOT = Path(__file__).parents[1]
RESULTS, OUTPUT = ROOT / "benchmarks" / "results", ROOT / ".benchmarks"
Found = dict[str, Any]  # the JSON output of pytest-benchmark


@dataclass(frozen=True)
class Peer:
    """The result of a peer: milliseconds per call, pyfused's, and the ratio per round."""

    ms: float
    pyfused_ms: float
    ratio: Quartiles


@dataclass(frozen=True)
class Row:
    """The result of one benchmark. Times are medians."""

    case: str
    op: str
    mode: str
    headline: bool
    elements: int
    peers: dict[str, Peer]
    peak_gradients: float | None = None  # peak memory, in multiples of the input's gradient
    bytes: int = 0  # the minimum number of bytes read and written


def peer(theirs: Sequence[float], ours: Sequence[float]) -> Peer:
    return Peer(median(theirs), median(ours), ratios(theirs, ours))


def row(case: Case, mode: str, peers: dict[str, Peer], peak: float | None = None) -> Row:
    moved = case.traffic(mode) * case.bytes
    return Row(case.name, case.op, mode, case.headline, case.elements, peers, peak, moved)


# ---- the machine ---------------------------------------------------------------------------------


def machine_info() -> dict[str, Any]:
    import cpuinfo  # installed with pytest-benchmark

    found = cpuinfo.get_cpu_info()
    brand = found.get("brand_raw") or found["arch"]
    return {
        "cpu": re.sub(r"\((R|TM)\)| CPU| @.*", "", brand).strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.capability,
        "compiler": cpu.native.compiler,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def measured(info: dict[str, Any]) -> Found:
    """Returns a description of the machine, with the date, for a report."""
    return {"machine_info": info, "datetime": datetime.now(timezone.utc).isoformat()}


def machine(found: Found) -> str:
    words = {"cores": "{} cores", "threads": "{} threads", "driver": "driver {}"}
    words |= {"torch": "torch {}", "triton": "Triton {}", "liger": "Liger {}"}
    words["python"] = "Python {}"
    described = [words.get(k, "{}").format(v) for k, v in found["machine_info"].items()]
    joined = ", ".join([*described, found["datetime"][:10]])
    return joined.replace(" 1 threads,", " 1 thread,")


def slug(found: Found) -> str:
    """Returns the name of a machine's folder, which includes the kernels' instruction set."""
    info = found["machine_info"]
    if "gpu" in info:
        name = info["gpu"]
    else:
        threads = "" if info["threads"] == info["cores"] else f" {info['threads']} threads"
        name = f"{info['cpu']} {info['cores']} cores{threads} {info['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- tables --------------------------------------------------------------------------------------


def load(files: Sequence[Path]) -> Found:
    """Merges the results of several runs on one machine."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        first["benchmarks"] += other["benchmarks"]
    return first


def rows_of(found: Found) -> list[Row]:
    """Returns one row for each case and mode, with the peers of all runs."""
    rows: dict[tuple[str, str], Row] = {}
    for benchmark in found["benchmarks"]:
        fields = benchmark["extra_info"]
        row = Row(**fields | {"peers": {n: Peer(**peer) for n, peer in fields["peers"].items()}})
        rows.setdefault((row.case, row.mode), row).peers.update(row.peers)
    return sorted(rows.values(), key=lambda row: row.case.split()[0])


def cells(row: Row) -> dict[str, Any]:
    """Returns the columns of a row; each peer has five."""
    found = {**asdict(row), "headline": int(row.headline)}
    peers = found.pop("peers")
    for name, peer in peers.items():
        columns = peer["ms"], peer["pyfused_ms"], *peer["ratio"]
        found |= {f"{name}: {column}": x for column, x in zip(OF_PEER, columns, strict=True)}
    return found


OF_PEER = ("ms", "pyfused, ms", "ratio, lower quartile", "ratio, median", "ratio, upper quartile")


def row_of(found: dict[str, str]) -> Row:
    peers = {}
    for name in dict.fromkeys(key.partition(": ")[0] for key in found if ": " in key):
        if found[f"{name}: ms"]:
            ms, ours, *ratio = (float(found[f"{name}: {column}"]) for column in OF_PEER)
            peers[name] = Peer(ms, ours, tuple(ratio))
    peak = found["peak_gradients"]
    return Row(
        found["case"],
        found["op"],
        found["mode"],
        found["headline"] == "1",
        int(found["elements"]),
        peers,
        float(peak) if peak else None,
        int(found["bytes"]),
    )


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a table; numbers have five digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()})


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def markdown(rows: Sequence[Row]) -> str:
    """Returns a table with the times of pyfused and of the first peer, and ratios."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    first = peers[0]
    several = len({row.mode for row in rows}) > 1
    columns = ["case", *["mode"] * several, "pyfused, ms", f"{first}, ms"]
    columns += ["share of a copy" if n == "copy" else f"{n} / pyfused" for n in peers]
    columns.append("GB/s")
    peaks = any(row.peak_gradients is not None for row in rows)
    columns += ["peak, gradients"] if peaks else []
    lines = []
    for row in rows:
        known = row.peers.get(first)
        cells = [row.case, *[row.mode] * several]
        cells += [f"{known.pyfused_ms:.3g}", f"{known.ms:.3g}"] if known else ["", ""]
        cells += [spread(row.peers[name].ratio) if name in row.peers else "" for name in peers]
        known = row.peers.get("copy")  # present for memory-bound cases
        cells.append(f"{row.bytes / known.pyfused_ms / 1e6:.3g}" if known else "")
        if peaks:
            cells.append("" if row.peak_gradients is None else f"{row.peak_gradients:.2f}")
        lines.append(cells)
    return tabulated(columns, lines, names=1 + several)


def tabulated(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    head = [columns, ["---"] * names + ["---:"] * (len(columns) - names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def times_cells(times: Times) -> list[str]:
    """Returns table cells: the median times of two timers, and their ratio."""
    return [*(f"{median(each):,.4g}" for each in times), spread(ratios(*times))]


def spread(ratio: Sequence[float]) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)


# ---- the report ----------------------------------------------------------------------------------


def write(files: Sequence[Path], results: Path) -> Path:
    """Prints the results of pytest-benchmark, and writes them into a folder, which is returned."""
    found = load(files)
    rows = rows_of(found)
    if not rows:
        sys.exit("no benchmark has succeeded")
    folder = save(rows, found, results)
    print(markdown(rows), f"written to {folder}", sep="\n\n")
    return folder


def save(rows: Sequence[Row], found: Found, results: Path) -> Path:
    """Writes the results of a machine into its folder, which is returned."""
    folder, where = results / slug(found), {"machine": machine(found)}
    write_csv(folder / "results.csv", [cells(row) | where for row in rows])
    return folder
