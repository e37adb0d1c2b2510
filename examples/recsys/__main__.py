"""Train and judge a recommender.

Configs combine: first those of model and data, in any order, then those that change their settings::

    python -m examples.recsys fit -c configs/model/sasrec.yaml -c configs/data/beauty.yaml
    python -m examples.recsys fit -c configs/model/sasrec.yaml -c configs/data/beauty.yaml -c configs/optimizer/reg.yaml

A run and its folder are called after model and data, as ``logs/SASRec_Beauty``, unless ``--trainer.logger.name`` says
otherwise. After ``fit`` the best checkpoint is tested, and the popularity baseline beside it.
``predict --ckpt_path best.ckpt`` with the same configuration writes recommendations to a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import rich
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.table import Table

from examples.recsys.data import SequenceDataModule
from examples.recsys.models import Popularity, Recommender
from examples.recsys.recommendations import RecommendationWriter
from examples.recsys.runs import RunCLI, RunParser, settings_of
from examples.recsys.semantic_ids.codes import existing_file
from lightning_muon import MuonCLI

SETTINGS_OF_USE = ("semantic_ids", "num_beams")
"""Arguments of models that may differ from those in training."""

NO_CODES = (
    "A generative recommender needs semantic ids: add the file of the data set in configs/semantic_ids, or give "
    "--model.semantic_ids FILE.csv. MovieLens1M and files of your own have none: take another model, or make them by "
    "`python -m examples.recsys.semantic_ids`."
)


class RecommenderParser(RunParser):
    """Names runs after model and data, as ``SASRec_Beauty``, and says where semantic ids come from."""

    @staticmethod
    def run_name(settings: Namespace) -> str:
        model, data = settings.get("model") or {}, settings.get("data") or {}
        arguments = data.get("init_args") or {}
        source = arguments.get("category") or Path(arguments.get("path") or "").name.partition(".")[0]
        names = model.get("class_path"), source or data.get("class_path")
        return "_".join(name.rpartition(".")[2] for name in names if name)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        missing = re.search(r'are required: semantic_ids\b|"semantic_ids" is required', message)
        super().error(NO_CODES if missing else message, ex)


class RecommenderCLI(RunCLI):
    """:class:`lightning_muon.MuonCLI` that tests the best checkpoint and the popularity baseline after ``fit``.

    They are then in ``test_metrics`` and ``baseline_metrics``. ``predict`` has a :class:`RecommendationWriter`, which
    ``--recommendations.path`` and the like set up. A model with weights is judged and asked only after a fit:
    ``validate``, ``test`` and ``predict`` need ``--ckpt_path``.

    With ``--ckpt_path`` Lightning takes the settings of the model from the checkpoint, whatever else is given. Here
    those that are of use and not of training may be given: ``semantic_ids``, the path of the codes, and ``num_beams``.
    """

    refusing_packages = (*MuonCLI.refusing_packages, "examples")

    test_metrics: Mapping[str, float]
    baseline_metrics: Mapping[str, float]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RecommendationWriter, "recommendations")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        self._given = Namespace()
        if settings_of(self.config).get("ckpt_path"):
            parse = parser.parse_object if isinstance(args, (dict, Namespace)) else parser.parse_args
            self._given = settings_of(parse(args, defaults=False)).get("model") or Namespace()

    def before_instantiate_classes(self) -> None:
        # By now Lightning has replaced the settings of the model by those of the checkpoint.
        model, given = settings_of(self.config).get("model"), self._given
        if given.get("class_path", model.class_path) != model.class_path:
            raise ValueError(
                f"The checkpoint is of {model.class_path}, but {given.class_path} was given: leave the model out, or "
                "give a checkpoint of it."
            )
        for name in SETTINGS_OF_USE:
            if name in given.get("init_args", {}):
                model.init_args[name] = given.init_args[name]
        if codes := model.get("init_args", {}).get("semantic_ids"):
            existing_file(codes)  # here, as jsonargparse would wrap what the model says of it in pages of its own

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand not in (None, "fit"):
            self.save_config_callback = None  # without a logger it would refuse to overwrite that of the fit
        return super().instantiate_trainer(**kwargs)

    def before_validate(self) -> None:
        self._check_trained()

    def before_test(self) -> None:
        self._check_trained()

    def before_predict(self) -> None:
        self._check_trained()
        settings = self.config_init["predict"]
        if settings["return_predictions"] is None:
            settings["return_predictions"] = False  # the file has them, and they would all be kept in memory

    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:
            return
        callback = self.trainer.checkpoint_callback
        best = "best" if callback is not None and callback.monitor and callback.best_model_path else None
        (metrics,) = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        baseline = popularity_metrics(self.trainer, self.datamodule)
        self.test_metrics, self.baseline_metrics = metrics, baseline
        if self.trainer.is_global_zero:
            title = f"Test of the {'best checkpoint' if best else 'weights after the last step'}"
            rich.get_console().print(comparison(title, type(self.model).__name__, metrics, baseline))

    def _check_trained(self) -> None:
        if self.config_init[self.subcommand]["ckpt_path"] is None and any(True for _ in self.model.parameters()):
            raise ValueError(
                f"{self.subcommand} needs --ckpt_path, the checkpoint of a fit: this {type(self.model).__name__} has "
                "random weights."
            )


def popularity_metrics(trainer: Trainer, data: SequenceDataModule) -> Mapping[str, float]:
    """Test metrics of the popularity baseline. All processes of the Trainer take part; its loggers are not told."""
    loggers, trainer.loggers = trainer.loggers, []
    try:
        (metrics,) = trainer.test(Popularity(data.num_items), datamodule=data, verbose=False)
    finally:
        trainer.loggers = loggers
    return metrics


def comparison(title: str, name: str, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> Table:
    """A row a test metric: the model, the baseline and how many times as much the model has."""
    table = Table("test metric", name, "popularity", "ratio", title=title)
    for key, value in metrics.items():
        ratio = f"{value / baseline[key]:.1f}" if baseline[key] else "-"
        table.add_row(key.removeprefix("test/"), f"{value:.4f}", f"{baseline[key]:.4f}", ratio)
    return table


def main(args: ArgsType = None, run: bool = True) -> RecommenderCLI:
    """Run the command line, or ``args`` in its place; without ``run`` they have no subcommand, and nothing is run."""
    return RecommenderCLI(
        Recommender,
        SequenceDataModule,
        links=["num_items", "max_length", "mask_history"],
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=RecommenderParser,
        parser_kwargs={"prog": "python -m examples.recsys", "description": "Train and judge recommenders."},
        args=args,
        run=run,
    )


if __name__ == "__main__":
    main()
