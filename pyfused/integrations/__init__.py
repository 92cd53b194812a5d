"""Callbacks for trainers of other libraries, which convert models and log a report."""

from __future__ import annotations

from pyfused.adopt.report import Report


def metrics(report: Report) -> dict[str, float]:
    """Returns the numbers of a report for a logger of scalars.

    Returns:
        ``pyfused/kernel_calls``, ``pyfused/left_to_torch`` (also calls) and
        ``pyfused/kernel_seconds``.
    """
    results = report.to_dict()
    left = [count for reasons in results["left_to_torch"].values() for count in reasons.values()]
    compiled = sum(results["compiled"].values())
    return {
        "pyfused/kernel_calls": compiled + sum(op["calls"] for op in results["operators"].values()),
        "pyfused/left_to_torch": sum(left),
        "pyfused/kernel_seconds": results["kernel_seconds"],
    }
