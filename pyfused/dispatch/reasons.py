"""Reasons to fall back to torch's operator that several modules share, and their log."""

from __future__ import annotations

import logging

from torch.compiler import is_dynamo_compiling

SMALL = "torch is faster at this size"
FUSED = "torch.compile: Inductor fuses it with its neighbours"
_log = logging.getLogger("pyfused")
not_logged: set[str] = set()  # reasons that are not logged, because a kernel runs in the end
_said: set[tuple[str, str]] = set()


def first_time(op: str, reason: str) -> bool:
    """Returns whether this is the first call with this operator and this reason."""
    new = (op, reason) not in _said
    _said.add((op, reason))
    return new


def say_once(op: str, reason: str) -> None:
    """Logs why a call falls back to torch's operator, once and at level INFO."""
    if is_dynamo_compiling() or not _log.isEnabledFor(logging.INFO) or reason in not_logged:
        return
    if first_time(op, reason):
        _log.info("%s: torch: %s", op, reason)
