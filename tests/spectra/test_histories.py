"""What monitors had measured in a run is drawn from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor
from lightning_muon.callbacks.history import History
from lightning_muon.spectra import command
from tests.lightning_helpers import Net, fit
from tests.spectra.commands import refusal, shown


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, History]]:
    """A checkpoint of a run with monitors, and what they measured."""
    folder = tmp_path_factory.mktemp("watched")
    monitors = [
        SpectralNormMonitor(plot=False, print_table=False),
        EffectiveRankMonitor(plot=False, print_table=False, spectrum_every_n_steps=2),
    ]
    trainer = fit(Net(), callbacks=monitors, log_every_n_steps=1, default_root_dir=folder)
    trainer.save_checkpoint(folder / "watched.ckpt")
    return folder / "watched.ckpt", {key: of for monitor in monitors for key, of in monitor.histories.items()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs of each figure that is made."""
    made: list[Any] = []

    def record(runs: Any, title: str) -> Any:
        made.append(runs)
        return original(runs, title)

    original = command.course_plot
    monkeypatch.setattr(command, "course_plot", record)
    return made


def test_a_figure_shows_what_monitors_measured(watched, runs, tmp_path, capsys, figures, drawn):
    path, histories = watched
    out = shown(capsys, path, runs / "baseline.ckpt", "--output", tmp_path)
    assert "histories.png" in out
    assert (tmp_path / "histories.png").stat().st_size > 10_000
    (by_run,) = drawn
    assert list(by_run) == ["watched.ckpt"], "the other run had no monitors"
    found = by_run["watched.ckpt"]
    assert list(found) == list(histories)
    for key, history in histories.items():
        assert (found[key].steps, found[key].names) == (history.steps, history.names)
        assert found[key].array() == history.array()


def test_quantities_are_chosen_by_globs(watched, tmp_path, capsys, figures, drawn):
    path, _ = watched
    shown(capsys, path, "--output", tmp_path, "--quantities", "update_*", "spectral_norm")
    (by_run,) = drawn
    assert set(by_run["watched.ckpt"]) == {
        "spectral_norm",
        "update_stable_rank",
        "update_participation_ratio",
        "update_effective_rank",
    }
    assert "spectral_norm" in refusal(capsys, path, "--output", tmp_path, "--quantities", "spectral_normm")


def test_without_monitors_there_is_no_such_figure(runs, tmp_path, capsys, figures):
    assert "histories" not in shown(capsys, runs / "net2.ckpt", "--output", tmp_path)
