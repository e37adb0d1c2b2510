"""What monitors had measured in runs is drawn from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor
from lightning_muon.diagnostics.history import History
from lightning_muon.diagnostics.spectra import command
from tests.diagnostics.spectra.commands import refusal, shown
from tests.lightning_helpers import Net, fit

NORM = ("spectral_norm", "spectral norm")
RANK, UPDATE_RANK = ("effective_rank", "effective rank"), ("update_effective_rank", "effective rank")


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


def history(values: Mapping[int, float | dict[str, float]], max_rows: int = 512) -> History:
    """A value of the matrix "a" at each step, or of several matrices."""
    made = History(max_rows)
    for step, row in values.items():
        made.append(step, row if isinstance(row, dict) else {"a": row})
    return made


def state(histories: Mapping[tuple[str, str], History], suffix: str = "") -> dict[str, Any]:
    """What a monitor puts into a checkpoint; a suffix tells it from others of its class."""
    return {
        "histories": {key: of.state_dict() for (key, _), of in histories.items()},
        "shown": {key: [f"{key}{suffix}", words] for key, words in histories},
    }


def save(path: Path, **states: Any) -> Path:
    """A checkpoint with the states of callbacks."""
    torch.save({"state_dict": {"a": torch.eye(3)}, "callbacks": states}, path)
    return path


def as_lists(histories: Mapping[tuple[str, str], History]) -> dict[tuple[str, str], Any]:
    return {names: (of.steps, of.array()) for names, of in histories.items()}


# One run


def test_a_figure_shows_what_monitors_measured(watched, runs, tmp_path, capsys, figures, drawn):
    path, histories = watched
    out = shown(capsys, path, runs / "baseline.ckpt", "--output", tmp_path)
    assert "histories.png" in out
    assert (tmp_path / "histories.png").stat().st_size > 10_000
    (by_run,) = drawn
    assert list(by_run) == ["watched.ckpt"], "the other run had no monitors"
    found = {key: history for (key, _), history in by_run["watched.ckpt"].items()}
    assert list(found) == list(histories)
    for key, history in histories.items():
        assert (found[key].steps, found[key].names) == (history.steps, history.names)
        assert found[key].array() == history.array()


def test_two_monitors_of_one_class_are_both_drawn_under_the_names_they_log(tmp_path, capsys, figures, drawn):
    monitors = [
        EffectiveRankMonitor(plot=False, print_table=False, spectrum_every_n_steps=1),
        EffectiveRankMonitor(plot=False, print_table=False, spectrum_every_n_steps=1, normalize=True),
        SpectralNormMonitor(plot=False, print_table=False, prefix="late/"),
    ]
    trainer = fit(Net(), callbacks=monitors, log_every_n_steps=1)
    trainer.save_checkpoint(tmp_path / "twins.ckpt")
    shown(capsys, tmp_path / "twins.ckpt", "--output", tmp_path, "--quantities", "effective_rank*", "late/*")
    (by_run,) = drawn
    expected = {
        ("effective_rank", "effective rank"): monitors[0].histories["effective_rank"],
        ("effective_rank-1", "effective rank / r"): monitors[1].histories["effective_rank"],
        ("late/spectral_norm", "spectral norm"): monitors[2].histories["spectral_norm"],
    }
    assert as_lists(by_run["twins.ckpt"]) == as_lists(expected)


def test_checkpoints_that_do_not_say_what_was_shown_have_the_bare_keys(tmp_path, capsys, figures, drawn):
    made = history({1: 2.0})
    save(tmp_path / "old.ckpt", monitor={"histories": {"spectral_norm": made.state_dict()}})
    shown(capsys, tmp_path / "old.ckpt", "--output", tmp_path)
    assert as_lists(drawn[0]["old.ckpt"]) == as_lists({("spectral_norm", ""): made})


def test_what_other_callbacks_keep_is_passed_over(tmp_path, capsys, figures, drawn):
    made = history({1: 2.0})
    save(
        tmp_path / "a.ckpt",
        number={"histories": 3},
        a_list={"histories": [1.0, 2.0]},
        losses={"histories": {"loss": [1.0, 0.5], "rate": {"steps": [1], "values": [2.0]}, "best": 1.0}},
        no_mapping=[1, 2],
        monitor={**state({NORM: made}), "more": 1},
    )
    shown(capsys, tmp_path / "a.ckpt", "--output", tmp_path)
    assert as_lists(drawn[0]["a.ckpt"]) == as_lists({NORM: made})


def test_without_monitors_there_is_no_such_figure(runs, tmp_path, capsys, figures):
    assert "histories" not in shown(capsys, runs / "net2.ckpt", "--output", tmp_path)


# Choosing quantities


def test_quantities_are_chosen_by_globs(watched, tmp_path, capsys, figures, drawn):
    path, _ = watched
    shown(capsys, path, "--output", tmp_path, "--quantities", "update_*", "spectral_norm")
    (by_run,) = drawn
    assert {key for key, _ in by_run["watched.ckpt"]} == {
        "spectral_norm",
        "update_stable_rank",
        "update_participation_ratio",
        "update_effective_rank",
    }
    assert "spectral_norm" in refusal(capsys, path, "--output", tmp_path, "--quantities", "spectral_normm")


def test_quantities_may_come_from_different_checkpoints(tmp_path, capsys, figures, drawn):
    norm, rank = history({1: 2.0}), history({1: 3.0})
    paths = [
        save(tmp_path / "norm.ckpt", monitor=state({NORM: norm})),
        save(tmp_path / "rank.ckpt", monitor=state({RANK: rank, UPDATE_RANK: rank})),
    ]
    shown(capsys, *paths, "--output", tmp_path, "--quantities", "spectral_norm", "update_*")
    assert {label: list(of) for label, of in drawn[0].items()} == {"norm.ckpt": [NORM], "rank.ckpt": [UPDATE_RANK]}
    error = refusal(capsys, *paths, "--output", tmp_path, "--quantities", "spectral_norm", "effective_rnk")
    assert "nothing like 'effective_rnk' was measured. Near names: effective_rank" in error


def test_quantities_without_anything_to_choose_from(runs, tmp_path, capsys):
    sentence = "--quantities has nothing to choose from"
    assert sentence in shown(capsys, runs / "net2.ckpt", "--output", tmp_path, "--quantities", "update_*")
    assert sentence not in shown(capsys, runs / "net2.ckpt", "--output", tmp_path)


# Several checkpoints of one run


def series(tmp_path: Path, histories: list[dict[tuple[str, str], History]]) -> list[Path]:
    return [save(tmp_path / f"{index}.ckpt", monitor=state(of)) for index, of in enumerate(histories)]


def test_of_a_series_only_the_longest_is_drawn(tmp_path, capsys, figures, drawn):
    first = {1: {"a": 1.0}, 2: {"a": math.nan, "b": 2.0}}
    longest = {**first, 3: {"a": 4.0, "b": math.inf, "thawed": 1.0}}
    histories = [
        {NORM: history(first)},
        {NORM: history(longest), RANK: history({3: 2.0})},
        {NORM: history({1: 1.0})},
        {NORM: history({1: 1.5})},
    ]
    shown(capsys, *series(tmp_path, histories), "--output", tmp_path)
    assert {label: list(of) for label, of in drawn[0].items()} == {"1.ckpt": [NORM, RANK], "3.ckpt": [NORM]}
    assert drawn[0]["1.ckpt"][NORM].steps == [1, 2, 3]


def test_of_equal_checkpoints_the_first_is_drawn(tmp_path, capsys, figures, drawn):
    shown(capsys, *series(tmp_path, [{NORM: history({1: 1.0, 2: 2.0})}] * 2), "--output", tmp_path)
    assert list(drawn[0]) == ["0.ckpt"]


def test_a_longer_history_that_was_thinned_is_still_the_same_run(tmp_path, capsys, figures, drawn):
    whole = {step: 1 / step for step in range(1, 30)}
    part = {step: value for step, value in whole.items() if step <= 7}
    other = {**part, 1: 7.0}
    histories = [{NORM: history(part, 8)}, {NORM: history(whole, 8)}, {NORM: history(other, 8)}]
    assert 2 not in histories[1][NORM].steps
    shown(capsys, *series(tmp_path, histories), "--output", tmp_path)
    assert list(drawn[0]) == ["1.ckpt", "2.ckpt"]


@pytest.mark.parametrize(
    "longer",
    [
        {NORM: history({1: 1.0, 2: 2.5, 3: 3.0})},
        {NORM: history({2: 2.0, 3: 3.0})},
        {NORM: history({1: {"b": 1.0}, 2: {"b": 2.0}, 3: {"b": 3.0}})},
        {RANK: history({1: 1.0, 2: 2.0, 3: 3.0})},
        {("spectral_norm", "spectral norm / r"): history({1: 1.0, 2: 2.0, 3: 3.0})},
        {NORM: history({3: 3.0, 4: 4.0})},
    ],
    ids=["value", "first step", "matrix", "key", "words", "later steps"],
)
def test_other_runs_are_drawn_beside_it(longer, tmp_path, capsys, figures, drawn):
    paths = series(tmp_path, [{NORM: history({1: 1.0, 2: 2.0})}, longer])
    shown(capsys, *paths, "--output", tmp_path)
    assert list(drawn[0]) == ["0.ckpt", "1.ckpt"]


def test_a_series_is_recognized_by_all_that_was_measured(tmp_path, capsys, figures, drawn):
    """Whatever is chosen of it: the same norms of two runs that differ elsewhere are drawn twice."""
    histories = [{NORM: history({1: 1.0}), RANK: history({1: rank})} for rank in (2.0, 3.0)]
    shown(capsys, *series(tmp_path, histories), "--output", tmp_path, "--quantities", "spectral_norm")
    assert {label: list(of) for label, of in drawn[0].items()} == {"0.ckpt": [NORM], "1.ckpt": [NORM]}
