"""Builds the CPU kernels: one extension module for each instruction set, without torch."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Python's default flags contain -g, which makes modules eight times larger. CXXFLAGS overrides it.
FLAGS = os.environ.get("CXXFLAGS", "").split()
DEBUG = "-g" if "-g" in FLAGS else "-g0"
OPTIMIZATION = "" if "-O1" in FLAGS else "-O3"

# Without -ffast-math, because NaN, infinities and signed zeros have to match torch.
COMMON = {
    "unix": f"-std=c++17 {OPTIMIZATION} {DEBUG} -MMD -fvisibility=hidden "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd",
    "msvc": "/std:c++17 /O2 /EHsc",
}

# Clang, unlike GCC, unrolls loops by default, which makes modules a quarter larger. It speeds up
# exponentials over classes in float64 by 1.3 times, but other kernels by only 0.8 to 1.15 times.
ROLLED = "-fno-unroll-loops"
UNROLLED = ("cross_entropy.cpp", "kl_div_with_logits.cpp", "row_state.cpp", "softmax.cpp")

# Features are listed, because GCC before 11 and Clang before 12 do not support -march=x86-64-v3.
# `runs_here` in bindings.cpp checks the same features.
V2 = "-msse4.2 -mpopcnt"
V3 = f"{V2} -mavx2 -mfma -mf16c -mbmi -mbmi2"
V4 = f"{V3} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512"
V4 += " -Wno-uninitialized -Wno-maybe-uninitialized"  # caused by GCC's AVX-512 headers
X86_64 = {
    "x86_64_v2": {"unix": f"{V2} {ROLLED}", "msvc": ""},
    "x86_64_v3": {"unix": V3, "msvc": "/arch:AVX2"},
    "x86_64_v4": {"unix": V4, "msvc": "/arch:AVX512"},
}
# The names of these features in /proc/cpuinfo.
FLAGS_OF_CPU = {
    "x86_64_v3": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
    "x86_64_v4": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
ELSEWHERE = {"generic": {"unix": "", "msvc": ""}}
PLATFORM = sysconfig.get_platform()  # the wheel's platform, which may be cross-compiled
KNOWN = X86_64 if PLATFORM.endswith(("x86_64", "amd64")) else ELSEWHERE


def chosen() -> list[str]:
    """Returns the names in PYFUSED_ISAS; by default the oldest, and the newest of this machine."""
    if names := os.environ.get("PYFUSED_ISAS"):
        named = [*KNOWN] if names == "all" else names.replace("-", "_").split(",")
        if not {*named} <= KNOWN.keys():
            sys.exit(f"PYFUSED_ISAS: expected all or names of {', '.join(KNOWN)}, got {names!r}")
        return [name for name in KNOWN if name in named]
    try:
        found = re.search("^flags[^:]*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return [*KNOWN]
    flags = {*found[1].split()} if found else set()
    newest = [name for name, needed in FLAGS_OF_CPU.items() if needed <= flags][-1:]
    return [name for name in KNOWN if name in newest or name == min(KNOWN) or not found]


ISAS = {name: KNOWN[name] for name in chosen()}

# Sources without kernels are compiled once, for the oldest instruction set, and linked into all
# modules.
SHARED = ("csrc/bindings.cpp", "csrc/formulas.cpp", "csrc/parallel.cpp")


SECONDS = {"cross_entropy": 37, "pointwise_loss": 29, "softmax": 23, "bindings": 21}


def outdated(object_file: Path) -> bool:
    """Returns whether an object file is missing or older than a source or header listed by -MMD."""
    try:
        sources = object_file.with_suffix(".d").read_text().replace("\\\n", " ").split()[1:]
        compiled = object_file.stat().st_mtime
        return any(Path(source).stat().st_mtime > compiled for source in sources)
    except FileNotFoundError:
        return True


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece, because the pool's threads log commands
    sys.stdout.flush()


def cost(source: str) -> int:
    """Returns the seconds that a source took to compile for x86-64-v3."""
    return SECONDS.get(Path(source).stem, 4)


def wait_for(costs: dict[Future[str], int]) -> None:
    """Waits for the object files, and prints every 15 seconds how much of the work is done."""
    start, pending = time.monotonic(), {*costs}
    while pending:
        done, pending = wait(pending, timeout=15, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises a compiler's error
        compiled = [each for future, each in costs.items() if future not in pending]
        share, seconds = sum(compiled) / sum(costs.values()), time.monotonic() - start
        files = f"{len(compiled)} of {len(costs)} files"
        say(f"Compiled {files}, {share:.0%} of the work, in {seconds:.0f} s")


class BuildKernels(build_ext):
    """Compiles changed sources in parallel, once for each instruction set."""

    def run(self) -> None:
        if self.editable_mode or self.inplace:  # pip removes the default folder with object files
            self.build_temp = f"build/editable-{sysconfig.get_python_version()}"
        super().run()
        if self.inplace:  # modules of other instruction sets are outdated
            for file in Path("pyfused").glob("_cpu_*"):
                if file.name.partition(".")[0].removeprefix("_cpu_") not in ISAS:
                    file.unlink()

    def build_extensions(self) -> None:
        self.check_compiler()
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        for extension, isa in zip(self.extensions, ISAS.values(), strict=True):
            extension.extra_compile_args = f"{COMMON[kind]} {isa[kind]}".split()
        # setuptools initialises MSVC lazily, which is not thread-safe.
        jobs = self.parallel or (os.cpu_count() if kind == "unix" else 1) or 1
        compiler = (getattr(self.compiler, "compiler_so_cxx", None) or ["MSVC"])[0]
        say(f"Compiling the kernels with {compiler} for the instruction sets {', '.join(ISAS)}")
        files = [
            (extension, source)
            for extension in self.extensions
            for source in extension.sources
            if source not in SHARED or extension is self.extensions[0]
        ]
        files.sort(key=lambda file: -cost(file[1]))  # so that no long one is the last
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self.compile_source, *file) for file in files]
            try:
                costs = (cost(source) for _, source in files)
                wait_for(dict(zip(futures, costs, strict=True)))
            finally:  # after an error, the rest is not compiled
                pool.shutdown(cancel_futures=True)
        objects = [(*file, x.result()) for file, x in zip(files, futures, strict=True)]
        for extension in self.extensions:
            made = [x for by, source, x in objects if by is extension or source in SHARED]
            extension.sources, extension.extra_objects, extension.depends = [], made, made
        super().build_extensions()  # links

    def check_compiler(self) -> None:
        """Exits with a clear message if the compiler or Python's headers are missing."""
        compiler = (getattr(self.compiler, "compiler_so_cxx", None) or ["none"])[0]
        if self.compiler.compiler_type != "msvc" and shutil.which(compiler) is None:
            missing = f"a C++17 compiler: {compiler} not found. Set CXX to use another compiler"
        elif not any(Path(folder, "Python.h").exists() for folder in self.include_dirs):
            missing = f"the headers of Python: Python.h not found in {self.include_dirs[-1]}"
        else:
            return
        raise SystemExit(
            f"pyfused needs {missing}. Set PYFUSED_NO_EXTENSION=1 to install without CPU kernels."
        )

    def compile_source(self, extension: Extension, source: str) -> str:
        """Compiles a source if necessary; returns the object file.

        Object files are in separate folders for each instruction set, compiler and set of flags.
        """
        flags = list(extension.extra_compile_args)
        if Path(source).name not in UNROLLED and self.compiler.compiler_type == "unix":
            flags.append(ROLLED)
        command = [*getattr(self.compiler, "compiler_so_cxx", ()), *flags]
        folder = Path(self.build_temp, f"{extension.name}-{zlib.crc32(repr(command).encode()):08x}")
        (object_file,) = self.compiler.object_filenames([source], output_dir=str(folder))
        if outdated(Path(object_file)):
            self.compiler.compile(
                [source],
                output_dir=str(folder),
                include_dirs=extension.include_dirs,
                extra_postargs=flags,
            )
        return object_file


# With `pip install -v`, only the lines above are shown, not 400 commands and names of copied files.
if not {"bdist_wheel", "dist_info", "editable_wheel", "egg_info"}.isdisjoint(sys.argv):
    logging.disable(logging.INFO)

setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"pyfused._cpu_{isa}",
            sorted(file.as_posix() for file in Path("csrc").glob("*.cpp")),
            include_dirs=[pybind11.get_include()],
            libraries=["dl", "pthread"] if PLATFORM.startswith("linux") else [],  # glibc < 2.34
            language="c++",
        )
        for isa in ISAS
        if not os.environ.get("PYFUSED_NO_EXTENSION")
    ],
)
