r"""Make semantic ids, by configs for how and of what that combine in any order::

    python -m examples.recsys.semantic_ids fit \
        -c configs/semantic_ids/rqvae.yaml -c configs/semantic_ids/features/synthetic.yaml

``fit`` trains an RQ-VAE and writes the codes of its best checkpoint; ``kmeans`` makes them by RQ-k-means of the
features, with the levels and codebook size of the model, and trains nothing. Which checkpoint is best the monitor of
``ModelCheckpoint`` decides: with ``val/collisions``, as in the configurations, one that reconstructs worse wins if
fewer items share their codes, and of several with as many collisions the one that explains most of the variance.

A warning tells where the codes that are written explain little of the features: less than half of what RQ-k-means of
the same features, levels and codebook size explains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rich
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.table import Table
from torch import Tensor

from examples.recsys.runs import RunCLI, RunParser
from examples.recsys.semantic_ids.codes import SemanticIds
from examples.recsys.semantic_ids.collisions import add_collision_digit, balance_last_level
from examples.recsys.semantic_ids.features import ItemFeatures
from examples.recsys.semantic_ids.kmeans import residual_kmeans
from examples.recsys.semantic_ids.quality import (
    SHARE_OF_KMEANS,
    QuantizationQuality,
    complaint,
    kmeans_explained,
)
from examples.recsys.semantic_ids.quantization import Quantization
from examples.recsys.semantic_ids.rqvae import RQVAE
from lightning_muon import MuonCLI
from lightning_muon.cli import PartitionTrainer


@dataclass
class CodesFile:
    """Where codes go, and how items with the same codes are told apart.

    Args:
        path: a CSV file ``item,c1,c2,...``, items from 1; gzipped if it ends in ``.gz``. Missing folders are made.
        uniqueness: ``digit``: one more level counts items with the same codes; a warning tells where that takes more
            codes than a level has. ``sinkhorn``: they share out the codes of the last level. ``none``: they keep their
            codes, and count as hits of each other.
    """

    path: str = "semantic_ids/codes.csv"
    uniqueness: Literal["digit", "sinkhorn", "none"] = "digit"

    def unique(self, quantization: Quantization) -> Tensor:
        """Codes (N, levels or one more)."""
        if self.uniqueness == "digit":
            codes = add_collision_digit(quantization.codes)
            _warn_of_large_digits(int(codes[:, -1].max()) + 1, quantization.codebooks.shape[1])
            return codes
        if self.uniqueness == "sinkhorn":
            return balance_last_level(quantization.codes, quantization.last_level_distances())
        return quantization.codes


def _warn_of_large_digits(largest_group: int, codebook_size: int) -> None:
    if largest_group > codebook_size:
        rank_zero_warn(
            f"{largest_group} items have the same codes, so that the digit needs {largest_group} codes and each level "
            f"of a recommender's vocabulary grows from {codebook_size} to as many: take features that tell these items "
            f"apart, more levels or a larger codebook_size (from {largest_group} on, codes.uniqueness=sinkhorn can "
            "spare the digit)."
        )


class KMeansTrainer(PartitionTrainer):
    """A Trainer whose method ``kmeans`` is a subcommand. Its result is in ``quantization``."""

    quantization: Quantization

    def kmeans(self, model: RQVAE, datamodule: ItemFeatures, max_iterations: int = 100, seed: int = 0) -> None:
        """RQ-k-means of the features, with the levels and codebook size of the model; nothing is trained.

        Args:
            model: says how many levels and codes there are.
            datamodule: the features.
            max_iterations: of Lloyd's algorithm a level.
            seed: decides the first centroids.
        """
        datamodule.prepare_data()
        features = datamodule.features().to(self.strategy.root_device)
        codes, codebooks = residual_kmeans(features, model.levels, model.codebook_size, max_iterations, seed)
        self.quantization = Quantization(features, codes, codebooks)


class SemanticIdsParser(RunParser):
    """Names runs after the file of codes, as ``RQVAE_beauty``."""

    @staticmethod
    def run_name(settings: Namespace) -> str:
        return f"RQVAE_{Path(settings.codes.path).name.partition('.')[0]}"


class SemanticIdsCLI(RunCLI):
    """:class:`lightning_muon.MuonCLI` that writes codes after ``fit`` and ``kmeans``; they are then in ``ids``."""

    ids: SemanticIds

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of :class:`lightning_muon.MuonCLI`, and ``kmeans``."""
        return {**MuonCLI.subcommands(), "kmeans": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--codes.path`` and ``--codes.uniqueness``."""
        parser.add_class_arguments(CodesFile, "codes")

    def before_fit(self) -> None:
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and (callback.monitor, callback.mode) == ("val/collisions", "min"):
                # By itself it would keep the first of several that are equal, which is trained least.
                callback.monitor = "val/collisions_and_error"
                rank_zero_info("Of checkpoints with equal val/collisions the one with the best val/explained is kept.")

    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:
            return
        callback = self.trainer.checkpoint_callback
        if callback is not None and callback.best_model_path:
            self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path="best", verbose=False)
        model = self.model.eval()
        features = self.datamodule.features().to(model.device)
        self._write(model.quantize(features), features, model.decode)

    def after_kmeans(self) -> None:
        quantization = self.trainer.quantization
        self._write(quantization, quantization.vectors, quantization.sums)

    def _write(self, quantization: Quantization, features: Tensor, decode: Callable[[Tensor], Tensor]) -> None:
        if not self.trainer.is_global_zero:
            return
        file: CodesFile = self._get(self.config_init, "codes")
        unique = file.unique(quantization)
        self.ids = SemanticIds(unique.cpu())
        self.ids.write(file.path)
        levels, size = quantization.codebooks.shape[:2]
        reports = []
        for codes in (quantization.codes, unique):
            quality = QuantizationQuality(features.shape[1], size, sync_on_compute=False).to(features.device)
            quality.update(features, decode(codes[:, :levels]), codes)
            reports.append({name: float(value) for name, value in quality.compute().items()})
        table = comparison(f"after {file.uniqueness}", *reports)
        table.title = f"Semantic ids of {self.ids.num_items} items, in {file.path}"
        table.caption = f"{shared_rows(features)} items share all their features with another"
        if file.uniqueness == "digit":
            table.caption += f"; {int((unique[:, -1] > 0).sum())} have a digit above 0"
        rich.get_console().print(table)
        before, after = (report["explained"] for report in reports)
        if min(before, after) < SHARE_OF_KMEANS:  # else k-means can not explain twice as much
            _warn_of_poor_codes(file, before, after, kmeans_explained(features, levels, size))


def comparison(resolved: str, before: dict[str, float], after: dict[str, float]) -> Table:
    """A row a figure of :class:`QuantizationQuality`: of the quantizer's codes, and of those that were written."""
    table = Table("", "quantized", resolved)
    for name, value in after.items():
        text = ".0f" if name == "collisions" else ".4f"
        before_text = format(before[name], text) if name in before else "-"
        table.add_row(_label(name), before_text, format(value, text))
    return table


def _warn_of_poor_codes(file: CodesFile, before: float, after: float, kmeans: float) -> None:
    if complaint_before := complaint(before, kmeans):
        rank_zero_warn(
            f"The codes in {file.path} {complaint_before}: train longer or at another rate, take more levels or a "
            "larger codebook_size, or make codes by the subcommand kmeans."
        )
    elif complaint_after := complaint(after, kmeans):
        rank_zero_warn(
            f"The codes in {file.path} {complaint_after}. Before codes.uniqueness={file.uniqueness} moved items to "
            f"other codes they explained {before:.1%}: take codes.uniqueness=digit."
        )


def shared_rows(features: Tensor) -> int:
    """How many rows (N, D) equal another: no codes of these features tell them apart."""
    _, index, counts = features.unique(dim=0, return_inverse=True, return_counts=True)
    return int((counts[index] > 1).sum())


def _label(name: str) -> str:
    if name.startswith("use_"):
        return f"share of the codes in use, level {name.removeprefix('use_')}"
    return {
        "reconstruction": "mean squared error of a feature",
        "explained": "share of the variance explained",
        "collisions": "items that share their codes",
    }[name]


def main(args: ArgsType = None, run: bool = True) -> SemanticIdsCLI:
    """Run the command line, or ``args`` in its place; without ``run`` they have no subcommand, and nothing is run."""
    return SemanticIdsCLI(
        RQVAE,
        ItemFeatures,
        links=["num_features"],
        subclass_mode_data=True,
        trainer_class=KMeansTrainer,
        parser_class=SemanticIdsParser,
        args=args,
        run=run,
    )


if __name__ == "__main__":
    main()
