"""Prints the kernels whose machine code has another size than at another revision.

    .venv/bin/python tools/sizes.py compare main~1

It builds the revision in a folder of its own, for the instruction sets of this folder's modules.
One compiler makes the same machine code from the same source, on any machine, and a kernel that has
grown usually takes longer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
# Growth that is not reported, as a factor and in bytes: an instruction or two in a short function.
FACTOR, FEW_BYTES = 1.05, 32

Sizes = dict[str, dict[str, int]]  # bytes by kernel and instruction set


def output(*command: str | Path, input: str | None = None) -> str:
    return subprocess.run(command, input=input, capture_output=True, text=True, check=True).stdout


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns the compiled modules of a folder by instruction set."""
    found = sorted((root / "pyfused").glob("_cpu_*.so"))
    return {path.name.split(".")[0].removeprefix("_cpu_"): path for path in found}


def kernel_of(function: str) -> str:
    """Returns the short name of a demangled function.

    A template that is instantiated for a lambda belongs to the function that contains the lambda:
    `void pyfused::map<pyfused::scale<float>(long)::{lambda()#1}>(long)` to `pyfused::scale<float>`.
    Parts that GCC splits off belong to their function.
    """
    name = re.sub(r" \[clone [^]]*\]|\(anonymous namespace\)::|\[abi:\w+\]", "", function)
    count = 1
    while count:  # the innermost parentheses: parameters, with their qualifiers
        name, count = re.subn(r"\([^()]*\)(?: const)?", "", name)
    name = name.partition("::{lambda")[0]
    depth = 0
    for start in range(len(name), 0, -1):  # backwards to the beginning of the last name
        before = name[start - 1]
        if depth == 0 and before in " <,":
            break
        depth += (before == ">") - (before == "<")
    else:
        start = 0
    name = re.sub(r"(\d)(?:ul|l|u)\b", r"\1", name[start:])
    return name.replace("> >", ">>")


def sizes_of(module: Path) -> Counter[str]:
    """Returns the bytes of each kernel in a module, without the bindings."""
    sizes: Counter[str] = Counter()
    fields = [line.split() for line in output("nm", "--print-size", module).splitlines()]
    functions = [each for each in fields if len(each) == 4 and each[2] in "tTwW"]
    # c++filt does not know _FUN, a lambda as a function pointer, but knows its operator().
    names = "\n".join(each[3].replace("_4_FUNE", "_clE") for each in functions)
    for each, name in zip(functions, output("c++filt", input=names).splitlines(), strict=True):
        kernel = kernel_of(name)
        if kernel.startswith("pyfused::"):
            sizes[kernel.replace("pyfused::", "")] += int(each[1], 16)
    return sizes


def measured(root: Path) -> Sizes:
    """Returns the bytes of each kernel in the modules of a folder."""
    found: Sizes = {}
    for isa, module in modules(root).items():
        for kernel, size in sizes_of(module).items():
            found.setdefault(kernel, {})[isa] = size
    return found


def changed(old: Sizes, new: Sizes, isas: list[str]) -> list[str]:
    """Returns a line for each kernel that is longer or shorter, new, or gone."""
    lines = []
    for isa in isas:
        for kernel in sorted(old.keys() | new.keys()):
            before, after = (sizes.get(kernel, {}).get(isa) for sizes in (old, new))
            if before is None or after is None:
                if before != after:
                    lines.append(f"{kernel} ({isa}): {'new' if before is None else 'gone'}")
            elif max(before, after) > max(
                FACTOR * min(before, after), min(before, after) + FEW_BYTES
            ):
                lines.append(f"{kernel} ({isa}): {before} bytes, now {after}")
    return lines


def compare(revision: str) -> list[str]:
    """Returns a line for each kernel that differs from a revision."""
    isas = [*modules()]
    with TemporaryDirectory() as folder:
        archive = Path(folder, "sources.tar")
        output("git", "-C", ROOT, "archive", "--output", archive, revision)
        shutil.unpack_archive(archive, folder)
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=folder,
            env=os.environ | {"PYFUSED_ISAS": ",".join(isas)},
            check=True,
        )
        return changed(measured(Path(folder)), measured(ROOT), isas)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("revision", help="a revision of git")
    print(*compare(parser.parse_args().revision) or ["no kernel differs"], sep="\n")


if __name__ == "__main__":
    main()
