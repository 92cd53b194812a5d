"""Write what `pytest benchmarks --benchmark-json FILE` found as a table and a picture.

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

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Peer, Row

RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(?s)(?<=<!-- benchmark table -->\n).*?(?=<!-- end of benchmark table -->)")
# From Okabe and Ito's palette, which every kind of colour vision tells apart.
STYLES = {
    "forward+backward": {"color": "#D55E00", "marker": "o"},
    "forward": {"color": "#0072B2", "marker": "D"},
}


def load(files: Sequence[Path]) -> dict[str, Any]:
    """What the files found; runs in several pieces, on one machine, are taken as one."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        if other["machine_info"] != first["machine_info"]:
            sys.exit("the files come from different machines")
        first["benchmarks"] += other["benchmarks"]
    return first


def rows_of(found: dict[str, Any]) -> list[Row]:
    rows = []
    for benchmark in found["benchmarks"]:
        fields = benchmark["extra_info"]
        peers = {name: Peer(**peer) for name, peer in fields["peers"].items()}
        rows.append(Row(**fields | {"peers": peers}))
    return sorted(rows, key=lambda row: row.case.split()[0])


def markdown(rows: Sequence[Row]) -> str:
    peers = list(rows[0].peers)
    columns = [column for name in peers for column in (f"{name}, ms", f"{name} / pyfused")]
    lines = [
        f"| case | mode | pyfused, ms | {' | '.join(columns)} |",
        f"| --- | --- | ---: |{' ---: |' * len(columns)}",
    ]
    for row in rows:
        cells = [row.case, row.mode, f"{row.pyfused_ms:.3g}"]
        for name in peers:
            low, median, high = row.peers[name].ratio
            cells += [f"{row.peers[name].ms:.3g}", f"{median:.2f} ({low:.2f} to {high:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(found: dict[str, Any]) -> str:
    info, date = found["machine_info"], found["datetime"][:10]
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, {info['isa']}, "
        f"torch {info['torch']}, Python {info['python']}, {info['system']}, {date}"
    )


def slug(found: dict[str, Any]) -> str:
    info = found["machine_info"]
    return re.sub(r"[^a-z0-9]+", "-", f"{info['cpu']} {info['cores']} cores".lower()).strip("-")


def draw_peer(axes: Axes, rows: Sequence[Row], cases: Sequence[str], peer: str) -> None:
    for (mode, style), offset in zip(STYLES.items(), (-0.17, 0.17), strict=True):
        for row in rows:
            if row.mode != mode:
                continue
            low, median, high = row.peers[peer].ratio
            place = cases.index(row.case) + offset
            spread = [[median - low], [high - median]]
            axes.errorbar(median, place, xerr=spread, markersize=6, capsize=3, **style)
        axes.errorbar([], [], xerr=[], markersize=6, capsize=3, label=mode, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.7, axes.get_xlim()[0]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel(f"time of {peer} / time of pyfused")
    axes.grid(axis="x", alpha=0.3)
    for place in range(0, len(cases), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def picture(found: dict[str, Any], rows: Sequence[Row]) -> Figure:
    cases = list(dict.fromkeys(row.case for row in rows))
    peers = list(rows[0].peers)
    size = (8 * len(peers), 2 + 0.36 * len(cases))
    figure = Figure(figsize=size, layout="constrained")
    for axes, peer in zip(figure.subplots(1, len(peers), squeeze=False)[0], peers, strict=True):
        draw_peer(axes, rows, cases, peer)
    title = "How many times faster pyfused is: median of the rounds, and their middle half"
    figure.suptitle(f"{title}\n{machine(found)}", fontsize=10)
    return figure


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
    folder = arguments.results / slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{machine(found)}. Medians, and in brackets the quartiles of the ratio.\n"
    (folder / "table.md").write_text(f"{caption}\n{markdown(rows)}\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture(found, rows).savefig(folder / "ratios.png", dpi=150)
    if arguments.readme:
        headline = [row for row in rows if row.headline and row.mode == "forward+backward"]
        fill(arguments.readme, f"{caption}\n{markdown(headline)}\n")
    print(markdown(rows), f"written to {folder}", sep="\n\n")


if __name__ == "__main__":
    main()
