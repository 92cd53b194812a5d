"""``python -m pyfused``: prints the information for a bug report, or runs ``run``."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import torch

import pyfused
from pyfused.adopt.run import run
from pyfused.backends import cpu
from pyfused.backends.versions import NEEDED, pinned_triton, triton_version, unsupported_triton
from pyfused.ops.operators import OPERATORS


def thread_runtime() -> str:
    """Returns the kernels' OpenMP runtime and its number of threads, which torch sets if shared."""
    if cpu.MISSING:
        return "none: there are no kernels"
    if not cpu.native.runtime_file:
        return "none loaded: kernels run on one thread"
    return f"{cpu.native.runtime_file}, {cpu.native.runtime_threads()} threads"


def triton() -> str:
    version = triton_version() or "not installed"
    if unsupported_triton() is None:
        return version
    pinned = pinned_triton(torch.__version__)
    return f"{version}; pyfused needs {NEEDED}" + (f", torch requires {pinned}" if pinned else "")


def report() -> dict[str, str]:
    on_cpus = f"torch's operators: {cpu.MISSING}" if cpu.MISSING else "C++ kernels"
    on_gpus = "Triton kernels; other devices: torch's operators"
    if reason := unsupported_triton():
        on_gpus = f"torch's operators: {reason}"
    return {
        "pyfused": pyfused.__version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": triton(),
        "compiler": cpu.native.compiler,
        "ISAs built": ", ".join(cpu.BUILT) or "none",
        "ISAs supported": ", ".join(cpu.supported) or "none",
        "ISA chosen": "that of torch's operators" if cpu.MISSING else cpu.capability,
        "PYFUSED_CPU_CAPABILITY": os.environ.get("PYFUSED_CPU_CAPABILITY", "not set"),
        "thread runtime": thread_runtime(),
        "PYFUSED_BACKEND": os.environ.get("PYFUSED_BACKEND", "not set"),
        "PYFUSED_HALF_PRODUCTS": os.environ.get("PYFUSED_HALF_PRODUCTS", "not set"),
        "PYFUSED_HOST_US": os.environ.get("PYFUSED_HOST_US", "not set"),
        "operators": ", ".join(OPERATORS),
        "kernels": f"cpu: {on_cpus}; GPUs: {on_gpus}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pyfused", description="Print the information for a bug report."
    )
    parser.add_argument("--version", action="version", version=f"pyfused {pyfused.__version__}")
    commands = parser.add_subparsers(dest="command")
    text = "run a program under pyfused.patch() and pyfused.memory.keep(), and report which calls "
    text += "ran a kernel"
    description = f"{text.capitalize()}."
    command = commands.add_parser("run", help=text, description=description)
    command.add_argument(
        "-m", action="store_true", dest="module", help="the program is the name of a module"
    )
    command.add_argument(
        "--no-keep", action="store_false", dest="keep", help="return freed memory to the system"
    )
    command.add_argument("program", help="a script, a folder or archive with __main__.py")
    rest = command.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="the program's arguments"
    )
    rest.required = False  # else the error for a missing program would name the arguments
    options = parser.parse_args()
    if options.command == "run":
        path = Path(options.program)
        if not (options.module or path.is_file() or path.is_dir()):  # runpy reads no pipes
            command.error(f"program: expected a file or folder, got {options.program!r}")
        run(options.program, options.arguments, options.module, options.keep)
        return
    for key, value in report().items():
        print(f"{key:<24}{value}")


if __name__ == "__main__":
    main()
