"""Builds and checks wheels for every platform on one Linux machine, without containers; tests one.

A wheel needs the headers of its Python, but not the interpreter, and the Clang of the package
ziglang brings the headers and libraries of every platform along. Only bindings.cpp includes
Python.h: the kernels are compiled once for each platform. The Pythons, the versions of platforms
and the tests are those of [tool.cibuildwheel] in pyproject.toml, with which
.github/workflows/wheels.yml builds natively.
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
IMAGE = SETTINGS["linux"]["manylinux-x86_64-image"]  # such as manylinux_2_28
GLIBC = IMAGE.removeprefix("manylinux_").replace("_", ".")
MACOS = SETTINGS["macos"]["environment"]["MACOSX_DEPLOYMENT_TARGET"]


class Platform(NamedTuple):
    target: str  # of the compiler
    host: str  # as sysconfig.get_platform() says there
    suffix: str  # of a module; {} is 312 or 314t
    modules: int  # one for each instruction set
    links: str = ""  # how a module finds Python, whose headers are in {}


PLATFORMS = {  # by cibuildwheel's names
    "manylinux_x86_64": Platform(
        f"x86_64-linux-gnu.{GLIBC}", "linux-x86_64", ".cpython-{}-x86_64-linux-gnu.so", 3
    ),
    "manylinux_aarch64": Platform(
        f"aarch64-linux-gnu.{GLIBC}", "linux-aarch64", ".cpython-{}-aarch64-linux-gnu.so", 1
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


# The signature is checked; a list that a mirror has not renewed for weeks will do.
UNPACK = ("mmdebstrap", "--quiet", "--variant=extract", "--aptopt=Acquire::Check-Valid-Until 0")


def debian_headers(version: str) -> tuple[Path, Path] | None:
    """The same of a package of Debian's, of which mmdebstrap unpacks the dependencies, too."""
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


# What Python's headers ask of the pyconfig.h of Windows, which no Linux has; and the names in them,
# of which the library to link with there is made.
WINDOWS = (
    "MS_WINDOWS", "MS_WIN64", "NT_THREADS", "WITH_THREAD", "HAVE_DECLSPEC_DLL", "HAVE_WCHAR_H",
    "Py_ENABLE_SHARED", "SIZEOF_INT 4", "SIZEOF_LONG 4", "SIZEOF_LONG_LONG 8", "SIZEOF_SIZE_T 8",
    "SIZEOF_VOID_P 8", "SIZEOF_WCHAR_T 2",
)  # fmt: skip
DECLARED = r"PyAPI_(?:FUNC|DATA)\(.*?\)\s*(\w+)"


def headers(python: str) -> Path | None:
    """A folder with the headers of cp312 or cp314t, or None where there are none.

    Those of Linux serve macOS, and any CPU: what differs is asked by the sources of CPython alone.
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
    if python.endswith("t"):  # in which alone the headers of a free-threaded Python differ
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
    for stale in objects.glob("**/bindings.*"):  # of another Python
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
        CFLAGS="", CXXFLAGS="-Werror=pass-failed",  # a loop that stays scalar is an error
        _PYTHON_HOST_PLATFORM=platform.host, SETUPTOOLS_EXT_SUFFIX=suffix,
    )  # fmt: skip
    (wheel,) = base.glob("*.whl")
    tag = re.sub("[-.]", "_", platform.host).replace("linux", IMAGE)
    tags = ("--python-tag", python.removesuffix("t"), "--abi-tag", python, "--platform-tag", tag)
    run(sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel)
    (wheel,) = base.glob("*.whl")
    if name.startswith("manylinux"):  # asks for no later glibc, and for no library beside it
        show = [BIN / "auditwheel", "show", wheel]
        told = subprocess.run(show, text=True, stdout=subprocess.PIPE, check=True).stdout
        told = " ".join(told.split())
        asked = re.search(r'platform tag: "manylinux_2_(\d+)_', told)
        assert asked, told
        assert int(asked[1]) <= int(GLIBC.removeprefix("2.")), told
        assert "external shared libraries are required" not in told, told
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
    """Wheels of which cibuildwheel's name, such as cp311-manylinux_x86_64, fits the pattern."""
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
