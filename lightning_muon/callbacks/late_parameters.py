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
        self._count = -1
        self._known: set[Tensor] = set()
        self._named: set[Tensor] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._new(trainer, pl_module) and len(trainer.optimizers) == 1:
            joined = self.optimizer.adopt(partition_parameters(pl_module, self.parameter_rules))
            self._count = -1  # what joined may have taken the places of others
            names = ", ".join(f"{entry.name} ({entry.group})" for entry in joined)
            rank_zero_info(f"Added to the model since the fit started, and trained from now on: {names}.")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outside = {p for p in self._new(trainer, pl_module) if p.grad is not None} - self._named
        if outside:
            self._named |= outside
            found = [name for name, parameter in pl_module.named_parameters() if parameter in outside]
            names = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
            rank_zero_warn(
                f"{type(pl_module).__name__} has parameters that get gradients and are in no optimizer: {names}. This "
                "step does not train them. Freeze them with requires_grad_(False), or have them in the module before "
                "configure_optimizers is called (in __init__ or configure_model)."
            )

    def _new(self, trainer: Trainer, module: LightningModule) -> set[Tensor]:
        """Trainable parameters that are in no optimizer, and that the hybrid does not wait for either."""
        if self.optimizer not in trainer.optimizers:  # a later fit, of another module
            return set()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        count = sum(len(group["params"]) for group in groups)
        if count != self._count:
            self._count = count
            self._known = {parameter for group in groups for parameter in group["params"]}
            self._known |= {entry.parameter for entry in self.optimizer.partition or ()}
        return {p for p in module.parameters() if p.requires_grad and p not in self._known}
