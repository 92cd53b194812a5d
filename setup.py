"""Builds the CPU kernels: one extension module for each instruction set, without torch."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# Python was built with -g, which makes a module eight times larger. Whoever sets CXXFLAGS chooses.
DEBUG = "-g" if "-g" in os.environ.get("CXXFLAGS", "").split() else "-g0"

# Not -ffast-math: NaN, infinities and signed zeros come out as torch's.
COMMON = {
    "unix": f"-std=c++17 -O3 {DEBUG} -fvisibility=hidden "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast",
    "msvc": "/std:c++17 /O2 /EHsc",
}
OPENMP = {"unix": "-fopenmp", "msvc": "/openmp"}

# Feature by feature: GCC before 11 and Clang before 12 do not know -march=x86-64-v3. These are the
# features that `runs_here` in bindings.cpp asks the CPU for.
V2 = "-msse4.2 -mpopcnt"
V3 = f"{V2} -mavx2 -mfma -mf16c -mbmi -mbmi2"
V4 = f"{V3} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512"
V4 += " -Wno-uninitialized -Wno-maybe-uninitialized"  # of GCC's own AVX-512 headers
X86_64 = {
    "x86_64_v2": {"unix": V2, "msvc": ""},
    "x86_64_v3": {"unix": V3, "msvc": "/arch:AVX2"},
    "x86_64_v4": {"unix": V4, "msvc": "/arch:AVX512"},
}
ELSEWHERE = {"generic": {"unix": "", "msvc": ""}}
ISAS = X86_64 if sysconfig.get_platform().endswith(("x86_64", "amd64")) else ELSEWHERE

# Torch runs in GCC's OpenMP. Clang's is a second pool, whose threads fight with torch's for cores:
# an addition and a ReLU of a million elements, in turn, took 4000 us on 2 cores, and not 110 us.
PROBE = """
#include <string_view>
#ifdef _OPENMP
#include <omp.h>
#if defined(__linux__) && defined(__clang__)
#error not the OpenMP of torch
#endif
#endif
int main() { return !std::string_view{}.empty(); }
"""


class BuildKernels(build_ext):
    """Gives each module its flags, and compiles the modules side by side."""

    def build_extensions(self) -> None:
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        common, openmp = COMMON[kind].split(), OPENMP[kind].split()
        self.check(common, "pyfused needs a C++17 compiler")
        try:
            self.check([*common, *openmp], "no OpenMP")
        except PlatformError:
            openmp = []
            print("pyfused: the compiler lacks torch's OpenMP; the kernels will run on one thread")
        for extension, isa in zip(self.extensions, ISAS.values(), strict=True):
            extension.extra_compile_args = [*common, *openmp, *isa[kind].split()]
            extension.extra_link_args = openmp if kind == "unix" else []
        if kind == "unix":  # setuptools starts MSVC lazily, and not safely from two threads
            self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()

    def check(self, flags: list[str], otherwise: str) -> None:
        """Raises with the words of `otherwise` unless a program compiles and links with `flags`."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=flags)
                self.compiler.link_executable(
                    objects, "probe", folder, extra_postargs=flags, target_lang="c++"
                )
            except (CompileError, LinkError) as error:
                raise PlatformError(f"{otherwise} ({error})") from error


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"pyfused._cpu_{isa}",
            [f"csrc/cpu_{isa}.cpp"],
            include_dirs=[pybind11.get_include()],
            depends=["setup.py", "csrc/bindings.cpp", *map(str, sorted(Path("csrc").glob("*.h")))],
            language="c++",
        )
        for isa in ISAS
    ],
)
