"""Builds and checks the wheels of all platforms on one Linux machine, and tests a wheel.

Wheels are cross-compiled with the Clang of the package ziglang, which includes the headers and
libraries of every platform. A wheel needs the headers of its Python, but not the interpreter. Only
bindings.cpp includes Python.h, so the kernels are compiled once for each platform. The versions of
Python and of platforms, and the tests, are read from [tool.cibuildwheel] in pyproject.toml, which
.github/workflows/wheels.yml also uses.
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
from typing import NamedTuple
from zipfile import ZipFile

import tomllib

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/wheels"
BIN = Path(sys.executable).parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]
PYTHONS = SETTINGS["build"].replace("-*", "").split()
PINS = ("--constraint", ROOT / "constraints.txt", "--constraint", ROOT / "constraints-dev.txt")
MOST_BYTES = 3 << 20
ZIG = f"{sys.executable} -m ziglang"
IMAGE = SETTINGS["linux"]["manylinux-x86_64-image"]  # for example manylinux_2_28
GLIBC = IMAGE.removeprefix("manylinux_").replace("_", ".")
MACOS = SETTINGS["macos"]["environment"]["MACOSX_DEPLOYMENT_TARGET"]


class Platform(NamedTuple):
    target: str  # the compiler's target
    host: str  # the platform's sysconfig.get_platform()
    suffix: str  # the suffix of a module; {} is for example 312 or 314t
    modules: int  # the number of modules, one for each instruction set
    links: str = ""  # linker flags; {} is the folder of Python's headers


PLATFORMS = {  # the keys are cibuildwheel's names
    "manylinux_x86_64": Platform(
        f"x86_64-linux-gnu.{GLIBC}", "linux-x86_64", ".cpython-{}-x86_64-linux-gnu.so", 3,
        "-Wl,--gc-sections",
    ),
    "manylinux_aarch64": Platform(
        f"aarch64-linux-gnu.{GLIBC}", "linux-aarch64", ".cpython-{}-aarch64-linux-gnu.so", 1,
        "-Wl,--gc-sections",
    ),
    "macosx_arm64": Platform(
        f"aarch64-macos.{MACOS}", f"macosx-{MACOS}-arm64", ".cpython-{}-darwin.so", 1,
        "-undefined dynamic_lookup",
    ),
    "win_amd64": Platform(
        "x86_64-windows-gnu", "win-amd64", ".cp{}-win_amd64.pyd", 3,
        "{0}/python.lib -Wl,--out-implib={0}/module.lib",
    ),
}  # fmt: skip


def run(*command: str | Path, **environment: str) -> None:
    variables = {**os.environ, "PYFUSED_ISAS": "all", **environment}
    subprocess.run(command, cwd=ROOT, env=variables, check=True)


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
    """Returns the include folder and pyconfig.h of an installed Python, None if there is none."""
    for interpreter in interpreters(version):
        command = [interpreter, "-c", PATHS]
        found = subprocess.run(command, text=True, capture_output=True, check=False)
        include, _, config = found.stdout.strip().partition("\n")
        if found.returncode == 0 and Path(include, "Python.h").exists():
            return Path(include), Path(config)
    return None


# Signatures are checked, but outdated mirrors are accepted.
UNPACK = ("mmdebstrap", "--quiet", "--variant=extract", "--aptopt=Acquire::Check-Valid-Until 0")


def debian_headers(version: str) -> tuple[Path, Path] | None:
    """Returns the include folder and pyconfig.h from Debian's package, unpacked by mmdebstrap."""
    root = BUILD / "debian" / version
    if not root.exists() and shutil.which("mmdebstrap"):
        partial = root.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        command = [*UNPACK, f"--include=libpython{version}-dev", "sid", partial]
        if subprocess.run(command, check=False).returncode == 0:
            partial.rename(root)
    for config in root.glob(f"usr/include/*/python{version}/pyconfig.h"):
        return root / f"usr/include/python{version}", config
    return None


# The macros that Python's headers need from the pyconfig.h of Windows, which Linux does not have.
WINDOWS = (
    "MS_WINDOWS", "MS_WIN64", "NT_THREADS", "WITH_THREAD", "HAVE_DECLSPEC_DLL", "HAVE_WCHAR_H",
    "Py_ENABLE_SHARED", "SIZEOF_INT 4", "SIZEOF_LONG 4", "SIZEOF_LONG_LONG 8", "SIZEOF_SIZE_T 8",
    "SIZEOF_VOID_P 8", "SIZEOF_WCHAR_T 2",
)  # fmt: skip
# Matches exported names; the import library for Windows is generated from them.
DECLARED = r"PyAPI_(?:FUNC|DATA)\(.*?\)\s*(\w+)"


def headers(python: str) -> Path | None:
    """Returns a folder with the headers of a Python such as cp314t, None if they are missing.

    macOS and all CPUs use the headers of Linux; the differences only affect CPython's own sources.
    """
    folder = BUILD / "headers" / python
    version = python.removesuffix("t").replace("cp3", "3.")
    found = installed_headers(version) or debian_headers(version)
    if found is None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(found[0], folder)
    windows = "".join(f"#define {each}\n" for each in WINDOWS)
    config = f"#ifdef _WIN32\n{windows}#else\n{found[1].read_text('utf-8')}\n#endif\n"
    if python.endswith("t"):  # the only difference of free-threaded Python's headers
        config += "#undef Py_GIL_DISABLED\n#define Py_GIL_DISABLED 1\n"
    (folder / "pyconfig.h").write_text(config, "utf-8")
    texts = [file.read_text("utf-8") for file in folder.glob("**/*.h")]
    names = {name for text in texts for name in re.findall(DECLARED, text)}
    dll, exports = f"python{python[2:]}.dll", folder / "python.def"
    exports.write_text("\n".join([f"LIBRARY {dll}", "EXPORTS", *sorted(names)]), "utf-8")
    library = ("-m", "i386:x86-64", "-d", exports, "-l", folder / "python.lib")
    run(*ZIG.split(), "dlltool", *library)
    return folder


# ---- wheels --------------------------------------------------------------------------------------


def build(python: str, name: str, include: Path, dist: Path) -> Path:
    platform = PLATFORMS[name]
    objects, base = BUILD / name / "objects", BUILD / name / python
    shutil.rmtree(base, ignore_errors=True)
    for stale in objects.glob("**/bindings.*"):  # compiled for another Python
        stale.unlink()
    compiler = f"{ZIG} c++ -target {platform.target}"
    linker = f"{compiler} -shared -s {platform.links.format(include)}"
    suffix = platform.suffix.format(python.removeprefix("cp"))
    run(
        sys.executable, "setup.py", "--quiet",
        "build", f"--build-base={base}",
        "build_ext", f"--build-temp={objects}", f"--include-dirs={include}",
        "bdist_wheel", f"--dist-dir={base}",
        CC=compiler, CXX=compiler, LDSHARED=linker, LDCXXSHARED=linker,
        CFLAGS="", CXXFLAGS="-Werror=pass-failed",  # fail if a loop is not vectorised
        _PYTHON_HOST_PLATFORM=platform.host, SETUPTOOLS_EXT_SUFFIX=suffix,
    )  # fmt: skip
    (wheel,) = base.glob("*.whl")
    tag = re.sub("[-.]", "_", platform.host).replace("linux", IMAGE)
    tags = ("--python-tag", python.removesuffix("t"), "--abi-tag", python, "--platform-tag", tag)
    run(sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel)
    (wheel,) = base.glob("*.whl")
    if name.startswith("manylinux"):  # needs no later glibc and no other library
        show = [BIN / "auditwheel", "show", wheel]
        shown = subprocess.run(show, text=True, stdout=subprocess.PIPE, check=True).stdout
        report = " ".join(shown.split())
        needed = re.search(r'platform tag: "manylinux_2_(\d+)_', report)
        assert needed, report
        assert int(needed[1]) <= int(GLIBC.removeprefix("2.")), report
        assert "external shared libraries are required" not in report, report
    names = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    compiled = [name for name in names if Path(name).suffix not in ("", ".py", ".typed")]
    modules = [name for name in compiled if name.endswith(suffix)]
    assert modules == compiled, f"{wheel.name}: {compiled}"
    assert len(modules) == platform.modules, f"{wheel.name}: {modules}"
    size = wheel.stat().st_size
    assert size <= MOST_BYTES, f"{wheel.name} takes {size} bytes, expected at most {MOST_BYTES}"
    print(f"{wheel.name}: {size / 2**20:.2f} MiB", flush=True)
    return Path(shutil.copy(wheel, dist))


def build_all(pattern: str, dist: Path) -> None:
    """Builds the wheels whose cibuildwheel name, such as cp311-manylinux_x86_64, matches."""
    dist.mkdir(parents=True, exist_ok=True)
    chosen = [
        (python, platform)
        for platform in PLATFORMS
        for python in PYTHONS
        if fnmatch(f"{python}-{platform}", pattern)
    ]
    assert chosen, f"expected a pattern of {', '.join(PYTHONS)} and {', '.join(PLATFORMS)}"
    includes = {python: headers(python) for python in PYTHONS if python in dict(chosen)}
    made = []
    for python, platform in chosen:
        if include := includes[python]:
            made.append(build(python, platform, include, dist))
    if pattern == "*":
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist)
        made += dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", *made)
    if missing := [python for python, include in includes.items() if not include]:
        sys.exit(f"not built, because Python's headers are missing: {', '.join(missing)}")


# ---- tests ---------------------------------------------------------------------------------------


def test(wheel: Path, interpreter: str, torch: str | None) -> None:
    """Runs cibuildwheel's tests in a new environment with torch, the wheel and pytest.

    The tests are run from the working tree, with the installed package, and no compiler on PATH.
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
    command.add_argument("--only", default="*", help="for example cp311-manylinux_* (default: all)")
    command.add_argument("--dist", type=Path, default=ROOT / "dist")
    command = commands.add_parser("test", help="test a wheel in an environment without a compiler")
    command.add_argument("wheel", type=Path)
    command.add_argument("--python", default=sys.executable)
    command.add_argument("--torch", help="for example torch==2.14.1 (default: the pinned version)")
    options = parser.parse_args()
    if options.command == "build":
        build_all(options.only, options.dist)
    else:
        test(options.wheel, options.python, options.torch)


if __name__ == "__main__":
    main()
