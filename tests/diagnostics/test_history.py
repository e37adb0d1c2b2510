"""The history of a quantity: its rows, how it thins itself, its state and its CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from lightning_muon.diagnostics.history import History, write_csv


def filled(*steps: int, max_rows: int = 512) -> History:
    """A history whose only matrix has the step as its value."""
    history = History(max_rows)
    for step in steps:
        history.append(step, {"weight": float(step)})
    return history


def test_a_value_per_matrix_and_step():
    history = History()
    history.append(4, {"b": 2.0, "a": 1.0})
    history.append(9, {"a": 3.0, "c": 5.0})
    assert history.steps == [4, 9]
    assert history.names == ["b", "a", "c"]
    assert len(history) == 2
    first, second = history.array()
    assert first[:2] == [2.0, 1.0]
    assert second[1:] == [3.0, 5.0]
    assert math.isnan(first[2])
    assert math.isnan(second[0])
    assert history.row(-1) == {"a": 3.0, "c": 5.0}


def test_a_measured_nan_is_not_a_missing_value():
    history = History()
    history.append(0, {"a": math.nan, "b": math.inf})
    assert set(history.row(0)) == {"a", "b"}
    assert math.isnan(history.row(0)["a"])


def test_a_row_is_a_copy():
    values = {"a": 1.0}
    history = History()
    history.append(0, values)
    values["a"] = 2.0
    history.row(0)["a"] = 3.0
    assert history.row(0) == {"a": 1.0}


def test_the_same_step_replaces_its_row():
    history = filled(4, 9)
    history.append(9, {"weight": 7.0})
    assert history.steps == [4, 9]
    assert history.array() == [[4.0], [7.0]]


def test_an_earlier_step_drops_what_came_after_it():
    history = filled(4, 9, 14, 19)
    history.append(10, {"weight": 7.0})
    assert history.steps == [4, 9, 10]
    assert history.array() == [[4.0], [9.0], [7.0]]


@pytest.mark.parametrize("max_rows", [2, 3, 8, 9, 512])
def test_a_full_history_thins_itself(max_rows: int):
    history = filled(max_rows=max_rows)
    for step in range(3 * max_rows):
        history.append(step, {"weight": float(step)})
        assert len(history) <= max_rows
        assert (history.steps[0], history.steps[-1]) == (0, step)
        assert history.array() == [[float(kept)] for kept in history.steps]
        assert history.steps == sorted(set(history.steps))
    assert len(history) >= max_rows // 2


def test_thinning_drops_every_second_row():
    history = filled(*range(9), max_rows=8)
    assert history.steps == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("max_rows", [1, 0, -3])
def test_too_few_rows_are_refused(max_rows: int):
    with pytest.raises(ValueError, match=f"max_rows is {max_rows}"):
        History(max_rows)


def test_the_state_goes_through_a_safe_checkpoint(tmp_path: Path):
    history = History()
    history.append(4, {"a": 0.1, "b": math.nan})
    history.append(9, {"c": math.inf})
    torch.save(history.state_dict(), tmp_path / "state.pt")
    loaded = filled(1, 2, 3)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (loaded.steps, loaded.names) == ([4, 9], ["a", "b", "c"])
    assert loaded.row(0).keys() == {"a", "b"}
    assert loaded.row(0)["a"] == 0.1
    assert math.isnan(loaded.row(0)["b"])
    assert loaded.row(1) == {"c": math.inf}
    loaded.append(14, {"a": 0.2})
    assert history.steps == [4, 9], "a loaded history shares nothing with the one it came from"


@pytest.mark.parametrize("rows", [[], [{}], [{}, {"a": 1.0}]])
def test_the_state_of_a_history_with_little_in_it(rows: list[dict[str, float]]):
    history = History()
    for step, values in enumerate(rows):
        history.append(step, values)
    loaded = History()
    loaded.load_state_dict(history.state_dict())
    assert [loaded.row(index) for index in range(len(loaded))] == rows


def test_csv_has_a_line_per_value(tmp_path: Path):
    norms, ranks = History(), History()
    norms.append(4, {"a": 0.1, "b": math.nan})
    norms.append(9, {"b": 1e-30})
    ranks.append(4, {"a, with a comma": 3.0})
    path = tmp_path / "made" / "on" / "demand.csv"
    write_csv(path, {"spectral_norm": norms, "stable_rank": ranks})
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["step", "quantity", "matrix", "value"],
        ["4", "spectral_norm", "a", "0.1"],
        ["4", "spectral_norm", "b", "nan"],
        ["9", "spectral_norm", "b", "1e-30"],
        ["4", "stable_rank", "a, with a comma", "3.0"],
    ]


def test_csv_replaces_an_older_file(tmp_path: Path):
    write_csv(tmp_path / "values.csv", {"spectral_norm": filled(1, 2, 3)})
    write_csv(tmp_path / "values.csv", {"spectral_norm": filled(1)})
    assert (tmp_path / "values.csv").read_text().splitlines() == [
        "step,quantity,matrix,value",
        "1,spectral_norm,weight,1.0",
    ]
