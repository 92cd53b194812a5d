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

    Layers that the module makes in ``setup`` and ``configure_model`` are also converted. The
    trainer's loggers receive the numbers of :func:`pyfused.integrations.metrics`, and the logger
    ``pyfused`` the whole table, at level INFO.

    Args:
        options: The keyword arguments of :func:`pyfused.convert`.
    """

    def __init__(self, **options: Any) -> None:
        self.options, self.report = options, Report()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        vars(pl_module).pop("configure_model", None)  # of an earlier call that raised an error
        configure_model = pl_module.configure_model

        def configure_and_convert() -> None:
            del pl_module.configure_model
            configure_model()
            convert(pl_module, **self.options)

        # The last method before the module is wrapped; the module's own setup may also make layers.
        pl_module.configure_model = configure_and_convert

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.report.__exit__()
        self.report = Report().__enter__()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.report.__exit__()
        _log.info("%s", self.report)
        for logger in trainer.loggers:
            logger.log_metrics(metrics(self.report), trainer.global_step)

    def teardown(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.report.__exit__()  # a tuner ends fit without on_fit_end

    def on_exception(self, *args: Any) -> None:  # noqa: ARG002
        self.report.__exit__()
