"""Locks that are free in forked children."""

from __future__ import annotations

import os
import threading


def fork_safe_lock() -> threading.RLock:
    """Returns a reentrant lock that a process holds while it forks.

    So no other thread holds the lock then, or is about to change what it protects: a child has no
    other threads, and would wait for ever.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        release = lock.release
        os.register_at_fork(before=lock.acquire, after_in_parent=release, after_in_child=release)
    return lock
