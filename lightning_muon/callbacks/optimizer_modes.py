"""OptimizerModes: switches schedule-free optimizers between training and evaluation weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class OptimizerModes(Callback):
    """Calls ``train()`` and ``eval()`` of optimizers that have them, as schedule-free ones do.

    Such optimizers train with other weights than those for evaluation. Batches are trained in train mode. Validation,
    every ``state_dict`` of the module, so every checkpoint, and the module after the fit have the weights for
    evaluation. A module with :class:`lightning_muon.MuonMixin` and one under ``MuonCLI`` get this callback
    automatically if an optimizer needs it.

    Example::

        >>> trainer = Trainer(callbacks=[OptimizerModes()])
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_save_checkpoint: it runs after the optimizer states are taken, and never with save_weights_only=True.
        self._handle = pl_module.register_state_dict_pre_hook(_switch_to_eval)  # type: ignore[no-untyped-call]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _switch(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _switch(trainer, "eval")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        _switch(trainer, "eval")
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _switch_to_eval(module: LightningModule, prefix: str, keep_vars: bool) -> None:
    _switch(module.trainer, "eval")


def _switch(trainer: Trainer, mode: str) -> None:
    for optimizer in trainer.optimizers:
        switch = getattr(optimizer, mode, None)
        if callable(switch):
            switch()
