"""PartitionSummary: the partition table at the start of a fit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.markup import escape
from torch.optim import Optimizer

from lightning_muon.callbacks.running import partition_of
from lightning_muon.optim import HybridOptimizer
from lightning_muon.partition import ParameterRule
from lightning_muon.schedules import ScheduledLR


class PartitionSummary(Callback):
    """Prints which optimizer takes each parameter, and why, when a fit starts.

    The table shows the partition of the running optimizer. Below it are the optimizers with their learning rates. For a
    module that trains without an optimizer of this package, the table shows the partition that it would have, and a
    line above says so. The table is printed to Rich's shared console, on rank 0 only, above the progress bar.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback
    automatically if the Trainer shows its model summary: ``Trainer(enable_model_summary=False)`` turns off both.

    Args:
        parameter_rules: rules for a module that trains without an optimizer of this package, applied after its own.

    Example::

        >>> trainer = Trainer(callbacks=[PartitionSummary()])
    """

    def __init__(self, parameter_rules: list[ParameterRule] | None = None) -> None:
        self.parameter_rules: Sequence[ParameterRule] = tuple(parameter_rules or ())
        self.only_for: Optimizer | None = None
        """If set, print only in fits with this optimizer: a Trainer keeps its callbacks for later fits."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.only_for is not None and self.only_for not in trainer.optimizers:
            return
        self.show(pl_module, trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])

    @rank_zero_only
    def show(
        self, module: LightningModule, optimizers: Sequence[Optimizer] = (), schedulers: Sequence[object] = ()
    ) -> None:
        """Print the partition of ``module``.

        Args:
            module: the module.
            optimizers: the optimizers that train it; without any, print the partition that a new optimizer would have.
            schedulers: schedulers of the optimizers.
        """
        partition, running = partition_of(module, optimizers, self.parameter_rules)
        console = get_console()
        if optimizers and not running:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            console.print(
                f"{type(module).__name__} trains with {escape(names)}. With MuonMixin or UseMuon its partition would "
                "be:"
            )
        console.print(partition.table())
        for optimizer in optimizers:
            for line in _describe(optimizer, schedulers):
                console.print(escape(line))


def _describe(optimizer: Optimizer, schedulers: Sequence[object]) -> list[str]:
    """Lines that name each child optimizer with its arguments, and the schedule."""
    if not isinstance(optimizer, HybridOptimizer):
        return []
    lines = []
    for name, child in optimizer.optimizers.items():
        shown = [f"{key}={child.defaults[key]:g}" for key in ("lr", "weight_decay") if _is_number(child.defaults, key)]
        lines.append(f"{name}: {type(child).__name__}({', '.join(shown)})")
    own = [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
    for scheduler in own:
        if isinstance(scheduler, ScheduledLR):
            lines.append(f"schedule: {scheduler.schedule!r}")
        else:
            lines.append(f"schedule: {type(scheduler).__name__}")
    return [*lines, *([] if own else ["schedule: none, the learning rates are constant"])]


def _is_number(options: dict[str, object], key: str) -> bool:
    return isinstance(options.get(key), (int, float))
