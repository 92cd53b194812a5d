"""Runs tests with the code paths of other processors: `python tests/machines.py`.

Libraries choose code paths by processor, and environment variables override the choice. Each row of
MACHINES has variables, and the files whose results depend on them. File names among the arguments,
such as log_probs, select files. pytest gets the others.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pyfused.backends import cpu

TESTS = Path(__file__).parent
PRODUCTS = "log_probs linear_cross_entropy distillation vocab_parallel wrapped_heads"
KERNELS = """accuracy activation compile values cross_entropy embedding_loss formula
    log_probs pointwise_loss sizes softmax"""
THREADS = "threads parallel processes recycle wrapped_heads"

MACHINES: tuple[tuple[dict[str, str], str], ...] = (
    ({"MKL_CBWR": "AVX2"}, PRODUCTS),
    ({"MKL_CBWR": "COMPATIBLE"}, PRODUCTS),
    ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, PRODUCTS),
    # Without FMA instructions, sums are less accurate, both torch's and pyfused's.
    ({"PYFUSED_CPU_CAPABILITY": "x86-64-v2", "ATEN_CPU_CAPABILITY": "default"}, KERNELS),
    ({"PYFUSED_CPU_CAPABILITY": "x86-64-v3", "ATEN_CPU_CAPABILITY": "avx2"}, KERNELS),
    ({"OMP_NUM_THREADS": "1"}, THREADS),
)

# On processors of other vendors, MKL calls these functions, and ignores MKL_CBWR=AVX2.
INTEL = """
extern "C" int mkl_serv_intel_cpu() { return 1; }
extern "C" int mkl_serv_intel_cpu_true() { return 1; }
"""


def reason_to_skip(name: str, value: str) -> str | None:
    """Returns why a setting is not supported or redundant on this processor."""
    if name == "PYFUSED_CPU_CAPABILITY" and value not in cpu.supported[:-1]:
        return f"tests run {cpu.supported[-1]} by default, and can run {cpu.supported[:-1]}"
    if name == "MKL_CBWR" and not torch.backends.mkl.is_available():
        return "this torch has no MKL"
    capability = torch.backends.cpu.get_cpu_capability()
    is_redundant = name == "ONEDNN_MAX_CPU_ISA" and capability != "AVX512"
    return f"this processor has {capability}" if is_redundant else None


def intels_code(folder: str) -> str:
    """Builds a library for LD_PRELOAD that makes MKL treat any processor as Intel's."""
    library = str(Path(folder, "intel.so"))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=INTEL, text=True, check=True)
    return library


def passes(variables: dict[str, str], files: list[str], arguments: list[str]) -> bool:
    paths = [str(path) for name in files for path in TESTS.rglob(f"test_{name}.py")]
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    with tempfile.TemporaryDirectory() as folder:
        # Inductor's cache does not depend on these variables, and would return code that was
        # compiled for other vectors.
        environment = {**os.environ, **variables, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        if "MKL_CBWR" in variables and sys.platform == "linux":
            environment["LD_PRELOAD"] = intels_code(folder)
        done = subprocess.run([*pytest, *paths, *arguments], env=environment, check=False)
    return done.returncode in (0, 5)  # 5: no tests selected


def main(arguments: list[str]) -> None:
    known = {name for _, files in MACHINES for name in files.split()}
    chosen, failed = known.intersection(arguments) or known, list[str]()
    arguments = [each for each in arguments if each not in known]
    for variables, files in MACHINES:
        name = " ".join(map("=".join, variables.items()))
        names = [each for each in files.split() if each in chosen]
        reason = reason_to_skip(*next(iter(variables.items())))
        print(f"{name}: {f'skipped, as {reason}' if reason else ' '.join(names)}", flush=True)
        if names and not reason and not passes(variables, names, arguments):
            failed.append(name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
