"""Write what `pytest benchmarks --benchmark-json FILE` found as tables and pictures.

    python benchmarks/report.py FILE...
    python benchmarks/report.py FILE... --readme README.md

They go to a folder named after the machine; --readme also puts the headline cases' table between
the markers in that file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pictures
from measure import Peer, Row

RESULTS = Path(__file__).parent / "results"
KEY = """\
- torch: eager, with the allocator as it comes, as a user has it.
- torch.compile: the operator alone, by Inductor's defaults; pyfused beside it is eager.
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


def markdown(rows: Sequence[Row]) -> str:
    """A table of ratios, beside the times of pyfused and of the first peer."""
    peers = peers_of(rows)
    first = peers[0]
    columns = ["case", "mode", "pyfused, ms", f"{first}, ms", *(f"{n} / pyfused" for n in peers)]
    peaks = any(row.peak_gradients is not None for row in rows)
    columns += ["peak, gradients"] if peaks else []
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    for row in rows:
        known = row.peers.get(first)
        cells = [row.case, row.mode]
        cells += [f"{known.pyfused_ms:.3g}", f"{known.ms:.3g}"] if known else ["", ""]
        for name in peers:
            peer = row.peers.get(name)
            cells.append("{1:.2f} ({0:.2f} to {2:.2f})".format(*peer.ratio) if peer else "")
        if peaks:
            cells.append("" if row.peak_gradients is None else f"{row.peak_gradients:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def fill(readme: Path, table: str) -> None:
    text = readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"{readme} has no block between the markers of the benchmark table")
    readme.write_text(BLOCK.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest-benchmark wrote")
    parser.add_argument("--readme", type=Path, help="a file whose table is to be replaced")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    arguments = parser.parse_args()

    found = load(arguments.json)
    rows = rows_of(found)
    cases, points = ([row for row in rows if bool(row.curve) is curve] for curve in (False, True))
    folder = arguments.results / slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{machine(found)}. Medians, and in brackets the quartiles of the ratio.\n"
    key = GPU_KEY if "gpu" in found["machine_info"] else KEY
    tables = [caption, markdown(cases), f"\n{key}"]
    (folder / "table.md").write_text("\n".join(tables), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    drawn = {"ratios": pictures.ratios(cases, peers_of(cases))}
    if points:
        drawn["scaling"] = pictures.scaling(points)
    if found["memory"]:
        drawn["memory"] = pictures.memory(found["memory"])
    for name, (figure, title) in drawn.items():
        figure.suptitle(f"{title}\n{machine(found)}", fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=150)
    if arguments.readme:
        headline = [row for row in cases if row.headline and row.mode == "forward+backward"]
        fill(arguments.readme, f"{caption}\n{markdown(headline)}\n")
    print(markdown(cases), f"written to {folder}", sep="\n\n")


if __name__ == "__main__":
    main()
