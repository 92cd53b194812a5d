"""Lists the Triton releases that the GPU kernels are tested with, and the torch that pins each."""

from __future__ import annotations

import re
from importlib import util

# torch's GPU builds pin one Triton release, which pip installs with them.
TORCH_OF_TRITON: dict[str, tuple[str, ...]] = {
    "3.6.0": ("2.11",),
    "3.7.1": ("2.12", "2.13"),
    "3.8.0": ("2.14",),
    "3.9.0": (),
}
OLDEST = next(iter(TORCH_OF_TRITON))
NEEDED = f"{OLDEST.removesuffix('.0')} or later"


def triton_version() -> str | None:
    """Returns the version of the installed Triton, from any distribution, or None."""
    if util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def unsupported_triton() -> str | None:
    """Returns why the kernels do not support the installed Triton, None if they do."""
    version = triton_version()
    if version is not None and _release(version) >= _release(OLDEST):
        return None
    return f"Triton is {version or 'not installed'}, expected {NEEDED}"


def is_tested(version: str) -> bool:
    """Returns whether the kernels are tested with this release of Triton."""
    return _release(version) in map(_release, TORCH_OF_TRITON)


def pinned_triton(torch_version: str) -> str | None:
    """Returns the Triton version that a torch version pins, None if it is not in the table."""
    release = ".".join(map(str, _release(torch_version)))
    return next((triton for triton, torches in TORCH_OF_TRITON.items() if release in torches), None)


def _release(version: str) -> tuple[int, ...]:
    """Returns (major, minor) of a version such as 3.7.1+gitabc."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
