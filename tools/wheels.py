"""Builds and checks wheels for Linux on one machine, without containers; tests one.

A wheel needs the headers of its Python, but not the interpreter, and the Clang of the package
ziglang brings the headers and libraries of every platform along. Only bindings.cpp includes
Python.h: the kernels are compiled once for each platform. The Pythons, the images and the tests are
those of [tool.cibuildwheel] in pyproject.toml, with which .github/workflows/wheels.yml builds
natively.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import tomllib

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/wheels"
BIN = Path(sys.executable).parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]
PYTHONS = SETTINGS["build"].replace("-*", "").split()
PINS = ("--constraint", ROOT / "constraints.txt", "--constraint", ROOT / "constraints-dev.txt")
MODULES = {"x86_64": 3, "aarch64": 1}  # of a wheel, one for each instruction set
MOST_BYTES = 3 << 20


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


# ---- headers -------------------------------------------------------------------------------------

PATHS = """
import sysconfig
print(sysconfig.get_path("include"), sysconfig.get_config_h_filename(), sep="\\n")
"""


def interpreters(version: str) -> list[str]:
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(installed.glob(f"{version}.*/bin/python{version}"))
    return [*filter(None, [shutil.which(f"python{version}")]), *map(str, found)]


def installed_headers(version: str) -> tuple[Path, Path] | None:
    """The folder with Python.h and the file pyconfig.h, of an interpreter on this machine."""
    for interpreter in interpreters(version):
        command = [interpreter, "-c", PATHS]
        asked = subprocess.run(command, text=True, capture_output=True, check=False)
        include, _, config = asked.stdout.strip().partition("\n")
        if asked.returncode == 0 and Path(include, "Python.h").exists():
            return Path(include), Path(config)
    return None


def debian_headers(version: str) -> tuple[Path, Path] | None:
    """The same of a package of Debian's, of which mmdebstrap unpacks the dependencies, too."""
    root = BUILD / "debian" / version
    if not root.exists() and shutil.which("mmdebstrap"):
        package = f"--include=libpython{version}-dev"
        # The signature is checked; a list that a mirror has not renewed for weeks will do.
        options = ("--variant=extract", "--aptopt=Acquire::Check-Valid-Until 0", package)
        partial = root.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        command = ["mmdebstrap", "--quiet", *options, "sid", partial]
        if subprocess.run(command, check=False).returncode == 0:
            partial.rename(root)
    for config in root.glob(f"usr/include/*/python{version}/pyconfig.h"):
        return root / f"usr/include/python{version}", config
    return None


def headers(python: str) -> Path | None:
    """A folder with the headers of cp312 or cp314t, or None where there are none.

    Those of x86-64 serve ARM64 as well: what differs is asked by the sources of CPython alone.
    """
    folder = BUILD / "headers" / python
    version = python.removesuffix("t").replace("cp3", "3.")
    found = installed_headers(version) or debian_headers(version)
    if found is None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(found[0], folder)
    config = found[1].read_text("utf-8")
    if python.endswith("t"):  # in which alone the headers of a free-threaded Python differ
        config += "\n#undef Py_GIL_DISABLED\n#define Py_GIL_DISABLED 1\n"
    (folder / "pyconfig.h").write_text(config, "utf-8")
    return folder


# ---- wheels --------------------------------------------------------------------------------------


def build(python: str, machine: str, include: Path, dist: Path) -> Path:
    import ziglang

    image = SETTINGS["linux"][f"manylinux-{machine}-image"]
    tag, glibc = f"{image}_{machine}", image.removeprefix("manylinux_").replace("_", ".")
    objects, base = BUILD / machine / "objects", BUILD / machine / python
    shutil.rmtree(base, ignore_errors=True)
    for stale in objects.glob("**/bindings.*"):  # of another Python
        stale.unlink()
    zig = Path(ziglang.__file__).with_name("zig")
    compiler = f"{zig} c++ -target {machine}-linux-gnu.{glibc}"
    suffix = f".cpython-{python.removeprefix('cp')}-{machine}-linux-gnu.so"
    run(
        sys.executable, "setup.py", "--quiet",
        "build", f"--build-base={base}",
        "build_ext", f"--build-temp={objects}", f"--include-dirs={include}",
        "bdist_wheel", f"--dist-dir={base}",
        CC=compiler, CXX=compiler, LDSHARED=f"{compiler} -shared -s",
        LDCXXSHARED=f"{compiler} -shared -s",
        CFLAGS="", CXXFLAGS="-Werror=pass-failed",  # a loop that stays scalar is an error
        _PYTHON_HOST_PLATFORM=f"linux-{machine}", SETUPTOOLS_EXT_SUFFIX=suffix,
    )  # fmt: skip
    (wheel,) = base.glob("*.whl")
    tags = ("--python-tag", python.removesuffix("t"), "--abi-tag", python, "--platform-tag", tag)
    run(sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel)
    (wheel,) = base.glob("*.whl")
    show = [BIN / "auditwheel", "show", wheel]
    told = subprocess.run(show, text=True, stdout=subprocess.PIPE, check=True).stdout
    told = " ".join(told.split())
    asked = re.search(r'platform tag: "manylinux_2_(\d+)_', told)
    assert asked, told
    assert int(asked[1]) <= int(glibc.removeprefix("2.")), told
    assert "external shared libraries are required" not in told, told
    names = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    compiled = [name for name in names if Path(name).suffix not in ("", ".py", ".typed")]
    modules = [name for name in compiled if name.endswith(suffix)]
    assert modules == compiled, f"{wheel.name}: {compiled}"
    assert len(modules) == MODULES[machine], f"{wheel.name}: {modules}"
    size = wheel.stat().st_size
    assert size <= MOST_BYTES, f"{wheel.name} takes {size} bytes, expected at most {MOST_BYTES}"
    print(f"{wheel.name}: {size / 2**20:.2f} MiB", flush=True)
    return Path(shutil.copy(wheel, dist))


def build_all(pattern: str, dist: Path) -> None:
    """Wheels of which cibuildwheel's name, such as cp311-manylinux_x86_64, fits the pattern."""
    dist.mkdir(parents=True, exist_ok=True)
    chosen = [
        (python, machine)
        for machine in MODULES
        for python in PYTHONS
        if fnmatch(f"{python}-manylinux_{machine}", pattern)
    ]
    assert chosen, f"expected a pattern of {', '.join(PYTHONS)} and manylinux_{', '.join(MODULES)}"
    includes = {python: headers(python) for python in PYTHONS if python in dict(chosen)}
    made = []
    for python, machine in chosen:
        if include := includes[python]:
            made.append(build(python, machine, include, dist))
    if pattern == "*":
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist)
        made += dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", *made)
    if missing := [python for python, include in includes.items() if not include]:
        sys.exit(f"not built, as their headers are not here: {', '.join(missing)}")


# ---- tests ---------------------------------------------------------------------------------------


def test(wheel: Path, interpreter: str, torch: str | None) -> None:
    """Runs cibuildwheel's tests in a new environment of torch, the wheel and pytest.

    No compiler is on the path, and the tests come from the tree, but the package does not.
    """
    environment = BUILD / "test"
    shutil.rmtree(environment, ignore_errors=True)
    run(interpreter, "-m", "venv", environment)
    python = environment / "bin/python"
    packages = (wheel.resolve(), torch or "torch", *SETTINGS["test-requires"])
    pins = () if torch else PINS
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *packages, *pins)
    installed = "import pyfused, sys; assert pyfused.__file__.startswith(sys.prefix)"
    tests = shlex.split(SETTINGS["test-command"].format(project=ROOT))
    for command in ([python, "-c", installed], [python, "-m", "pyfused"], tests):
        path = {"PATH": str(environment / "bin")}
        subprocess.run(command, cwd=environment, env=path, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write wheels and the source distribution")
    command.add_argument("--only", default="*", help="such as cp311-manylinux_* (default: all)")
    command.add_argument("--dist", type=Path, default=ROOT / "dist")
    command = commands.add_parser("test", help="test a wheel in an environment without a compiler")
    command.add_argument("wheel", type=Path)
    command.add_argument("--python", default=sys.executable)
    command.add_argument("--torch", help="such as torch==2.14.1 (default: that of the constraints)")
    options = parser.parse_args()
    if options.command == "build":
        build_all(options.only, options.dist)
    else:
        test(options.wheel, options.python, options.torch)


if __name__ == "__main__":
    main()
