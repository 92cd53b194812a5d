"""What the examples share: comparing two runs, and measuring memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference between two loss curves, as a share of the largest loss."""
    first, second = torch.tensor([losses, others], dtype=torch.float64)
    return ((first - second).abs().max() / first.abs().max()).item()


def require_equal(losses: Sequence[float], others: Sequence[float], tolerance: float) -> None:
    """End the program where two loss curves differ by more than the tolerance, or are NaN."""
    difference = largest_difference(losses, others)
    print(f"largest difference between the loss curves: {difference:.1e} of the largest loss")
    if not difference <= tolerance:
        sys.exit(f"the loss curves differ by more than the tolerance, {tolerance:.0e}")


def peak_memory() -> float | None:
    """The most memory this process has held so far, in MiB; None where the platform hides it."""
    if sys.platform == "linux":
        # Not getrusage: a child's ru_maxrss starts from its parent's.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    elif sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return None
