"""A callback for transformers' ``Trainer``."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback

from pyfused.adopt.convert import convert
from pyfused.adopt.report import Report
from pyfused.integrations import metrics

_log = logging.getLogger("pyfused")


class PyfusedCallback(TrainerCallback):  # type: ignore[misc]
    """Converts a trainer's model, and logs a report when ``train`` ends.

    ``Trainer.log`` receives the numbers of :func:`pyfused.integrations.metrics`, and the logger
    ``pyfused`` the whole table, at level INFO. Usage:
    ``trainer.add_callback(PyfusedCallback(trainer))``.

    Args:
        trainer: The trainer. Its model is converted at once, before ``train`` wraps it; the models
            of ``model_init`` are converted when ``train`` begins.
        options: The keyword arguments of :func:`pyfused.convert`.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self.trainer, self.options, self.report = trainer, options, Report()
        self.model = convert(trainer.model, **options)
        replaced = vars(trainer).get("train")

        def train(*args: Any, **kwargs: Any) -> Any:
            try:
                return (replaced or partial(type(trainer).train, trainer))(*args, **kwargs)
            finally:  # no callback is called if it raises an error
                self.report.__exit__()

        trainer.train = train

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        model = self.trainer.model
        if not any(module is self.model for module in model.modules()):  # wrapped or the same
            self.model = convert(model, **self.options)
        self.report.__exit__()
        self.report = Report().__enter__()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.report.__exit__()
        _log.info("%s", self.report)
        self.trainer.log(metrics(self.report))
