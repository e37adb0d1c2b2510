"""The table that monitors print at the end of an epoch, its alarms, and values that are not finite."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor
from tests.callbacks.monitor_runs import QUANTITIES, Plain, Recorder, monitors, table_rows, watched
from tests.lightning_helpers import Net, fit

EPOCHS = {"max_steps": -1, "max_epochs": 3, "log_every_n_steps": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """What is printed on Rich's shared console."""
    shown = io.StringIO()
    rich.reconfigure(file=shown, width=140)
    yield shown
    rich.reconfigure()


# Table


def test_the_table_is_printed_at_the_end_of_each_epoch(console: io.StringIO) -> None:
    fit(Net(), callbacks=[EffectiveRankMonitor(every_n_steps=1, plot=False)], logger=Recorder(), **EPOCHS)
    printed = console.getvalue()
    for quantity in ("stable_rank", "participation_ratio", "update_participation_ratio"):
        assert printed.count(quantity) >= 3, quantity
    assert "layers.up.weight" in printed or "layers.down.weight" in printed


def test_each_monitor_has_its_table(console: io.StringIO) -> None:
    fit(
        Net(),
        callbacks=monitors(every_n_steps=5, spectrum_every_n_steps=5, print_table=True),
        logger=Recorder(),
        **EPOCHS,
    )
    printed = console.getvalue()
    for quantity in QUANTITIES:
        assert printed.count(quantity) >= 3, quantity


def test_the_table_comes_without_loggers_too(console: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(), callbacks=[SpectralNormMonitor(every_n_steps=1, plot=False)], logger=False, **EPOCHS)
    assert console.getvalue().count("spectral_norm") >= 3


@pytest.mark.parametrize(
    ("logger", "per_parameter", "where"),
    [
        (False, False, "spectral/*.csv at the end of the fit."),
        ("tensorboard", False, "figures at the end of the fit; per_parameter=True logs them."),
        ("memory", True, "logged to Recorder."),
    ],
)
def test_the_table_says_where_all_values_are(
    logger: Any, per_parameter: bool, where: str, console: io.StringIO, folder: Path
) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard")
    loggers = {"tensorboard": TensorBoardLogger(folder), "memory": Recorder(folder)}
    callback = SpectralNormMonitor(every_n_steps=5, plot=False, per_parameter=per_parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(), callbacks=[callback], logger=loggers.get(logger, False), **EPOCHS)
    assert mentions(console.getvalue(), "All 2 matrices:", where)


def test_the_table_can_be_turned_off(console: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=1, print_table=False), **EPOCHS)
    assert console.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_an_epoch_without_measurements_prints_no_table(console: io.StringIO) -> None:
    callbacks = monitors(every_n_steps=8, spectrum_every_n_steps=8, print_table=True)
    watched(Net(), callbacks, max_steps=-1, max_epochs=1)
    assert console.getvalue().strip() == ""


def test_the_table_goes_with_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = monitors(every_n_steps=1, print_table=True)
    watched(Net(), callbacks, enable_progress_bar=True, **EPOCHS)
    assert capsys.readouterr().out.count("update_orthogonality_error") >= 3


# Alarms


class Changing(Plain):
    """Barely trains; its matrix ``up`` is changed by a function when the second of three epochs starts."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.change = change

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.change is not None:
            with torch.no_grad():
                self.layers.up.weight.copy_(self.change(self.layers.up.weight))


def tables(console: io.StringIO, module: pl.LightningModule, callback: pl.Callback) -> list[str]:
    """What each of three epochs printed."""
    printed: list[str] = []

    class Cut(pl.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            printed.append(console.getvalue()[sum(map(len, printed)) :])

    fit(module, callbacks=[callback, Cut()], logger=Recorder(), **EPOCHS)
    assert console.getvalue() == "".join(printed)
    return printed


def mentions(text: str, *words: str) -> bool:
    """Whether all words stand in the text, in this order, whatever the line breaks."""
    rest = " ".join(text.split())
    for word in words:
        if word not in rest:
            return False
        rest = rest.split(word, 1)[1]
    return True


def test_a_norm_that_doubles_between_tables_raises_an_alarm_once(console: io.StringIO) -> None:
    module = Changing(lambda weight: 2.5 * weight)
    first, second, third = tables(console, module, SpectralNormMonitor(every_n_steps=1, plot=False))
    assert mentions(second, "spectral_norm", "layers.up.weight", "doubled")
    assert "doubled" not in first
    assert "doubled" not in third
    assert not mentions(second, "layers.down.weight doubled")


def test_a_rank_that_halves_between_tables_raises_an_alarm(console: io.StringIO) -> None:
    module = Changing(lambda weight: weight[:, :1] @ weight[:1, :])
    _, second, third = tables(console, module, EffectiveRankMonitor(every_n_steps=1, plot=False))
    assert mentions(second, "participation_ratio", "layers.up.weight", "halved")
    assert "halved" not in third


def test_a_change_below_the_alarm_is_quiet(console: io.StringIO) -> None:
    module = Changing(lambda weight: 1.5 * weight)
    printed = tables(console, module, SpectralNormMonitor(every_n_steps=1, plot=False))
    assert not any("doubled" in text for text in printed)
    assert "+50" in printed[1]


def test_another_fit_is_not_compared_with_the_last_table_of_this_one(console: io.StringIO) -> None:
    callbacks: list[pl.Callback] = [SpectralNormMonitor(every_n_steps=5, plot=False)]
    first, second = Changing(), Changing()
    with torch.no_grad():
        second.layers.up.weight.copy_(3 * first.layers.up.weight)
    watched(first, callbacks)
    watched(second, callbacks)
    assert console.getvalue().count("spectral_norm") == 2
    assert "doubled" not in console.getvalue()
    assert "%" not in console.getvalue()


# Weights that are not finite


class Unused(Plain):
    """Has a matrix that takes no part in the loss and becomes NaN after the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.spare = nn.Linear(8, 16)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.layers.spare.weight.detach()[3, 4] = math.nan


def test_a_matrix_with_nan_is_told_apart_and_training_goes_on(console: io.StringIO, folder: Path) -> None:
    module, recorder = Unused(), Recorder(folder)
    callbacks = monitors(every_n_steps=1, spectrum_every_n_steps=1, per_parameter=True, plot=True, print_table=True)
    fitted = fit(module, callbacks=callbacks, logger=recorder, **EPOCHS)
    assert fitted.global_step == 15
    spare, others = [], []
    for (step, key), value in recorder.values().items():
        if key.endswith("/layers.spare.weight"):
            spare.append((step, key, value))
        elif key.endswith(".weight"):
            others.append(value)
    assert all(map(math.isfinite, others))
    of_weights = [(step, value) for step, key, value in spare if not key.startswith("update_")]
    assert {step for step, _ in of_weights} == set(range(15))
    assert all(math.isnan(value) if step >= 5 else math.isfinite(value) for step, value in of_weights)
    assert mentions(console.getvalue(), "layers.spare.weight", "finite") or mentions(console.getvalue(), "spare", "nan")


class Diverging(Plain):
    """All weights become NaN at the third step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            self.layers.up.weight.detach()[0, 0] = math.nan


def test_a_fit_that_diverges_is_watched_to_its_end(console: io.StringIO, folder: Path) -> None:
    callbacks = monitors(every_n_steps=1, spectrum_every_n_steps=1, plot=True, print_table=True)
    fitted, recorder = watched(Diverging(), callbacks, logger=Recorder(folder), **EPOCHS)
    assert fitted.global_step == 15
    values = recorder.values()
    assert math.isfinite(values[1, "spectral_norm/max"])
    for key in ("spectral_norm/max", "stable_rank/min", "update_orthogonality_error/mean", "effective_rank/mean"):
        assert math.isnan(values[14, key]), key
    assert mentions(console.getvalue(), "layers.up.weight", "finite") or mentions(console.getvalue(), "up", "nan")
    assert table_rows(folder)


def test_figures_of_infinite_values_are_drawn(folder: Path) -> None:
    """A zero matrix has an infinite condition number, a matrix of infinities no norm."""
    module = Unused()
    with torch.no_grad():
        module.layers.down.weight.zero_()
        module.layers.spare.weight.fill_(math.inf)
    callbacks = monitors(every_n_steps=1, spectrum_every_n_steps=1, plot=True)
    fitted, _ = watched(module, callbacks, logger=Recorder(folder), max_steps=3)
    assert fitted.global_step == 3
    assert table_rows(folder)
