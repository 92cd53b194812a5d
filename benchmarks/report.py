"""Write what `pytest benchmarks --benchmark-json FILE` found as tables and pictures.

    python benchmarks/report.py FILE...
    python benchmarks/report.py FILE... --readme README.md
    python benchmarks/report.py FILE... --allocators FILE --page docs/memory.md

They go to a folder named after the machine; --readme also puts the headline cases' table between
the markers in that file, and --page what allocators.py found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cpuinfo
import pictures
import torch
from measure import Peer, Row

from pyfused.backends import cpu

RESULTS = Path(__file__).parent / "results"
# Who stands in the README, and in the picture above it.
HEADLINE_PEERS = ("torch", "torch, THP", "torch.compile")
KEY = """\
- torch: eager, with the allocator as it comes, as a user has it.
- torch.compile: the operator alone, by Inductor's defaults; pyfused beside it is eager.
- torch, THP: eager, both in a process with THP_MEM_ALLOC_ENABLE=1, PyTorch's own switch.
- torch, jemalloc: eager, both with jemalloc preloaded as PyTorch's tuning guide sets it.
- torch, kept pages: eager, both in a process whose allocator keeps the pages of freed tensors.
- copy: reading and writing as many bytes as the case must move at least, in warm memory. Its time
  divided by pyfused's is the share of the memory's speed that pyfused reaches, with kept pages.
"""
GPU_KEY = """\
- torch: eager. torch.compile: the operator alone, by Inductor's defaults.
- copy: a copy of as many bytes as the case must move at least. Its time divided by pyfused's is the
  share of the copy's bandwidth that pyfused reaches.
- peak: the most memory that a call takes beyond what was there, in gradients of the input.
"""
BLOCK = re.compile(r"(?s)(?<=<!-- benchmark table -->\n).*?(?=<!-- end of benchmark table -->)")


def load(files: Sequence[Path]) -> dict[str, Any]:
    """What the files found; the runs of one machine are taken as one."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        if other["machine_info"] != first["machine_info"]:
            sys.exit("the files come from different machines")
        first["benchmarks"] += other["benchmarks"]
        first["memory"] += other["memory"]
    return first


def rows_of(found: dict[str, Any]) -> list[Row]:
    """One row for each case and mode, with the peers of every run."""
    rows: dict[tuple[str, str, str], Row] = {}
    for benchmark in found["benchmarks"]:
        fields = benchmark["extra_info"]
        row = Row(**fields | {"peers": {n: Peer(**peer) for n, peer in fields["peers"].items()}})
        rows.setdefault((row.case, row.mode, row.curve), row).peers.update(row.peers)
    return sorted(rows.values(), key=lambda row: row.case.split()[0])


def peers_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.peers))


def markdown(rows: Sequence[Row], peers: Sequence[str] = ()) -> str:
    """A table of ratios, beside the times of pyfused and of the first peer."""
    peers = peers or peers_of(rows)
    first = peers[0]
    columns = ["case", "mode", "pyfused, ms", f"{first}, ms", *(f"{n} / pyfused" for n in peers)]
    peaks = any(row.peak_gradients is not None for row in rows)
    columns += ["peak, gradients"] if peaks else []
    lines = []
    for row in rows:
        known = row.peers.get(first)
        cells = [row.case, row.mode]
        cells += [f"{known.pyfused_ms:.3g}", f"{known.ms:.3g}"] if known else ["", ""]
        for name in peers:
            peer = row.peers.get(name)
            cells.append(spread(peer.ratio) if peer else "")
        if peaks:
            cells.append("" if row.peak_gradients is None else f"{row.peak_gradients:.2f}")
        lines.append(cells)
    return tabulated(columns, lines, names=2)


def tabulated(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    head = [columns, ["---"] * names + ["---:"] * (len(columns) - names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def spread(ratio: Sequence[float]) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)


def allocators_markdown(found: Sequence[dict[str, Any]]) -> str:
    """How many times as fast as torch with the allocator as it comes; a row for each way."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    ways = list(dict.fromkeys(entry["way"] for entry in found))
    by = {(entry["way"], entry["case"]): entry for entry in found}
    first = [f"{by[ways[0], case]['ms']:.3g} ms" for case in cases]
    rows = [[way, *(spread(by[way, case]["ratio"]) for case in cases)] for way in ways[1:]]
    return tabulated(["", *cases], [[ways[0], *first], *rows], names=1)


def machine_info() -> dict[str, Any]:
    found = cpuinfo.get_cpu_info()
    brand = found.get("brand_raw") or found["arch"]
    return {
        "cpu": re.sub(r"\((R|TM)\)| CPU| @.*", "", brand).strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.capability,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": cpu.native.compiler,
    }


def machine(found: dict[str, Any]) -> str:
    info, date = found["machine_info"], found["datetime"][:10]
    if "gpu" in info:
        return (
            f"{info['gpu']}, driver {info['driver']}, torch {info['torch']}, Triton "
            f"{info['triton']}, Liger {info['liger']}, Python {info['python']}, {info['system']}, "
            f"{date}"
        )
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, {info['isa']}, "
        f"{info['compiler']}, torch {info['torch']}, Python {info['python']}, {info['system']}, "
        f"{date}"
    )


def slug(found: dict[str, Any]) -> str:
    info = found["machine_info"]
    name = info.get("gpu") or f"{info['cpu']} {info['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fill(page: Path, table: str) -> None:
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"{page} has no block between the markers of the benchmark table")
    page.write_text(BLOCK.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest-benchmark wrote")
    parser.add_argument("--allocators", type=Path, help="what allocators.py wrote")
    parser.add_argument("--readme", type=Path, help="a file whose table is to be replaced")
    parser.add_argument("--page", type=Path, help="the same, with the table of allocators")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


def draw(found: dict[str, Any], cases: list[Row], points: list[Row]) -> dict[str, pictures.Titled]:
    """A picture of each kind that there is something to show of."""
    known = peers_of(cases)
    peers = [name for name in (*HEADLINE_PEERS, "copy") if name in known]
    drawn = {"ratios": pictures.ratios(cases, known if "gpu" in found["machine_info"] else peers)}
    if points:
        drawn["scaling"] = pictures.scaling(points)
    if found["memory"]:
        drawn["memory"] = pictures.memory(found["memory"])
    if found.get("allocators"):
        drawn["allocators"] = pictures.allocators(found["allocators"])
    return drawn


def main() -> None:
    arguments = parse()
    found = load(arguments.json)
    if arguments.allocators:
        found |= json.loads(arguments.allocators.read_text(encoding="utf-8"))
    rows = rows_of(found)
    cases, points = ([row for row in rows if bool(row.curve) is curve] for curve in (False, True))
    folder = arguments.results / slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{machine(found)}. Medians, and in brackets the quartiles of the ratio.\n"
    key = GPU_KEY if "gpu" in found["machine_info"] else KEY
    tables = [caption, markdown(cases), f"\n{key}"]
    if arguments.allocators:
        allocators = allocators_markdown(found["allocators"])
        tables.append(f"How many times as fast as torch, forward + backward:\n\n{allocators}\n")
    (folder / "table.md").write_text("\n".join(tables), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, (figure, title) in draw(found, cases, points).items():
        figure.suptitle(f"{title}\n{machine(found)}", fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=150)
    if arguments.readme:
        headline = [row for row in cases if row.headline and row.mode == "forward+backward"]
        fill(arguments.readme, f"{caption}\n{markdown(headline, HEADLINE_PEERS)}\n")
    if arguments.page:
        fill(arguments.page, f"{caption}\n{allocators}\n")
    print(markdown(cases), f"written to {folder}", sep="\n\n")


if __name__ == "__main__":
    main()
