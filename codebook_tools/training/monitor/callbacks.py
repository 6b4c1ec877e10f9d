"""The monitor as a callback of Lightning and of transformers' Trainer. In a loop of accelerate it needs none."""

from __future__ import annotations

from typing import Any

from codebook_tools.runtime.optional import require
from codebook_tools.training.monitor.monitor import CodebookMonitor


def lightning_monitor(**settings: Any) -> Any:
    """A callback for `lightning.Trainer(callbacks=[...])`, which logs the figures of each epoch.

    Args:
        **settings: Of `CodebookMonitor`, but for `model` and `optimizer`: the trainer's first optimizer counts.

    Raises:
        CodebookError: Lightning is missing.
    """
    base = require("lightning_monitor", "lightning", "lightning.pytorch").Callback

    class LightningMonitor(base):  # type: ignore[misc, valid-type]
        monitor: CodebookMonitor | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.monitor = CodebookMonitor(pl_module, optimizer=trainer.optimizers[0], **settings)
            self.monitor.steps = trainer.global_step

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if self.monitor is not None:
                self.monitor.epoch()
                pl_module.log_dict(self.monitor.scalars(), sync_dist=True)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def _close(self) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return LightningMonitor()


def transformers_monitor(trainer: Any, **settings: Any) -> Any:
    """Add a callback to a `transformers.Trainer`, which logs the figures of each epoch.

    Args:
        trainer: Whose model is monitored.
        **settings: Of `CodebookMonitor`, but for `model` and `optimizer`.

    Returns:
        The callback.

    Raises:
        CodebookError: transformers is missing.
    """
    base = require("transformers_monitor", "accelerate", "transformers").TrainerCallback

    class TransformersMonitor(base):  # type: ignore[misc, valid-type]
        monitor: CodebookMonitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            self.monitor = CodebookMonitor(objects["model"], optimizer=objects["optimizer"], **settings)
            self.monitor.steps = state.global_step

        def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if self.monitor is not None:
                self.monitor.epoch()
                trainer.log(self.monitor.scalars())

        def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    callback = TransformersMonitor()
    trainer.add_callback(callback)
    return callback
