"""UseMuon: a callback that trains any LightningModule with Muon."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_muon.callbacks.lookup import callbacks_named
from lightning_muon.configure import (
    MatrixOptimizerCallable,
    OtherOptimizerCallable,
    add_matrix_layouts,
    check_settings,
)
from lightning_muon.mixin import MuonMixin, warn_of_inner_settings
from lightning_muon.partition import ParameterRule
from lightning_muon.replaced import Replacement, configure_in_place_of, own_method
from lightning_muon.schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class UseMuon(Callback):
    """Trains hidden matrices with Muon and the rest with AdamW, in a module that stays as it is.

    Use it for modules that cannot have :class:`MuonMixin`, and with packages that build the module, its optimizer or
    the Trainer themselves and accept ``callbacks``. During a fit it replaces the module's ``configure_optimizers``; a
    warning names the optimizer, learning rate and scheduler that are not used. After the fit the module is as before,
    and its checkpoints load in its own class: ``Theirs.load_from_checkpoint(path)``. To resume from a checkpoint
    (``fit(ckpt_path=...)``), give the callback with the same settings. Checkpoints hold ``"matrix_layouts"`` for
    ``lightning-muon spectra``, except those saved with ``save_weights_only=True``: Lightning does not call callbacks
    for them.

    It works in Trainers of ``lightning.pytorch`` and of ``pytorch_lightning``. Lightning requires every module to
    define ``configure_optimizers``. If yours does not, add one that returns None, or use the mixin or
    :class:`MuonCLI`. A ``configure_optimizers`` that makes a :class:`HybridOptimizer` itself is not replaced.

    Args:
        matrix_optimizer: called with the param groups of the matrices: a class or ``functools.partial(Muon, lr=1e-3)``.
            None for :class:`lightning_muon.Muon`.
        other_optimizer: called with the param groups of all other parameters; None for ``torch.optim.AdamW``.
        schedule: multiplier of all learning rates, e.g. ``Cosine(warmup=0.02)``; None to leave them constant.
        parameter_rules: rules that override the automatic partition: group, layout and options of parameters.

    Raises:
        TypeError: if an optimizer is given instead of a class or function that builds one, or ``schedule`` is not a
            ``Schedule``.
        RuntimeError: at the start of a fit, if the module has :class:`MuonMixin`, if ``configure_optimizers`` was set
            on the instance, as ``LightningCLI`` does for ``--optimizer``, if the module trains with several
            optimizers, or if the Trainer has a second ``UseMuon``.

    Example::

        >>> trainer = Trainer(callbacks=[UseMuon(partial(Muon, lr=1e-3), schedule=Cosine(warmup=0.02))])
    """

    replaced_by = "UseMuon"
    """Name in messages of what replaces ``configure_optimizers``."""
    settings_named = "matrix_optimizer, other_optimizer and schedule of UseMuon"
    """Names in messages of the settings to use instead."""

    def __init__(
        self,
        matrix_optimizer: MatrixOptimizerCallable | None = None,
        other_optimizer: OtherOptimizerCallable | None = None,
        schedule: Schedule | None = None,
        parameter_rules: list[ParameterRule] | None = None,
    ) -> None:
        check_settings(matrix_optimizer, other_optimizer, schedule)
        self.matrix_optimizer = matrix_optimizer
        self.other_optimizer = other_optimizer
        self.schedule = schedule
        self.parameter_rules: Sequence[ParameterRule] = tuple(parameter_rules or ())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if len(callbacks_named(trainer, "UseMuon")) > 1:
                raise RuntimeError("The Trainer has several UseMuon callbacks, and only one can take effect: keep one.")
            self.attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_ours(vars(pl_module).get("configure_optimizers")):
            raise RuntimeError(
                f"{type(pl_module).__name__} sets its configure_optimizers during setup, so that UseMuon has no effect."
                " Set it before the fit, or leave out UseMuon."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.detach(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        add_matrix_layouts(checkpoint, pl_module, self.parameter_rules)

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer gives each callback the module's methods `log` and `log_dict`. Packages that copy or pickle their
        # callbacks after a fit would copy the whole module with them.
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}

    def attach(self, module: LightningModule) -> None:
        """Replace ``module.configure_optimizers``; a fit calls this method.

        Raises:
            RuntimeError: if the module has the mixin, or if ``configure_optimizers`` was set on the instance.
        """
        kind = type(module).__name__
        if isinstance(module, MuonMixin):
            raise RuntimeError(
                f"{kind} has MuonMixin, which does what UseMuon does: give the settings to {kind} and remove UseMuon."
            )
        present = vars(module).get("configure_optimizers")
        if present is not None and not _is_ours(present):
            raise RuntimeError(
                f"{kind}.configure_optimizers was replaced on the instance, as LightningCLI does for --optimizer: "
                "one of the two would have no effect. Leave out --optimizer and --lr_scheduler, or UseMuon."
            )
        # A partial of a function of this module: unlike a bound method it survives pickling, as for ddp_spawn.
        module.configure_optimizers = functools.partial(_configure_optimizers, module, self)  # type: ignore[method-assign]

    def detach(self, module: LightningModule) -> None:
        """Restore ``module.configure_optimizers``, unless the class has none for the next fit."""
        if own_method(type(module)) is not None and _is_ours(vars(module).get("configure_optimizers")):
            del module.configure_optimizers


def _configure_optimizers(module: LightningModule, use: UseMuon) -> OptimizerLRScheduler:
    keep = "return lightning_muon.configure_hybrid_optimizer(self, ...) with it from that method"
    warn_of_inner_settings(module)
    return configure_in_place_of(
        own_method(type(module)),
        module,
        Replacement(use.replaced_by, use.settings_named, keep),
        matrix_optimizer=use.matrix_optimizer,
        other_optimizer=use.other_optimizer,
        schedule=use.schedule,
        parameter_rules=use.parameter_rules,
    )


def _is_ours(attribute: object) -> bool:
    return isinstance(attribute, functools.partial) and attribute.func is _configure_optimizers
