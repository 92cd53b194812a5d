"""What the examples share: comparing two runs, and measuring memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference between two loss curves, as a share of the largest loss."""
    pairs = zip(losses, others, strict=True)
    return max(abs(loss - other) for loss, other in pairs) / max(losses)


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
