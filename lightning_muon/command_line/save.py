"""Saves the config of a run beside that of an earlier run."""

from __future__ import annotations

import os
from itertools import count

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info


class SaveConfigBeside(SaveConfigCallback):
    """Lightning's callback, but it writes ``config-v1.yaml`` and so on beside a ``config.yaml`` of an earlier run.

    Without a logger all runs share a folder, and Lightning's callback raises in the second run. ``ModelCheckpoint``
    numbers checkpoints in the same way.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the config, under a name that is free."""
        if self.save_to_log_dir and not self.already_saved and not self.overwrite:
            folder = trainer.log_dir  # this broadcasts the folder
            if folder is not None and trainer.is_global_zero:
                self._choose_name(folder)
        super().setup(trainer, pl_module, stage)

    def _choose_name(self, folder: str) -> None:
        exists = get_filesystem(folder).isfile
        if not exists(os.path.join(folder, self.config_filename)):
            return
        stem, ending = os.path.splitext(self.config_filename)
        taken = self.config_filename
        self.config_filename = next(
            name for n in count(1) if not exists(os.path.join(folder, name := f"{stem}-v{n}{ending}"))
        )
        rank_zero_info(
            f"{os.path.join(folder, taken)} exists and is kept; the config of this run is "
            f"{self.config_filename} beside it."
        )
