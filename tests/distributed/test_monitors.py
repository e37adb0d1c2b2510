"""Monitors in two processes: the values of one process, logged, drawn and printed once."""

from __future__ import annotations

import io
import math
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_muon import Muon
from tests.callbacks.monitor_runs import Recorder, monitors, table_rows
from tests.distributed import processes
from tests.lightning_helpers import BATCH, QUIET, Items, Net, assert_same, fit

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LR, DECAY = 0.01, 0.1
SETTINGS = {"every_n_steps": 1, "spectrum_every_n_steps": 2, "per_parameter": True}
SHOWN = {**SETTINGS, "plot": True, "print_table": True}


# What the ranks do


class Sharded(pl.LightningModule):
    """Matrices that two ranks can not share evenly, one of them frozen, one without gradients, one of a single row."""

    def __init__(self, idle: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1)
        )
        self.body[2].weight.requires_grad_(False)
        self.idle = nn.Linear(3, 5).requires_grad_(idle)

    def configure_model(self) -> None:
        for part in (self.body, self.idle):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=DECAY)

    def train_dataloader(self) -> DataLoader:
        inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs), batch_size=2)


class Weights(pl.Callback):
    """Keeps the whole weights after each step; the first entry is before any."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def keep(self, module: pl.LightningModule) -> None:
        self.kept.append({name: whole(parameter) for name, parameter in module.named_parameters()})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.keep(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.keep(module)


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().clone()


def train(
    rank: int, folder: Path, module: pl.LightningModule, callbacks: list[pl.Callback], **kwargs: Any
) -> dict[str, Any]:
    """Fit one rank of two."""
    rich.reconfigure(file=io.StringIO(), width=140)
    seen, recorder = Weights(), Recorder(folder)
    settings = {**QUIET, "logger": recorder, "log_every_n_steps": 1, "devices": 2, "default_root_dir": folder, **kwargs}
    data, checkpoint = settings.pop("datamodule", None), settings.pop("ckpt_path", None)
    trainer = pl.Trainer(**settings, callbacks=[*callbacks, seen])
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return {
        "rank": trainer.global_rank,
        "steps": trainer.global_step,
        "weights": seen.kept,
        "logged": recorder.values(),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "printed": rich.get_console().file.getvalue(),
    }


def muon() -> Net:
    torch.manual_seed(0)
    return Net(matrix_optimizer=partial(Muon, lr=0.02, orthogonalize_dtype="float32"))


class Part(Items):
    """Every second batch."""

    def __init__(self, rank: int) -> None:
        super().__init__(batches=6)
        self.rank = rank

    def train_dataloader(self) -> DataLoader:
        items = self.dataset()
        mine = [index for index in range(len(items)) if index // BATCH % 2 == self.rank]
        return DataLoader(Subset(items, mine), batch_size=BATCH)


class Joint(Items):
    """The batches of both ranks in one."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=2 * BATCH)


def ddp(rank: int, folder: str) -> dict[str, Any]:
    written: list[str] = []

    def note(event: str, args: Any) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(args[0])

    sys.addaudithook(note)
    settings = {"strategy": "ddp", "use_distributed_sampler": False, "max_epochs": 2}
    result = train(rank, Path(folder, "ddp"), muon(), monitors(**SHOWN), datamodule=Part(rank), **settings)
    return {**result, "written": [path for path in written if "spectral" in Path(path).parts]}


def model_parallel(**kwargs: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **kwargs)


def sharded(rank: int, folder: str) -> dict[str, Any]:
    callbacks = monitors(**SHOWN, include=["*.weight"])
    return train(rank, Path(folder, "sharded"), Sharded(), callbacks, strategy=model_parallel(), max_epochs=1)


def sharded_by_default(rank: int, folder: str) -> dict[str, Any]:
    callbacks = monitors(**SETTINGS)
    return train(rank, Path(folder, "default"), Sharded(), callbacks, strategy=model_parallel(), max_epochs=1)


def sharded_alone(rank: int, folder: str) -> dict[str, Any]:
    return train(rank, Path(folder, "alone"), Sharded(), [], strategy=model_parallel(), max_epochs=1)


def sharded_and_resumed(rank: int, folder: str) -> dict[str, Any]:
    """Torch does not load optimizer states of parameters that never had a gradient, so all trained ones have one."""
    place = Path(folder, "resumed")
    saving = ModelCheckpoint(place, "{epoch}", save_top_k=-1, enable_version_counter=False)
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    straight = train(
        rank, place, Sharded(idle=False), [*monitors(**SETTINGS), saving],
        strategy=model_parallel(save_distributed_checkpoint=False), **settings,
    )  # fmt: skip
    resumed = train(
        rank, Path(folder, "again"), Sharded(idle=False), monitors(**SHOWN),
        strategy=model_parallel(save_distributed_checkpoint=False), max_epochs=2, ckpt_path=place / "epoch=0.ckpt",
    )  # fmt: skip
    return {"straight": straight, "resumed": resumed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitors")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs of two processes; processes are slow to start, so all in one."""
    workers = {
        worker.__name__: worker for worker in (ddp, sharded, sharded_by_default, sharded_alone, sharded_and_resumed)
    }
    return processes.run(workers, folder, args=(str(folder),))


# DistributedDataParallel


def test_ddp_logs_the_values_of_one_process(ranks: Any) -> None:
    recorder = Recorder()
    settings = {"logger": recorder, "log_every_n_steps": 1, "max_steps": -1, "max_epochs": 2}
    fit(muon(), Joint(batches=6), callbacks=monitors(**SETTINGS), **settings)
    first, _ = ranks["ddp"]
    alone = recorder.values()
    assert first["steps"] == 6
    assert first["logged"].keys() == alone.keys()
    assert first["logged"] == pytest.approx(alone, rel=5e-3)


def test_ddp_logs_once_and_both_ranks_know_the_values(ranks: Any) -> None:
    first, second = ranks["ddp"]
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["logged"]
    assert not second["logged"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["spectral_norm/max"] == pytest.approx(first["logged"][5, "spectral_norm/max"])


@pytest.mark.parametrize("run", ["ddp", "sharded"])
def test_the_table_is_printed_by_the_first_rank_alone(run: str, ranks: Any) -> None:
    first, second = ranks[run]
    assert "spectral_norm" in first["printed"]
    assert "update_orthogonality_error" in first["printed"]
    assert second["printed"].strip() == ""


def test_files_are_written_by_the_first_rank_alone(ranks: Any, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = ranks["ddp"]
    assert any(path.endswith(".png") for path in first["written"])
    assert any(path.endswith(".csv") for path in first["written"])
    assert second["written"] == []
    for run in ("ddp", "sharded"):
        assert table_rows(folder / run)
        assert list((folder / run / "spectral").glob("*.png"))


# FSDP2 by ModelParallelStrategy


def measured(matrix: Tensor) -> dict[str, float]:
    """The quantities of a matrix, from its singular values in float64."""
    s = torch.linalg.svdvals(matrix.double())
    energy, share = s.square(), s / s.sum()
    deviation = (energy / energy.mean() - 1).norm() / math.sqrt(len(s))
    return {
        "spectral_norm": s[0].item(),
        "orthogonality_error": deviation.item(),
        "condition_number": (s[0] / s.quantile(0.1)).item(),
        "stable_rank": (energy.sum() / energy[0]).item(),
        "participation_ratio": (energy.sum().square() / energy.square().sum()).item(),
        "effective_rank": (-torch.xlogy(share, share).sum()).exp().item(),
    }


OF_WEIGHTS = {"spectral_norm", "stable_rank", "participation_ratio", "effective_rank"}
OF_UPDATES = {"orthogonality_error", "condition_number", "stable_rank", "participation_ratio", "effective_rank"}
CLOCKED = {"condition_number", "effective_rank"}
MOVED = ("body.0.weight", "body.4.weight", "body.6.weight")


def expected(weights: list[dict[str, Tensor]]) -> dict[tuple[int, str], float]:
    """What should be logged of each matrix, given the whole weights before the first and after each step."""
    values = {}
    for step, (before, after) in enumerate(pairwise(weights)):
        due = {name for name in OF_WEIGHTS | OF_UPDATES if step % 2 or name not in CLOCKED}
        for name in (*MOVED, "idle.weight"):
            found = measured(after[name])
            values |= {(step, f"{key}/{name}"): found[key] for key in OF_WEIGHTS & due}
        for name in MOVED:
            found = measured(before[name] * (1 - LR * DECAY) - after[name])
            values |= {(step, f"update_{key}/{name}"): found[key] for key in OF_UPDATES & due}
    return values


def per_matrix(logged: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    return {(step, key): value for (step, key), value in logged.items() if key.endswith(".weight")}


def test_sharded_values_are_those_of_the_whole_matrices(ranks: Any) -> None:
    """Frozen weights are not watched, and a matrix that was not stepped has no update."""
    first, _ = ranks["sharded"]
    assert first["steps"] == 4
    whole_values = expected(first["weights"])
    logged = per_matrix(first["logged"])
    assert logged.keys() == whole_values.keys()
    for key, value in whole_values.items():
        assert logged[key] == pytest.approx(value, rel=0.02, abs=1e-3), key


@pytest.mark.parametrize("run", ["sharded", "sharded_by_default"])
def test_sharded_values_are_known_to_both_ranks_and_logged_once(run: str, ranks: Any) -> None:
    first, second = ranks[run]
    assert first["metrics"] == second["metrics"]
    assert {"spectral_norm/mean", "update_orthogonality_error/max", "stable_rank/min"} <= first["metrics"].keys()
    assert first["logged"]
    assert not second["logged"]


def test_sharded_training_is_not_changed(ranks: Any) -> None:
    for run in ("sharded", "sharded_by_default"):
        for result, alone in zip(ranks[run], ranks["sharded_alone"], strict=True):
            assert_same(result["weights"][-1], alone["weights"][-1])


def test_a_resumed_sharded_fit_logs_what_the_uninterrupted_one_does(ranks: Any) -> None:
    for result in ranks["sharded_and_resumed"]:
        later = {(step, key): value for (step, key), value in result["straight"]["logged"].items() if step >= 4}
        assert result["resumed"]["logged"] == later
        assert result["straight"]["steps"] == result["resumed"]["steps"] == 8
    assert ranks["sharded_and_resumed"][0]["resumed"]["logged"]
