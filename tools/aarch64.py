"""Tests the ARM64 wheel on x86-64, with Debian's Python and torch's wheel under qemu-user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import BUILD, PINS, ROOT, SETTINGS, UNPACK, run

FOLDER = BUILD / "aarch64"
SYSTEM, SITE = FOLDER / "system", FOLDER / "site"
DEBIAN, VERSION = "bookworm", "3.11"
PYTHON = SYSTEM / "usr/bin/python-in-qemu"
# Runs Python under qemu. argv[0], and thus sys.executable, is this wrapper, so tests can start it.
WRAPPER = f"""#!/bin/sh
exec qemu-aarch64 -cpu neoverse-n1 -L {SYSTEM} -0 "$0" {SYSTEM}/usr/bin/python{VERSION} "$@"
"""
TESTS = ("accuracy", "autograd", "errors", "threads", "processes")
# Excludes tests that take minutes: accuracy over many classes, bitwise equality for all thread
# counts except in one dtype, and tests that start processes, which import torch. Also excludes data
# loaders, because qemu 7 crashes if a forked child starts a thread.
CHOSEN = (
    "(not accuracy or activations or few_classes or probabilities)"
    " and (not bitwise or (rows and mean and float32))"
    " and not data_loader and not instruction_set and not before_use"
)
# Files that torch reads at import. With the host's files, which qemu passes through, torch crashes.
HARDWARE = {
    "proc/cpuinfo": "".join(
        f"processor: {i}\nFeatures: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp\n"
        "CPU implementer: 0x41\nCPU architecture: 8\nCPU variant: 0x3\nCPU part: 0xd0c\n\n"
        for i in range(os.cpu_count() or 1)
    ),
    "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000413fd0c1\n",
}


def unpack_system() -> None:
    partial = SYSTEM.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    packages = f"--include=python{VERSION},libstdc++6"
    run(*UNPACK, "--architectures=arm64", packages, DEBIAN, partial)
    partial.rename(SYSTEM)
    for path, text in HARDWARE.items():
        (SYSTEM / path).parent.mkdir(parents=True, exist_ok=True)
        (SYSTEM / path).write_text(text)
    PYTHON.write_text(WRAPPER)
    PYTHON.chmod(0o755)


def install(*packages: str | Path) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 37)]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade",
        "--target", SITE, *platforms, "--platform=manylinux2014_aarch64",
        f"--python-version={VERSION}", "--only-binary=:all:", *packages,
    )  # fmt: skip


def main() -> None:
    for command, package in {"qemu-aarch64": "qemu-user", "mmdebstrap": "mmdebstrap"}.items():
        if not shutil.which(command):
            sys.exit(f"{command} not found; install Debian's package {package}")
    (wheel,) = (ROOT / "dist").glob(f"*-cp{VERSION.replace('.', '')}-*_aarch64.whl")
    if not SYSTEM.exists():
        unpack_system()
    if not SITE.exists():
        install("torch", *SETTINGS["test-requires"], *PINS)
    install("--no-deps", wheel)
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    files = [path for name in TESTS for path in ROOT.glob(f"tests/*/test_{name}.py")]
    for module in (["pyfused"], ["pytest", "-n", "2", "--dist", "loadfile", "-k", CHOSEN, *files]):
        subprocess.run([PYTHON, "-m", *module], cwd=FOLDER, env=environment, check=True)


if __name__ == "__main__":
    main()
