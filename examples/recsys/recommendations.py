"""Recommendations of a model as a file, with the titles of the items, and a few of them in print."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table
from rich.text import Text

from examples.recsys.data import PADDING, SequenceDataModule
from examples.recsys.data.counts import counted
from examples.recsys.files import UnfinishedFile
from examples.recsys.models import Recommender
from examples.recsys.models.base import Batch, Recommendations

COLUMNS = ("user", "rank", "item", "title", "score")


class RecommendationWriter(BasePredictionWriter):
    """Writes what ``Trainer.predict`` recommends to a CSV file, one row a recommendation.

    The columns are ``user,rank,item,title,score``: users and items go by their ids in the source of the data, or by
    their numbers from 1 where it has none, ``rank`` counts from 1 for the best. Where a model knows fewer items for a
    user than asked for, the user has fewer rows, with a warning. The file is there when all users are, and not before.

    Several processes write a file each, ``rank0.<name>``, ``rank1.<name>``, ..., which have every user once in all.

    The callback does nothing but in ``predict``. There ``return_predictions=False`` spares the memory.

    Args:
        path: where the file goes; its folder is made. Gzipped if it ends in ``.gz``.
        top_k: recommendations a user.
        show: users to print, with as many of the latest items of their history as recommendations; 0 prints nothing.

    Raises:
        ValueError: if ``top_k`` is below 1 or ``show`` below 0.
        TypeError: at the start of ``predict``, if the model is no :class:`Recommender` or there is no
            :class:`SequenceDataModule`, which names users and items.

    Example::

        trainer = Trainer(callbacks=[RecommendationWriter("recommendations.csv.gz")])
        trainer.predict(model, datamodule=data, ckpt_path="best.ckpt", return_predictions=False)
    """

    def __init__(self, path: str = "recommendations.csv", top_k: int = 10, show: int = 3) -> None:
        super().__init__(write_interval="batch")
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {top_k}.")
        if show < 0:
            raise ValueError(f"show must be 0 or more, got {show}.")
        self.path = path
        self.top_k = top_k
        self.show = show
        self._file: _UnfinishedTable | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, Recommender) or not isinstance(data, SequenceDataModule):
            raise TypeError(
                "RecommendationWriter writes what a Recommender says of a SequenceDataModule, got "
                f"{type(pl_module).__name__} and {type(data).__name__}: give both to Trainer.predict."
            )
        pl_module.num_recommendations = self.top_k
        self._users, self._items = data.user_names(), data.item_names()
        # Titles may have to be downloaded, which one process does for all of a node.
        if trainer.local_rank == 0:
            self._titles = data.item_titles()
        trainer.strategy.barrier("titles are there")
        if trainer.local_rank != 0:
            self._titles = data.item_titles()
        self._total = self._short = 0
        self._table = Table("user", "history, latest last", "recommended", title="Recommendations", show_lines=True)
        self._file = _UnfinishedTable(self._path(trainer, f"rank{trainer.global_rank}"))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Recommendations,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        columns = zip(*(column.tolist() for column in (*prediction, batch["seen"])), strict=True)
        for user, items, scores, seen in columns:
            items = [item for item in items if item != PADDING]
            self._total += 1
            self._short += len(items) < self.top_k
            self._file.write(
                (self._users[user], rank, self._items[item - 1], self._titles[item - 1], f"{score:.6g}")
                for rank, (item, score) in enumerate(zip(items, scores, strict=False), start=1)
            )
            if self._table.row_count < self.show:
                history = [item for item in seen if item != PADDING]
                self._table.add_row(self._users[user], self._in_print(history[-self.top_k :]), self._in_print(items))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each process waits for all: no file gets its name where one of them failed.
        counts = torch.tensor([self._total, self._short], device=pl_module.device)
        total, short = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self._file.finish()
        self._file = None
        if not trainer.is_global_zero:
            return
        if short:
            rank_zero_warn(
                f"{counted(short, f'of {total} users has', f'of {total} users have')} fewer than top_k={self.top_k} "
                "recommendations: the model scores no more items that are not left out. A beam search finds more with "
                "more beams."
            )
        console = rich.get_console()
        if self._table.row_count:
            console.print(self._table)
        console.print(
            f"Recommendations for {total} users: {self._path(trainer, 'rank*')}", markup=False, soft_wrap=True
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.discard()
            self._file = None

    def _path(self, trainer: Trainer, rank: str) -> Path:
        path = Path(self.path).expanduser()
        return path if trainer.world_size == 1 else path.with_name(f"{rank}.{path.name}")

    def _in_print(self, items: list[int]) -> Text:
        return Text("\n".join(self._titles[item - 1] for item in items), overflow="ellipsis", no_wrap=True)


class _UnfinishedTable:
    """A CSV file that gets its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self.whole = UnfinishedFile(path)
        self.file = self.whole.open_text()
        self.rows = csv.writer(self.file)
        self.rows.writerow(COLUMNS)

    def write(self, rows: Any) -> None:
        self.rows.writerows(rows)

    def finish(self) -> None:
        self.file.close()
        self.whole.finish()

    def discard(self) -> None:
        self.file.close()
        self.whole.discard()
