"""MuonCLI: LightningCLI for modules with or without MuonMixin, and the console script ``lightning-muon``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, OptimizerCallable

from lightning_muon import spectra
from lightning_muon.callbacks import PartitionSummary
from lightning_muon.configure import MatrixOptimizerCallable
from lightning_muon.mixin import MuonMixin
from lightning_muon.partition import ParameterRule
from lightning_muon.schedules import Schedule
from lightning_muon.use_muon import UseMuon


def main(args: ArgsType = None) -> None:
    """The console script ``lightning-muon``: :class:`MuonCLI` for installed modules and those in the current directory.

    Its subcommand ``spectra`` shows what the singular values in checkpoints say, and needs no model.

    Example::

        lightning-muon fit --model my.Module --data my.Data --matrix_optimizer Muon --matrix_optimizer.lr 1e-3
        lightning-muon spectra first.ckpt last.ckpt
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["spectra"]:
        spectra.main(words[1:])
    else:
        MuonCLI(args=args, parser_kwargs={"epilog": _EPILOG})


class PartitionTrainer(Trainer):
    """A Trainer whose method ``partition`` becomes a subcommand of :class:`MuonCLI`."""

    def partition(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Print which optimizer takes each parameter and why, without training."""
        model.trainer = self
        model.configure_model()
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PartitionSummary):
                callback.show(model)


class MuonCLI(LightningCLI):
    """``LightningCLI`` that trains any LightningModule with Muon and adds the subcommand ``partition``.

    * A module with :class:`MuonMixin` is set up by ``--model.matrix_optimizer``, ``--model.other_optimizer``,
      ``--model.schedule`` and ``--model.parameter_rules``. A module without it takes the same options without
      ``model.``, and its own ``configure_optimizers`` is replaced.
    * Classes of this package may be given by name: ``--model.matrix_optimizer NorMuon``.
    * ``fit`` prints the partition, unless ``--trainer.enable_model_summary false``; ``partition`` prints it and exits.
    * Plain ``LightningCLI``'s ``--optimizer`` and ``--lr_scheduler`` are not there.

    Args:
        model_class: as in ``LightningCLI``; None takes the class from ``--model``.
        datamodule_class: as in ``LightningCLI``; None takes the class from ``--data``.
        links: names of attributes of the data module that models take as arguments, e.g. ``["num_items"]``. Where the
            model takes the argument and the data module has the attribute, its value is handed over, whatever else is
            given for the argument.
        trainer_class: subclass of :class:`PartitionTrainer`.
        **kwargs: as in ``LightningCLI``, less ``auto_configure_optimizers``.

    Raises:
        TypeError: if ``trainer_class`` is no :class:`PartitionTrainer`.
        ValueError: if ``--matrix_optimizer`` and the like are given for a module that has the mixin.

    Example::

        MuonCLI(SASRec, SyntheticSequences, links=["num_items"])
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        *,
        links: Sequence[str] = (),
        trainer_class: type[PartitionTrainer] = PartitionTrainer,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(trainer_class, type) and issubclass(trainer_class, PartitionTrainer)):
            raise TypeError(
                f"trainer_class must be a subclass of lightning_muon.cli.PartitionTrainer, got {trainer_class}."
            )
        self.links = tuple(links)
        super().__init__(
            model_class, datamodule_class, trainer_class=trainer_class, auto_configure_optimizers=False, **kwargs
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ``partition``, with the arguments that the command line does not set."""
        return {**LightningCLI.subcommands(), "partition": {"model", "datamodule"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds Lightning's arguments, the optimizer settings for modules without the mixin, and the links."""
        super().add_core_arguments_to_parser(parser)
        group = parser.add_argument_group("Optimizers of a module without MuonMixin")
        for name, (annotation, text) in _SETTINGS.items():
            group.add_argument(f"--{name}", type=annotation, default=None, help=text)
        model_key = "model.init_args" if self.subclass_mode_model else "model"
        known = parser.get_defaults()
        for name in self.links:
            if self.subclass_mode_model or f"model.{name}" in known:
                parser.link_arguments(f"data.{name}", f"{model_key}.{name}", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Instantiates model, data and trainer, and gives a model without the mixin its optimizer."""
        super().instantiate_classes()
        self._forget_unused_links()
        given = self._given_settings()
        if isinstance(self.model, MuonMixin) and given:
            name = next(iter(given))
            raise ValueError(
                f"--{name} is for modules without MuonMixin, and {type(self.model).__name__} has it: use "
                f"--model.{name} (model.init_args.{name} in YAML). For that, its __init__ has to hand **kwargs to "
                "super().__init__."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer of the configuration, with :class:`UseMuon` for a model without the mixin."""
        given = self._given_settings()
        if self.subcommand == "partition":
            summary = PartitionSummary(given.get("parameter_rules"))
            return self.trainer_class(accelerator="cpu", devices=1, logger=False, callbacks=[summary])
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]
        if not isinstance(self.model, MuonMixin):
            configured = next((callback for callback in callbacks if isinstance(callback, UseMuon)), None)
            if configured is None:
                callbacks.append(configured := _OfCommandLine(**given))
            elif given:
                name = next(iter(given))
                raise ValueError(
                    f"--{name} and the callback UseMuon of trainer.callbacks both set the optimizers. Give {name} to "
                    "one of them."
                )
            configured.attach(self.model)  # a model without configure_optimizers would be refused before the fit
        return super().instantiate_trainer(**{"callbacks": callbacks, **kwargs})

    def _given_settings(self) -> dict[str, Any]:
        settings = {name: self._get(self.config_init, name) for name in _SETTINGS}
        return {name: value for name, value in settings.items() if value is not None}

    def _forget_unused_links(self) -> None:
        """Take linked values that this model has no argument for out of its hyperparameters.

        Where the model class is chosen on the command line, Lightning stores them all the same, and
        ``load_from_checkpoint`` would hand them to ``__init__``.
        """
        if not self.subclass_mode_model:
            return
        for name in self.links:
            if name not in self._get(self.config, "model").init_args:
                self.model.hparams.pop(name, None)
                vars(self.model).get("_hparams_initial", {}).pop(name, None)


_EPILOG = (
    "One more subcommand, `lightning-muon spectra CHECKPOINT...`, shows spectral norms, ranks and condition numbers of "
    "the matrices in checkpoints; its options: `lightning-muon spectra --help`."
)

_SETTINGS: dict[str, tuple[Any, str]] = {
    "matrix_optimizer": (MatrixOptimizerCallable | None, "Optimizer of the hidden matrices; Muon unless given."),
    "other_optimizer": (OptimizerCallable | None, "Optimizer of all other parameters; AdamW unless given."),
    "schedule": (Schedule | None, "Multiplier of all learning rates; constant unless given."),
    "parameter_rules": (list[ParameterRule] | None, "Where parameters go, on top of what is found by itself."),
}


class _OfCommandLine(UseMuon):
    """:class:`UseMuon` with the names that the command line has for its settings."""

    replaced_by = "MuonCLI"
    settings_named = "--matrix_optimizer, --other_optimizer and --schedule"
