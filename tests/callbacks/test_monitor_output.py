"""What monitors hand out: logged scalars, figures and CSV files."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from lightning_muon.diagnostics import figures
from tests.callbacks.monitor_runs import CLOCKED, QUANTITIES, Recorder, monitors, table_rows, watched
from tests.lightning_helpers import Net, fit

KINDS = (SpectralNormMonitor, UpdateOrthogonalityMonitor, EffectiveRankMonitor)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own, where nothing but what it writes lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Loggers and files


def test_tensorboard_gets_scalars_and_figures(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(folder, name="run", version=0)
    callbacks = monitors(every_n_steps=2, spectrum_every_n_steps=4, plot=True)
    fit(Net(), callbacks=callbacks, logger=logger, log_every_n_steps=2, max_steps=9)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert {tag.split("/")[0] for tag in tags["scalars"]} >= QUANTITIES
    assert [event.step for event in events.Scalars("spectral_norm/mean")] == [1, 3, 5, 7]
    assert [event.step for event in events.Scalars("effective_rank/min")] == [3, 7]
    for quantity in ("spectral_norm", "update_orthogonality_error", "stable_rank"):
        assert any(quantity in tag for tag in tags["images"]), tags["images"]
    assert all(name.startswith("run/version_0/") for name in files(folder))


def test_beside_a_csv_logger_figures_and_table_lie_in_its_folder_and_hold_what_was_logged(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    loggers = [CSVLogger(folder, name="run", version=0), Recorder()]
    callbacks = monitors(every_n_steps=2, spectrum_every_n_steps=4, plot=True, per_parameter=True)
    fit(Net(), callbacks=callbacks, logger=loggers, log_every_n_steps=2, max_steps=9)
    header = (folder / "run/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"spectral_norm/mean", "spectral_norm/layers.up.weight", "update_orthogonality_error/max"} <= set(header)

    written = files(folder) - {"run/version_0/metrics.csv", "run/version_0/hparams.yaml"}
    assert all(name.startswith("run/version_0/spectral/") for name in written), written
    images = [folder / name for name in written if name.endswith(".png")]
    assert len(images) >= 3
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)

    rows = table_rows(folder)
    assert set(rows[0]) == {"step", "quantity", "matrix", "value"}
    assert {row["quantity"] for row in rows} == QUANTITIES
    per_matrix = {
        (step, *key.split("/")): value for (step, key), value in loggers[1].values().items() if "/layers." in key
    }
    table = {(int(row["step"]), row["quantity"], row["matrix"]): float(row["value"]) for row in rows}
    assert table.keys() == per_matrix.keys()
    assert {key[2] for key in table} == {"layers.up.weight", "layers.down.weight"}
    assert {key for key in table if key[1] in CLOCKED and key[0] not in (3, 7)} == set()
    for key, value in table.items():
        assert value == pytest.approx(per_matrix[key], rel=1e-4), key


def test_aggregates_are_of_the_matrices() -> None:
    _, recorder = watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=2, per_parameter=True))
    values = recorder.values()
    for step, key in list(values):
        quantity, which = key.split("/")
        if which not in ("mean", "max", "min"):
            continue
        each = [values[step, f"{quantity}/layers.{name}.weight"] for name in ("up", "down")]
        expected = {"mean": sum(each) / 2, "max": max(each), "min": min(each)}[which]
        assert values[step, key] == pytest.approx(expected, rel=1e-5), key
    second = {key.split("/")[0]: key.split("/")[1] for _, key in values if key.endswith(("/max", "/min"))}
    assert second == {quantity: "min" if quantity.endswith(("rank", "ratio")) else "max" for quantity in QUANTITIES}


def test_matrices_are_logged_one_by_one_only_on_demand() -> None:
    _, recorder = watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=1))
    assert {key.split("/")[1] for _, key in recorder.values()} == {"mean", "max", "min"}


class Logging(Net):
    """Logs its loss as users do."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_are_logged_at_the_step_of_the_loss(accumulate: int) -> None:
    callbacks = monitors(every_n_steps=2, spectrum_every_n_steps=2)
    settings = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 2}
    fitted, recorder = watched(Logging(), callbacks, max_steps=6, **settings)
    losses = {step for step, row in recorder.rows if "train_loss" in row}
    assert recorder.steps("spectral_norm/mean") == [1, 3, 5]
    assert recorder.steps("update_effective_rank/mean") == [1, 3, 5]
    assert losses == {1, 3, 5}
    last = recorder.values()[5, "spectral_norm/mean"]
    assert fitted.callback_metrics["spectral_norm/mean"].item() == pytest.approx(last)


def test_every_logger_gets_the_values(folder: Path) -> None:
    first, second = Recorder(), Recorder(folder)
    fit(Net(), callbacks=monitors(every_n_steps=1), logger=[first, second], log_every_n_steps=1)
    assert first.values() == second.values()
    assert first.steps("stable_rank/mean") == [0, 1, 2, 3, 4]


def test_a_logger_without_a_folder_will_do(folder: Path) -> None:
    fitted, recorder = watched(Net(), monitors(every_n_steps=1, plot=True), logger=Recorder())
    assert fitted.global_step == 5
    assert recorder.steps("spectral_norm/mean") == [0, 1, 2, 3, 4]


def test_figures_can_be_turned_off(folder: Path) -> None:
    watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=1, plot=False), logger=Recorder(folder))
    assert not [name for name in files(folder) if name.endswith(".png")]


@pytest.mark.parametrize("plot", [True, False])
def test_beside_a_logger_that_shows_figures_no_file_is_written(plot: bool, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(folder, name="run", version=0)
    fit(Net(), callbacks=monitors(every_n_steps=1, plot=plot), logger=logger, log_every_n_steps=1)
    assert not [name for name in files(folder) if name.endswith((".png", ".csv"))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_monitor_alone_writes_its_figures(kind: type[pl.Callback], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    watched(Net(), [kind(every_n_steps=2, print_table=False)], logger=Recorder(folder))
    assert [name for name in files(folder) if name.startswith("spectral/") and name.endswith(".png")]
    assert table_rows(folder)


def test_without_matplotlib_there_is_one_warning_and_the_csv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched(Net(), monitors(every_n_steps=1, plot=True), logger=Recorder(folder))
    about = [str(warning.message) for warning in caught if "matplotlib" in str(warning.message)]
    assert len(about) == 1, about
    assert not [name for name in files(folder) if name.endswith(".png")]
    assert {row["step"] for row in table_rows(folder)} == {"0", "1", "2", "3", "4"}


class Interrupted(Net):
    """Stopped from the keyboard at its eighth step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 7:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


def test_an_interrupted_fit_still_shows_what_it_measured(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    handler = signal.getsignal(signal.SIGINT)
    callbacks = monitors(every_n_steps=2, spectrum_every_n_steps=2, plot=True)
    try:
        with pytest.raises(SystemExit):
            watched(Interrupted(), callbacks, logger=Recorder(folder), max_steps=20)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert {row["step"] for row in table_rows(folder)} == {"1", "3", "5"}
    assert [name for name in files(folder) if name.endswith(".png")]


class Failing(Net):
    """Ends with an error of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 3:
            raise RuntimeError("no further")
        return super().training_step(batch, batch_idx)


def test_files_that_can_not_be_written_hide_no_error_of_the_user(folder: Path) -> None:
    (folder / "spectral").write_text("in the way")
    with pytest.raises(RuntimeError, match="no further"):
        watched(Failing(), monitors(every_n_steps=1, plot=True), logger=Recorder(folder))
