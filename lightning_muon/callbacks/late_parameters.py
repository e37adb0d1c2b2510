"""LateParameters: trains layers that are added during a fit, and warns of parameters in no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim import HybridOptimizer
from lightning_muon.partition import ParameterRule, partition_parameters
from lightning_muon.partition.names import some_names


class LateParameters(Callback):
    """Trains parameters that are added to a module during a fit, and warns of those in no optimizer.

    Unfrozen layers join the optimizer without this callback (:class:`lightning_muon.HybridOptimizer`). New layers, e.g.
    an adapter that a hook adds, join here before the next batch; the partition of the changed module gives their roles.
    A warning names each parameter that gets a gradient but is in no optimizer, once.

    ``DistributedDataParallel`` averages only gradients of parameters that were trainable when it was built. Gradients
    of parameters that join later are averaged here, before the step.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback
    automatically.

    Args:
        optimizer: the optimizer that new parameters join.
        parameter_rules: the rules that ``optimizer`` was built with.
    """

    def __init__(self, optimizer: HybridOptimizer, parameter_rules: Sequence[ParameterRule] = ()) -> None:
        self.optimizer = optimizer
        self.parameter_rules = parameter_rules
        self._handles: list[RemovableHandle] = []
        self._changed = True
        self._trained: set[str] = set()
        self._averaged: set[Tensor] = set()
        self._outside: set[Tensor] = set()
        self._named: set[Tensor] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A walk over a large model takes milliseconds. Hooks of torch tell when a module or parameter is registered.
        if self.optimizer in trainer.optimizers:
            self._stop()
            self._trained = set(self._groups())
            self._averaged = {parameter for parameter in pl_module.parameters() if parameter.requires_grad}
            self._handles = [
                register_module_parameter_registration_hook(self._note_change),
                register_module_module_registration_hook(self._note_change),
            ]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()  # also after a search by Tuner, which stops a fit midway

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._changed = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._handles and self._changed:
            self._find_outside(trainer, pl_module)
            if len(trainer.optimizers) == 1 and any(parameter.requires_grad for parameter in self._outside):
                joined = self.optimizer.adopt(partition_parameters(pl_module, self.parameter_rules))
                self._find_outside(trainer, pl_module)
                self._trained = set(self._groups())
                names = some_names([f"{entry.name} ({entry.group})" for entry in joined])
                rank_zero_info(
                    f"These parameters were added since the fit started and are trained from now on: {names}."
                )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._handles and self._changed:
            self._find_outside(trainer, pl_module)
        groups = self.optimizer.param_groups
        if self._handles and sum(len(group["params"]) for group in groups) != len(self._trained):
            now = self._groups()
            names = some_names([f"{name} ({group})" for name, group in now.items() if name not in self._trained])
            self._trained = set(now)
            if names and trainer.global_step > 0:  # a resumed run has its own at the first step
                rank_zero_info(
                    f"These parameters were unfrozen since the fit started and are trained from now on: {names}."
                )
        outside = {parameter for parameter in self._outside - self._named if parameter.grad is not None}
        if outside:
            self._find_outside(trainer, pl_module)  # some may have joined since
            outside &= self._outside
        if outside:
            self._named |= outside
            found = [name for name, parameter in pl_module.named_parameters() if parameter in outside]
            names = some_names(found)
            rank_zero_warn(
                f"{type(pl_module).__name__} has parameters that get gradients and are in no optimizer: {names}. This "
                "step does not train them. Freeze them with requires_grad_(False), or create them before "
                "configure_optimizers is called (in __init__ or configure_model)."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._handles and trainer.world_size > 1 and _wraps_in_ddp(trainer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter not in self._averaged and parameter.requires_grad:
                        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        parameter.grad = trainer.strategy.reduce(grad, reduce_op="mean")

    def _groups(self) -> dict[str, str]:
        """Name of the param group of each parameter that the optimizer trains, by the parameter's name."""
        return {name: group["name"] for group in self.optimizer.param_groups for name in group["param_names"]}

    def _note_change(self, *registered: Any) -> None:
        self._changed = True

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._changed, self._outside = True, set()

    def _find_outside(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the parameters that are in no optimizer and in no partition of a hybrid optimizer."""
        known = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        hybrids = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, HybridOptimizer)]
        known |= {entry.parameter for hybrid in hybrids for entry in hybrid.partition or ()}
        self._outside = {parameter for parameter in module.parameters() if parameter not in known}
        self._changed = False


def _wraps_in_ddp(trainer: Trainer) -> bool:
    return any(base.__name__ == "DDPStrategy" for base in type(trainer.strategy).__mro__)
