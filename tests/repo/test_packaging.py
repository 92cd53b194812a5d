"""The build, its machine code, and the sdist and the wheel, installed outside the working tree."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from processes import process

import pyfused
from pyfused.backends import cpu

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import sizes

ROOT = Path(__file__).parents[2]
MODULES = [f"pyfused._cpu_{isa.replace('-', '_')}" for isa in cpu.BUILT]

pytestmark = pytest.mark.slow


def run(*arguments: Any, folder: Path, path: Sequence[Path] = (), **environment: str) -> Any:
    """Runs Python in `folder`, with the modules in `path` before all others."""
    before = os.pathsep.join(map(str, path))
    return process(*arguments, cwd=folder, **{"PYTHONPATH": before} | environment)


# ---- the sdist and the wheel ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def dist() -> Path:
    """Returns a folder with the sdist and the wheel of the current tree."""
    if folder := os.environ.get("PYFUSED_TEST_DIST"):
        return Path(folder)
    pytest.skip("run make wheels, and set PYFUSED_TEST_DIST=$PWD/dist")


def test_files_and_metadata_of_the_sdist_and_the_wheel(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    patterns = ("pyfused/**/*.py", "kernels/*.py", "csrc/*.[chi]*")
    modules, kernels, sources = (
        {file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern)} for pattern in patterns
    )
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "pyfused/py.typed"}
    assert files >= modules | kernels | sources | needed
    (path,) = dist.glob("*.whl")
    wheel = zipfile.ZipFile(path)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules |= {f"pyfused/_cpu_{isa.replace('-', '_')}{suffix}" for isa in cpu.ISAS}
    modules |= {"pyfused/py.typed"}
    names = wheel.namelist()
    package = modules | {f"pyfused/{kernel}" for kernel in kernels}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == pyfused.__version__
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])


# ---- the installed wheel -------------------------------------------------------------------------

RELU = """
import torch
from pyfused.backends import cpu
from pyfused.functional import relu
print(cpu.capability, cpu.native.__file__, relu(torch.tensor([-1.0, 2.0])).tolist())
"""


@pytest.fixture(scope="module")
def site(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder into which the wheel was installed."""
    (wheel,), folder = dist.glob("*.whl"), tmp_path_factory.mktemp("site")
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    installed = run(*pip, folder=folder)
    assert installed.returncode == 0, installed.stderr
    return folder


def run_installed(*arguments: str, site: Path, **environment: str) -> Any:
    """Runs Python without .pth files, which would import the editable install instead."""
    path = [site, *(Path(sysconfig.get_path(lib)) for lib in ("purelib", "platlib"))]
    return run("-S", *arguments, folder=site, path=path, **environment)


@pytest.mark.parametrize("isa", cpu.supported)
def test_the_installed_wheel_runs_each_isa(site: Path, isa: str) -> None:
    result = run_installed("-c", RELU, site=site, PYFUSED_BACKEND="cpu", PYFUSED_CPU_CAPABILITY=isa)
    capability, file, values = result.stdout.split(maxsplit=2)
    assert (capability, values.strip()) == (isa, "[0.0, 2.0]"), result.stderr
    assert Path(file).is_relative_to(site)


def test_the_installed_wheel_needs_only_torch(site: Path) -> None:
    others = "lightning", "numpy", "sklearn", "transformers", "triton", "trl"
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
    result = run_installed("-c", blocked + RELU, site=site)
    assert result.stdout.endswith(" [0.0, 2.0]\n"), result.stderr


@pytest.mark.skipif(len(cpu.BUILT) == 1, reason="this architecture has only one instruction set")
def test_an_unsupported_isa_raises_and_is_not_loaded(site: Path) -> None:
    least, most = MODULES[0], MODULES[-1]
    older_cpu = f"""
import sys, types
sys.modules[{least!r}] = module = types.ModuleType({least!r})
module.runs_here = lambda isa: isa == {cpu.BUILT[0]!r}
try:
    import pyfused
finally:
    print({most!r} in sys.modules)
"""
    result = run_installed("-c", older_cpu, site=site, PYFUSED_CPU_CAPABILITY=cpu.BUILT[-1])
    assert result.stdout == "False\n"
    assert f"expected one of {cpu.BUILT[0]}, which" in result.stderr
    assert f"got '{cpu.BUILT[-1]}'" in result.stderr


# ---- without the compiled modules ----------------------------------------------------------------


def copy_of_package(folder: Path) -> Path:
    """Returns a folder with the package, as in an installation without the compiled modules."""
    ignored = shutil.ignore_patterns("__pycache__", "_cpu_*")
    shutil.copytree(ROOT / "pyfused", folder / "pyfused", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "pyfused/kernels", ignore=ignored)
    return folder


PURE = f"""
import sys
sys.path += {[str(ROOT / folder) for folder in ("docs", "benchmarks", "examples")]}
import contextlib, io, pages, pyfused, torch
for name in pages.EXAMPLES:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(pages.example(name), name, "exec"), {{}})
x = torch.randn(1 << 20, requires_grad=True)
print(pyfused.explain("mse_loss", x, x.detach()))
print(*pyfused.memory.stats()[:5], pyfused.memory.release())
"""


INTERPRETED = """
import pyfused, torch
@pyfused.activation
def swish(input): return input * torch.sigmoid(input)
x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
pyfused.functional.cross_entropy(swish(x), target).backward()
print(pyfused.explain("cross_entropy", x, target).backend, pyfused.explain(swish, x).backend)
"""


def test_a_pure_installation_uses_torch_on_cpus_and_has_triton_kernels(tmp_path: Path) -> None:
    pure = copy_of_package(tmp_path)
    result = run_installed("-c", PURE, site=pure)
    expected = "mse_loss: torch: pyfused was installed without its CPU kernels\n0 0 0 0 0 0\n"
    assert (result.stdout, result.stderr) == (expected, "")
    result = run_installed("-m", "pyfused", site=pure)
    assert "cpu: torch's operators: pyfused was installed without" in result.stdout
    result = run_installed("-m", "pyfused", site=pure, PYFUSED_BACKEND="cpu")
    assert "ImportError: PYFUSED_BACKEND: expected triton or torch, as " in result.stderr
    pytest.importorskip("triton")
    forced = {"PYFUSED_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    result = run_installed("-c", INTERPRETED, site=pure, **forced)
    assert result.stdout == "triton triton\n", result.stderr


def test_an_unbuilt_clone_says_how_to_get_kernels(tmp_path: Path) -> None:
    """Even if pyfused is installed, Python imports the folder."""
    clone = copy_of_package(tmp_path)
    (clone / "csrc").mkdir()
    result = run_installed("-m", "pyfused", site=clone)
    message = f"run 'make build' in {clone}, or use an installed pyfused in another folder"
    assert message in result.stdout
    assert message in result.stderr


# ---- the build -----------------------------------------------------------------------------------


def test_a_build_only_compiles_changed_sources_with_portable_flags(tmp_path: Path) -> None:
    """The tree has minimal sources."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "pyfused").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc/bindings.cpp").write_text('#include "stub.h"\n')
    (tmp_path / "csrc/stub.h").touch()
    (tmp_path / "csrc/other.cpp").touch()
    command, commands = ("setup.py", "build_ext", "--inplace"), ""

    def compiled_after(changed: str | None = None, flags: str = "") -> Counter[str]:
        nonlocal commands
        if changed:
            (tmp_path / changed).touch()
        result = run(*command, folder=tmp_path, CFLAGS="", CXXFLAGS=flags)
        assert result.returncode == 0, result.stdout + result.stderr
        commands += result.stdout
        return Counter(re.findall(r"-c csrc/(\w+)\.cpp", result.stdout))

    each = len(MODULES)
    assert compiled_after() == {"bindings": 1, "other": each}
    assert compiled_after() == {}
    assert compiled_after("csrc/other.cpp") == {"other": each}
    assert compiled_after("csrc/stub.h") == {"bindings": 1}
    assert compiled_after(flags="-g") == {"bindings": 1, "other": each}
    assert "-ffp-contract=fast" in commands
    isa = MODULES[0].removeprefix("pyfused._cpu_")
    one = run(*command, folder=tmp_path, CPPFLAGS="-DONE", PYFUSED_ISAS=isa).stdout
    assert Counter(re.findall(r"-c csrc/(\w+)\.cpp", one)) == {"bindings": 1, "other": 1}
    for flag in ("-march=native", "-mtune=native", "-ffast-math", "-ffinite-math-only"):
        assert flag not in commands


def test_a_clone_is_imported_in_the_folder_beside_it(tmp_path: Path) -> None:
    """There, Python finds the clone's folder, which has the package's name, but no __init__.py."""
    (tmp_path / "pyfused").symlink_to(ROOT)
    show = "import pyfused, pyfused.kernels as k; print(pyfused.__file__, k.__file__)"
    files = f"{ROOT / 'pyfused/__init__.py'} {ROOT / 'kernels/__init__.py'}\n"
    for folder in (tmp_path, ROOT, tmp_path.parent):
        assert run("-c", show, folder=folder).stdout == files
    assert run("-m", "pyfused", "--version", folder=tmp_path).stdout.startswith("pyfused 0.")
    (other := tmp_path / "other/pyfused").mkdir(parents=True)
    (other / "__init__.py").write_text("print('other')")
    for folder, path in ((tmp_path, [other.parent]), (other.parent, [])):
        assert run("-c", "import pyfused", folder=folder, path=path).stdout == "other\n"


# ---- machine code --------------------------------------------------------------------------------


def test_kernels_that_differ_in_size_are_named() -> None:
    found = sizes.measured(sizes.ROOT)
    isa = next(iter(sizes.modules()))
    kernel = max(found, key=lambda name: found[name].get(isa, 0))
    assert sizes.changed(found, found, [isa]) == []
    size = found[kernel][isa]
    grown = found | {kernel: {isa: 2 * size}, "new<float>": {isa: 100}}
    assert sizes.changed(found, grown, [isa]) == [
        f"{kernel} ({isa}): {size} bytes, now {2 * size}",
        f"new<float> ({isa}): new",
    ]
