"""Train and judge a recommender: ``python -m examples.recsys fit --config configs/sasrec_synthetic.yaml``.

After ``fit`` the best checkpoint is tested, and the popularity baseline beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import rich
from lightning import Trainer
from lightning.pytorch.cli import ArgsType
from rich.table import Table

from examples.recsys.data import SequenceDataModule
from examples.recsys.models import Popularity, Recommender
from lightning_muon import MuonCLI


class RecommenderCLI(MuonCLI):
    """:class:`lightning_muon.MuonCLI` that tests the best checkpoint and the popularity baseline after ``fit``.

    They are then in ``test_metrics`` and ``baseline_metrics``.
    """

    test_metrics: Mapping[str, float]
    baseline_metrics: Mapping[str, float]

    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:
            return
        callback = self.trainer.checkpoint_callback
        best = "best" if callback is not None and callback.best_model_path else None
        (metrics,) = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        baseline = popularity_metrics(self.trainer, self.datamodule)
        self.test_metrics, self.baseline_metrics = metrics, baseline
        if self.trainer.is_global_zero:
            rich.get_console().print(comparison(type(self.model).__name__, metrics, baseline))


def popularity_metrics(trainer: Trainer, data: SequenceDataModule) -> Mapping[str, float]:
    """Test metrics of the popularity baseline. All processes of the Trainer take part; its loggers are not told."""
    loggers, trainer.loggers = trainer.loggers, []
    try:
        (metrics,) = trainer.test(Popularity(data.num_items), datamodule=data, verbose=False)
    finally:
        trainer.loggers = loggers
    return metrics


def comparison(name: str, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> Table:
    """A row a test metric: the model, the baseline and how many times as much the model has."""
    table = Table("test metric", name, "popularity", "ratio", title="Test of the best checkpoint")
    for key, value in metrics.items():
        ratio = f"{value / baseline[key]:.1f}" if baseline[key] else "-"
        table.add_row(key.removeprefix("test/"), f"{value:.4f}", f"{baseline[key]:.4f}", ratio)
    return table


def main(args: ArgsType = None) -> RecommenderCLI:
    """Run the command line, or ``args`` in its place."""
    return RecommenderCLI(
        Recommender,
        SequenceDataModule,
        links=["num_items", "max_length", "mask_history"],
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
    )


if __name__ == "__main__":
    main()
