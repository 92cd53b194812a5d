"""Why calls are left to torch: the reasons that several modules know, and the logger for all."""

from __future__ import annotations

import logging

from torch.compiler import is_dynamo_compiling

SMALL = "ATen is faster at this size"
FUSED = "torch.compile: Inductor fuses it with its neighbours"
_log = logging.getLogger("pyfused")
_said: set[tuple[str, str]] = set()


def first_time(op: str, reason: str) -> bool:
    """Returns whether this is asked for the first time of an operator and a reason."""
    new = (op, reason) not in _said
    _said.add((op, reason))
    return new


def say_once(op: str, reason: str) -> None:
    """Tells the logger, at level INFO, why an operator falls back to torch's."""
    if not is_dynamo_compiling() and _log.isEnabledFor(logging.INFO) and first_time(op, reason):
        _log.info("%s: torch: %s", op, reason)
