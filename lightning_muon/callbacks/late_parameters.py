"""LateParameters: layers that join a running fit are trained, and what is not trained is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_muon.optim import HybridOptimizer
from lightning_muon.partition import ParameterRule, partition_parameters


class LateParameters(Callback):
    """Trains parameters that are added to a module during a fit, and names those that no optimizer has.

    Layers that are unfrozen join the optimizer by themselves (:class:`lightning_muon.HybridOptimizer`). Layers that are
    new, e.g. an adapter that a hook puts in, join here before the next batch: by the role that they have in the module
    as it is then. A parameter that gets a gradient while it is in no optimizer is named in a warning, once.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback by
    themselves.

    Args:
        optimizer: the optimizer that new parameters join.
        parameter_rules: by which it was built.
    """

    def __init__(self, optimizer: HybridOptimizer, parameter_rules: Sequence[ParameterRule] = ()) -> None:
        self.optimizer = optimizer
        self.parameter_rules = parameter_rules
        self._groups = -1
        self._optimized: set[Tensor] = set()
        self._named: set[Tensor] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.optimizer not in trainer.optimizers:
            return
        known = {entry.parameter for entry in self.optimizer.partition or ()}
        if all(p in known or p in self._optimized for p in pl_module.parameters() if p.requires_grad):
            return
        self._refresh(trainer)
        new = {p for p in pl_module.parameters() if p.requires_grad} - known - self._optimized - self._named
        if new and len(trainer.optimizers) == 1:
            partition = partition_parameters(pl_module, self.parameter_rules)
            joining = [entry for entry in partition if entry.parameter in new]
            self.optimizer.adopt(joining)  # type: ignore[attr-defined]
            names = ", ".join(f"{entry.name} ({entry.group})" for entry in joining)
            rank_zero_info(f"Added to the model since the fit started, and trained from now on: {names}.")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.optimizer not in trainer.optimizers:
            return
        if self._groups != self._count(trainer):
            self._refresh(trainer)
        outside = [
            (name, parameter)
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None and parameter not in self._optimized and parameter not in self._named
        ]
        if outside:
            self._named.update(parameter for _, parameter in outside)
            names = ", ".join(name for name, _ in outside[:6]) + (", ..." if len(outside) > 6 else "")
            rank_zero_warn(
                f"{len(outside)} parameters of {type(pl_module).__name__} get gradients but are in no optimizer, so "
                f"that they are not trained: {names}. Freeze them with requires_grad_(False), or have them in the "
                "module before configure_optimizers is called (in __init__ or configure_model)."
            )

    def _refresh(self, trainer: Trainer) -> None:
        self._groups = self._count(trainer)
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        self._optimized = {parameter for group in groups for parameter in group["params"]}

    def _count(self, trainer: Trainer) -> int:
        return sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
