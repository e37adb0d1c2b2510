"""MuonCLI: LightningCLI for modules with or without MuonMixin, and the console script ``lightning-muon``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_type_hints

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_muon.callbacks import PartitionSummary
from lightning_muon.command_line import (
    MuonArgumentParser,
    SaveConfigBeside,
    check_namespace,
    short_faults,
    unregistered_name,
)
from lightning_muon.command_line.parser import TRAINER_TITLE, setting_help
from lightning_muon.diagnostics import spectra
from lightning_muon.mixin import MuonMixin
from lightning_muon.settings import SETTINGS
from lightning_muon.use_muon import UseMuon


def main(args: ArgsType = None) -> None:
    """Run the console script ``lightning-muon``: :class:`MuonCLI` for modules installed or in the current directory.

    The subcommand ``spectra`` shows statistics of the singular values in checkpoints. It needs no model.

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
        MuonCLI(args=args, parser_kwargs={"prog": "lightning-muon", "description": _DESCRIPTION, "epilog": _EPILOG})


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
      ``model.``, and its own ``configure_optimizers`` is replaced (:class:`UseMuon`).
    * Classes of this package may be given by name: ``--model.matrix_optimizer NorMuon``.
    * ``fit`` prints the partition, unless ``--trainer.enable_model_summary false``; ``partition`` prints it and exits.
    * Arguments of an optimizer without its class are those of Muon, or of AdamW for ``other_optimizer``:
      ``--model.matrix_optimizer.lr 3e-3``.
    * Plain ``LightningCLI``'s ``--optimizer`` and ``--lr_scheduler`` are not there.
    * An error in the command line is reported in a few lines, with similar names and exit code 2. An error that the
      package or Lightning raises later, e.g. for a rule that matches nothing, is printed as one ``error: ...`` with
      exit code 1. With ``args`` it is raised instead. ``LIGHTNING_MUON_FULL_ERRORS=1`` shows the full report.
    * Without a logger, all runs share a folder. If it has the ``config.yaml`` of an earlier run, the config of this run
      is saved as ``config-v1.yaml``.

    Args:
        model_class: as in ``LightningCLI``; None takes the class from ``--model``.
        datamodule_class: as in ``LightningCLI``; None takes the class from ``--data``.
        links: names of attributes of the data module that models take as arguments, e.g. ``["num_items"]``. If the
            model takes the argument and the data module has the attribute, the attribute overrides any value that is
            given for the argument.
        trainer_class: subclass of :class:`PartitionTrainer`.
        **kwargs: as in ``LightningCLI``, without ``auto_configure_optimizers``. ``parser_class`` is
            :class:`~lightning_muon.command_line.MuonArgumentParser` and ``save_config_callback``
            :class:`~lightning_muon.command_line.SaveConfigBeside` unless given.

    Raises:
        TypeError: if ``trainer_class`` is not a :class:`PartitionTrainer`, or if the model or data module is a class of
            the package ``pytorch_lightning``.
        ValueError: if ``--matrix_optimizer`` and the like are given for a module that has the mixin.

    Example::

        MuonCLI(SASRec, SyntheticSequences, links=["num_items"])
    """

    refusing_packages: ClassVar[Sequence[str]] = ("lightning_muon", "lightning", "torch.optim")
    """Packages that check their arguments: errors that they raise are printed without a traceback."""

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
        check_namespace(model_class)
        check_namespace(datamodule_class)
        self.links = tuple(links)
        settings = {"parser_class": MuonArgumentParser, "save_config_callback": SaveConfigBeside, **kwargs}
        with short_faults(self.refusing_packages, ends=kwargs.get("args") is None):
            super().__init__(
                model_class, datamodule_class, trainer_class=trainer_class, auto_configure_optimizers=False, **settings
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ``partition``, with the arguments that the command line does not set."""
        return {**LightningCLI.subcommands(), "partition": {"model", "datamodule"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds Lightning's arguments, the optimizer settings for modules without the mixin, and the links."""
        super().add_core_arguments_to_parser(parser)
        group = parser.add_argument_group("Optimizers of a module without MuonMixin")
        annotations = get_type_hints(UseMuon.__init__)
        for name in SETTINGS:
            group.add_argument(f"--{name}", type=annotations[name], default=None, help=setting_help(name))
        if isinstance(parser, MuonArgumentParser):
            parser.add_plain_options()
        groups = parser.groups or {}
        groups["trainer"].title = TRAINER_TITLE  # the default titles are first lines of docstrings
        if self.subclass_mode_model:
            groups["model"].title = "Model"
        if self.subclass_mode_data:
            groups["data"].title = "Data"
        model_key = "model.init_args" if self.subclass_mode_model else "model"
        known = parser.get_defaults()
        for name in self.links:
            if self.subclass_mode_model or f"model.{name}" in known:
                parser.link_arguments(f"data.{name}", f"{model_key}.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments, and rejects an unknown strategy or accelerator."""
        super().parse_arguments(parser, args)
        settings = self.config.get(self.config.get("subcommand") or "", self.config)
        if sentence := unregistered_name(settings.get("trainer") or {}):
            parser.error(sentence)

    def instantiate_classes(self) -> None:
        """Instantiates model, data and trainer, and gives a model without the mixin its optimizer."""
        super().instantiate_classes()
        self._forget_unused_links()
        given = self._given_settings()
        if isinstance(self.model, MuonMixin) and given:
            name, kind = next(iter(given)), type(self.model).__name__
            config = self._get(self.config, "model")
            arguments = config.init_args if self.subclass_mode_model else config
            needed = (
                "" if name in arguments else f" For that, {kind}.__init__ has to pass **kwargs to super().__init__."
            )
            key = f"model.init_args.{name}" if self.subclass_mode_model else f"model.{name}"
            raise ValueError(
                f"--{name} is for modules without MuonMixin, and {kind} has it: use --model.{name} ({key} in YAML)."
                + needed
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiates the configured Trainer, with :class:`UseMuon` for a model without the mixin."""
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
        settings = {name: self._get(self.config_init, name) for name in SETTINGS}
        return {name: value for name, value in settings.items() if value is not None}

    def _forget_unused_links(self) -> None:
        """Remove linked values from the hyperparameters if this model has no argument for them.

        If the model class is chosen on the command line, Lightning stores them anyway, and ``load_from_checkpoint``
        would pass them to ``__init__``.
        """
        if not self.subclass_mode_model:
            return
        for name in self.links:
            if name not in self._get(self.config, "model").init_args:
                self.model.hparams.pop(name, None)
                vars(self.model).get("_hparams_initial", {}).pop(name, None)


_DESCRIPTION = "Train a LightningModule with Muon and its relatives; show its partition and the spectra of checkpoints."

_EPILOG = (
    "One more subcommand, `lightning-muon spectra CHECKPOINT...`, shows spectral norms, ranks and condition numbers of "
    "the matrices in checkpoints. `lightning-muon spectra --help` shows its options."
)


class _OfCommandLine(UseMuon):
    """:class:`UseMuon` whose messages use the command line's names for its settings."""

    replaced_by = "MuonCLI"
    settings_named = "--matrix_optimizer, --other_optimizer and --schedule"
