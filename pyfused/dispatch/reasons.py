"""Reasons to fall back to torch's operator that several modules share, and their log."""

from __future__ import annotations

import logging
import sys

from torch.compiler import is_dynamo_compiling

SMALL = "torch is faster at this size"
FUSED = "torch.compile: Inductor fuses it with its neighbours"
_log = logging.getLogger("pyfused")
not_reported: set[str] = set()  # reasons of calls that torch's function passes to another one
_reported: dict[tuple[str, str], object] = {}
_OURS_AND_TORCHS = (f"{__name__.partition('.')[0]}.", "torch.")


def first_time(op: str, reason: str) -> bool:
    """Returns whether this is the first call with this operator and this reason."""
    mark = object()
    return _reported.setdefault((op, reason), mark) is mark  # atomic


def log_once(op: str, reason: str) -> None:
    """Logs why a call falls back to torch's operator, once and at level INFO."""
    if is_dynamo_compiling() or not _log.isEnabledFor(logging.INFO) or reason in not_reported:
        return
    if first_time(op, reason):
        _log.info("%s: torch: %s", op, reason)


def stacklevel() -> int:
    """Returns the stacklevel of the first frame outside pyfused's and torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__", __name__)).startswith(
        _OURS_AND_TORCHS
    ):
        frame, level = frame.f_back, level + 1
    return level
