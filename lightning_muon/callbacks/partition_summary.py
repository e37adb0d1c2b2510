"""PartitionSummary: the partition table at the start of a fit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console

from lightning_muon.partition import ParameterRule, partition_parameters


class PartitionSummary(Callback):
    """Prints which optimizer takes each parameter, and why, when a fit starts.

    The table goes to Rich's shared console, on rank zero only, above the progress bar.

    Args:
        parameter_rules: rules for a module without :class:`lightning_muon.MuonMixin`; the mixin's own come first.

    Example::

        Trainer(callbacks=[PartitionSummary()])
    """

    def __init__(self, parameter_rules: list[ParameterRule] | None = None) -> None:
        self.parameter_rules: Sequence[ParameterRule] = tuple(parameter_rules or ())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show(pl_module)

    @rank_zero_only
    def show(self, module: LightningModule) -> None:
        """Print the partition of ``module``."""
        rules = [*getattr(module, "parameter_rules", ()), *self.parameter_rules]
        get_console().print(partition_parameters(module, rules).table())
