"""Modules, optimizers and Trainers off the beaten track: a monitor says what it cannot show, and ends no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_muon import HybridOptimizer
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from lightning_muon.callbacks import spectral_monitor as spectral_monitor_module
from lightning_muon.diagnostics import probe
from lightning_muon.diagnostics.updates import UpdateCapture
from tests.callbacks.monitor_runs import Plain, Recorder, table_rows, watched
from tests.lightning_helpers import Bare, Items, Net, fit

QUIETLY: dict[str, Any] = {"print_table": False, "plot": False}


class Manual(Bare):
    """Steps at every second batch only."""

    def __init__(self, phase: int = 0, use_pl_optimizer: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.phase = phase
        self.use_pl_optimizer = use_pl_optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.use_pl_optimizer)
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2 == self.phase:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("phase", [0, 1])
def test_manual_accumulation_is_measured_at_the_next_step_of_an_optimizer(phase: int) -> None:
    monitor = EffectiveRankMonitor(every_n_steps=4, spectrum_every_n_steps=4, **QUIETLY)
    fit(Manual(phase), Items(16), callbacks=[monitor], max_steps=-1, max_epochs=1)
    assert len(monitor.histories["update_stable_rank"]) >= 3
    assert monitor.histories["update_effective_rank"].steps == monitor.histories["update_stable_rank"].steps


def test_steps_that_do_not_go_through_lightning_are_missed_with_a_warning() -> None:
    monitor = SpectralNormMonitor(every_n_steps=2, **QUIETLY)
    with pytest.warns(UserWarning, match="use_pl_optimizer=False"):
        fit(Manual(use_pl_optimizer=False), Items(8), callbacks=[monitor], max_steps=-1, max_epochs=1)


def test_a_run_shorter_than_the_interval_ends_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="every_n_steps is 50"):
        fit(Plain(), callbacks=[SpectralNormMonitor(every_n_steps=50, **QUIETLY)])
    with pytest.warns(UserWarning, match="effective_rank.*spectrum_every_n_steps is 50"):
        fit(Plain(), callbacks=[EffectiveRankMonitor(every_n_steps=1, spectrum_every_n_steps=50, **QUIETLY)])


class Odd(Bare):
    """With parameters that no matrix optimizer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Embedding(5, 4, sparse=True)
        self.phase = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
        self.parameter_rules = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.sparse.weight.sum() + self.phase.abs().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters(), lr=0.1)


def test_parameters_that_no_matrix_optimizer_takes_hide_nothing_else() -> None:
    _, recorder = watched(Odd(), [SpectralNormMonitor(per_parameter=True, **QUIETLY)])
    names = {key.removeprefix("spectral_norm/") for _, key in recorder.values()}
    assert names == {"mean", "max", "layers.up.weight", "layers.down.weight"}


class Halves(pl.LightningModule):
    """Two parts; a hybrid trains one of them."""

    def __init__(self, hybrid: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Net().layers, Net().layers
        self.hybrid = hybrid

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, layers in zip(self.optimizers(), (self.first, self.second), strict=True):
            self.manual_backward(layers(batch[0]).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first = HybridOptimizer.from_module(self.first) if self.hybrid else AdamW(self.first.parameters())
        return [first, AdamW(self.second.parameters())]


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_hybrid_of_one_part_does_not_hide_the_other(hybrid: bool) -> None:
    _, recorder = watched(Halves(hybrid), [SpectralNormMonitor(per_parameter=True, **QUIETLY)])
    names = {key.removeprefix("spectral_norm/") for _, key in recorder.values()} - {"mean", "max"}
    assert names == {f"{part}.{layer}.weight" for part in ("first", "second") for layer in ("up", "down")}


def test_instances_that_differ_in_their_limits_coexist() -> None:
    narrow = EffectiveRankMonitor(1, spectrum_every_n_steps=1, max_spectra=1, **QUIETLY)
    wide = EffectiveRankMonitor(1, spectrum_every_n_steps=1, **QUIETLY)
    with pytest.warns(UserWarning, match="effective_rank, update_effective_rank of 1 of 2 matrices"):
        watched(Plain(), [narrow, wide])
    assert (len(narrow.histories["effective_rank"].names), len(wide.histories["effective_rank"].names)) == (1, 2)


def test_a_prefix_is_a_string() -> None:
    with pytest.raises(MisconfigurationException, match="prefix must be a string, got None"):
        SpectralNormMonitor(prefix=None)


def test_nothing_left_to_watch_is_said_by_its_cause() -> None:
    with pytest.warns(UserWarning, match="include and exclude leave nothing"):
        fit(Plain(), callbacks=[SpectralNormMonitor(exclude=["*"], **QUIETLY)])


def test_figures_reach_tensorboard_behind_a_logger_without_a_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = TensorBoardLogger(tmp_path)
    monitor = SpectralNormMonitor(every_n_steps=1, print_table=False)
    fit(Plain(), callbacks=[monitor], logger=[Recorder(), boards], max_steps=2)
    events = EventAccumulator(boards.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["spectral/spectral_norm"]


def test_what_can_not_be_shown_does_not_hide_why_a_fit_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise ValueError("the real error")
            return super().training_step(batch, batch_idx)

    def fail(*_: Any) -> None:
        raise RuntimeError("no pen")

    monkeypatch.setattr(spectral_monitor_module, "show_run", fail)
    with pytest.warns(UserWarning, match="no pen"), pytest.raises(ValueError, match="the real error"):
        fit(Fails(), callbacks=[SpectralNormMonitor(every_n_steps=1, **QUIETLY)])


def test_a_development_run_without_a_logger_writes_nothing(tmp_path: Path) -> None:
    monitor = SpectralNormMonitor(every_n_steps=1, print_table=False)
    fit(Plain(), callbacks=[monitor], fast_dev_run=2, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_epoch_is_enough_for_an_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    class Grows(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.layers.up.weight.mul_(2.0)

    fit(Grows(), callbacks=[SpectralNormMonitor(every_n_steps=1, plot=False)], max_epochs=1)
    assert "spectral_norm of layers.up.weight doubled" in " ".join(capsys.readouterr().out.split())


def test_stacks_are_cut_where_they_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither values nor names depend on how matrices are stacked."""
    _, whole = watched(Net(), [SpectralNormMonitor(include=["*"], per_parameter=True, **QUIETLY)])
    monkeypatch.setattr(probe, "MAX_STACK_ELEMENTS", 1)
    _, single = watched(Net(), [SpectralNormMonitor(include=["*"], per_parameter=True, **QUIETLY)])
    assert {key for _, key in single.values()} == {key for _, key in whole.values()}


class Decaying(SGD):
    """Takes away a part of the weights besides the update."""

    options: dict[str, Any]

    def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group.update(weight_decay=0.0, decay=weight_decay * self.options["factor"])

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - group["decay"])
            group.update(weight_decay=0.0)
        return super().step(closure)


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("MyAdamW", {}, 0.1),  # decoupled by its name: lr * weight_decay
        ("Lion", {}, 0.1),
        ("Own", {"weight_decouple": True}, 0.1),
        ("Own", {"weight_decouple": True, "fixed_decay": True}, 1.0),
        ("Own", {"decoupled_weight_decay": True}, 0.1),
        ("Own", {"weight_decouple": False}, 0.0),
    ],
)
def test_decay_is_taken_out_as_the_optimizer_says(name: str, options: dict[str, Any], factor: float) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.randn(4, 3)
    kind = type(name, (Decaying,), {"options": {"factor": factor}, "__module__": "elsewhere"})
    optimizer = kind([weight], lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0].update(weight_decay=0.5, **options)
    capture = UpdateCapture(optimizer, {weight})
    optimizer.step()
    capture.close()
    assert not capture.unknown
    torch.testing.assert_close(capture.differences[weight], 0.1 * weight.grad)


@pytest.mark.parametrize("optimizer", ["Prodigy", "AdamWScheduleFree"])
def test_decay_that_is_not_known_how_it_works_stays_with_a_warning(optimizer: str) -> None:
    import pytorch_optimizer
    import schedulefree

    kind = getattr(pytorch_optimizer, optimizer, None) or getattr(schedulefree, optimizer)

    class Module(Bare):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return kind(self.parameters(), lr=0.1, weight_decay=0.1)

        def on_train_batch_start(self, *_: Any) -> None:
            train = getattr(self.trainer.optimizers[0], "train", None)
            if train is not None:
                train()

    with pytest.warns(UserWarning, match=f"How {optimizer} decays the weights is not known"):
        fit(Module(), callbacks=[UpdateOrthogonalityMonitor(every_n_steps=1, **QUIETLY)])


def test_files_say_what_was_measured(tmp_path: Path) -> None:
    fit(
        Plain(),
        callbacks=[SpectralNormMonitor(every_n_steps=1, prefix="run/", print_table=False, plot=False)],
        default_root_dir=tmp_path,
    )
    assert {row["quantity"] for row in table_rows(tmp_path)} == {"run/spectral_norm"}
    assert (tmp_path / "spectral" / "run_spectral_norm.csv").exists()
