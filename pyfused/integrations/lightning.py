"""A callback for Lightning's ``Trainer``."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pyfused.adopt.convert import convert
from pyfused.adopt.report import Report
from pyfused.integrations import metrics

_log = logging.getLogger("pyfused")


class PyfusedCallback(Callback):  # type: ignore[misc]
    """Converts the LightningModule before it is wrapped, and logs a report when ``fit`` ends.

    The trainer's loggers receive the numbers of :func:`pyfused.integrations.metrics`, and the
    logger ``pyfused`` the whole table, at level INFO.

    Args:
        options: The keyword arguments of :func:`pyfused.convert`.
    """

    def __init__(self, **options: Any) -> None:
        self.options, self.report = options, Report()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        convert(pl_module, **self.options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.report = Report().__enter__()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.report.__exit__()
        _log.info("%s", self.report)
        for logger in trainer.loggers:
            logger.log_metrics(metrics(self.report), trainer.global_step)

    def on_exception(self, *args: Any) -> None:  # noqa: ARG002
        self.report.__exit__()
