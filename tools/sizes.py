"""Writes csrc/sizes.txt, the bytes of machine code of each kernel of the modules.

One compiler makes the same machine code from the same source, on any machine, and a kernel that has
grown usually takes longer. `tests/repo/test_packaging.py` compares the table with the modules.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "csrc" / "sizes.txt"
# Growth that is not reported, as a factor and in bytes: an instruction or two in a short function.
FACTOR, FEW_BYTES = 1.05, 32

Sizes = dict[str, dict[str, int]]  # bytes by kernel and instruction set


def output(*command: str | Path, input: str | None = None) -> str:
    return subprocess.run(command, input=input, capture_output=True, text=True, check=True).stdout


def modules() -> dict[str, Path]:
    """Returns the compiled modules by instruction set."""
    found = sorted((ROOT / "pyfused").glob("_cpu_*.so"))
    return {path.name.split(".")[0].removeprefix("_cpu_"): path for path in found}


def compiler() -> str:
    """Returns the compilers of the modules with their versions, as GCC and Clang write them."""
    comments = output("readelf", "--string-dump=.comment", *modules().values())
    names = {line.split("]", 1)[1].strip() for line in comments.splitlines() if "]  " in line}
    names = {re.sub(r"(\d)-[^)\s]*", r"\1", name) for name in names}  # no revision of a package
    # The other flags that Python adds do not change the machine code.
    flags = re.findall(r"-fstack-protector\S*", sysconfig.get_config_var("CFLAGS") or "")
    return ", ".join([*sorted(names), *flags])


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


def measured() -> Sizes:
    """Returns the bytes of each kernel in the modules."""
    found: Sizes = {}
    for isa, module in modules().items():
        for kernel, size in sizes_of(module).items():
            found.setdefault(kernel, {})[isa] = size
    return dict(sorted(found.items()))


def written() -> tuple[str, list[str], Sizes]:
    """Returns the compiler, the instruction sets and the sizes of the table."""
    title, header, *rows = TABLE.read_text(encoding="utf-8").splitlines()
    *isas, _ = header.split()
    found: Sizes = {}
    for row in rows:
        *sizes, kernel = row.split(maxsplit=len(isas))
        pairs = zip(isas, sizes, strict=True)
        found[kernel] = {isa: int(size) for isa, size in pairs if size != "-"}
    return title.partition(" by ")[2], isas, found


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


def main() -> None:
    isas, sizes = list(modules()), measured()
    lines = [f"Bytes of machine code of each kernel, compiled by {compiler()}"]
    lines.append(" ".join([*(f"{isa:>9}" for isa in isas), "kernel"]))
    for kernel, row in sizes.items():
        lines.append(" ".join([*(f"{row.get(isa, '-'):>9}" for isa in isas), kernel]))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
