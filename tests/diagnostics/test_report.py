"""The table of what moved, and its alarms."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from lightning_muon.diagnostics.report import Movement, alarms, monitor_table


def movement(values: dict[str, float], before: dict[str, float] | None = None, **kwargs: Any) -> Movement:
    defaults = {"key": "spectral_norm", "step": 149, "extreme": "max", "alarm": "doubled"}
    return Movement(**{**defaults, "values": values, "before": before, **kwargs})


def cells(*movements: Movement) -> list[list[str]]:
    """The rows of the table."""
    table = monitor_table(movements, "title")
    columns = [list(column.cells) for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]


def printed(*movements: Movement, width: int = 80, **kwargs: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **kwargs)
    console.print(monitor_table(movements, "Matrices after step 149"))
    return console.file.getvalue()


def test_a_row_tells_mean_extreme_and_what_moved_most():
    values = {"a": 1.2, "b": 3.0, "c": 1.8}
    before = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert cells(movement(values, before)) == [["spectral_norm", "2\n+0.0 %", "max 3\nb", "+20 %\na"]]


def test_the_smallest_is_told_where_small_is_bad():
    row = cells(movement({"a": 5.0, "b": 3.0}, key="stable_rank", extreme="min"))[0]
    assert row[2] == "min 3\nb"


def test_a_fall_can_move_most():
    row = cells(movement({"a": 1.5, "b": 0.6}, {"a": 1.0, "b": 1.0}))[0]
    assert row[3] == "-40 %\nb"


def test_the_first_table_has_no_changes():
    assert cells(movement({"a": 1.0}))[0][1:] == ["1\n", "max 1\na", "-"]


def test_the_mean_changes_over_matrices_measured_both_times():
    row = cells(movement({"a": 1.1, "new": 100.0}, {"a": 1.0, "gone": 50.0}))[0]
    assert row[1].endswith("+10 %")


def test_a_large_change_is_a_factor():
    assert cells(movement({"a": 30.0}, {"a": 2.0}))[0][3] == "x 15\na"


def test_infinity_is_no_part_of_the_mean_but_the_extreme():
    row = cells(movement({"a": 1.0, "c": math.inf, "d": 3.0}, {"a": 1.0, "c": 1.0, "d": 3.0}))[0]
    assert row == ["spectral_norm\n(1 of 3 not finite)", "2\n+0.0 %", "max inf\nc", "+0.0 %\na"]


def test_one_nan_is_seen_in_mean_and_extreme():
    row = cells(movement({"a": 1.0, "b": math.nan, "d": 3.0}, {"a": 1.0, "b": 1.0, "d": 3.0}))[0]
    assert row == ["spectral_norm\n(1 of 3 not finite)", "nan\n+0.0 %", "max nan\nb", "+0.0 %\na"]


def test_a_row_of_nothing():
    assert cells(movement({}, {"a": 1.0}))[0][1:] == ["-", "-", "-"]


def test_zeros_before_have_no_relative_change():
    assert cells(movement({"a": 1.0}, {"a": 0.0}))[0][1:] == ["1\n-", "max 1\na", "-"]


def test_doubling_is_an_alarm():
    rise = movement(
        {"blocks.0.ffn.weight": 2.6, "other": 1.9}, {"blocks.0.ffn.weight": 1.2, "other": 1.0}, before_step=99
    )
    assert alarms([rise]) == ["spectral_norm of blocks.0.ffn.weight doubled: 1.2 -> 2.6 since step 99."]
    assert alarms([rise._replace(before_step=None)])[0].endswith("1.2 -> 2.6 since the last table.")


def test_halving_is_an_alarm_only_where_it_is_bad():
    fall = movement({"a": 3.0, "b": 5.0}, {"a": 7.0, "b": 7.0}, key="stable_rank", extreme="min", alarm="halved")
    assert alarms([fall]) == ["stable_rank of a halved: 7 -> 3 since the last table."]
    assert alarms([fall._replace(alarm="doubled")]) == []
    assert alarms([fall._replace(alarm=None)]) == []


@pytest.mark.parametrize(("now", "before"), [(2.0, 1.0), (1e-30, 1e-31)])
def test_exactly_twice_and_tiny_values_count(now: float, before: float):
    assert len(alarms([movement({"a": now}, {"a": before})])) == 1


@pytest.mark.parametrize("before", [None, {}, {"b": 1.0}, {"a": 0.0}, {"a": math.nan}, {"a": math.inf}])
def test_no_alarm_without_a_value_to_compare_with(before: dict[str, float] | None):
    assert alarms([movement({"a": 8.0}, before)]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("alarm", ["doubled", "halved", None])
def test_nan_is_an_alarm_always_and_infinity_where_there_are_any(value: float, alarm: str | None):
    expected = [] if alarm is None and math.isinf(value) else [f"spectral_norm of a is {value} at step 149."]
    assert alarms([movement({"a": value}, {"a": 1.0}, alarm=alarm)]) == expected


def test_the_worst_five_of_a_quantity_are_told():
    values = {f"m{index}": 2.0 + index for index in range(7)} | {"broken": math.nan}
    before = dict.fromkeys(values, 1.0)
    sentences = alarms([movement(values, before), movement({"a": 2.0}, {"a": 1.0}, key="rms_operator_norm")])
    assert [sentence.split(" of ")[-1].split(" ")[0] for sentence in sentences[:5]] == [
        "broken",
        "m6",
        "m5",
        "m4",
        "m3",
    ]
    assert sentences[5] == "spectral_norm: and 3 more."
    assert sentences[6].startswith("rms_operator_norm of a doubled")
    assert len(sentences) == 7


@pytest.mark.parametrize("width", [80, 120])
def test_keys_and_names_are_readable_at_usual_widths(width: int):
    name = "blocks.11.attention.query.weight"
    text = printed(
        movement({name: 1.0}, {name: 0.9}, key="update_participation_ratio", extreme="min", alarm="halved"),
        movement({name: 123456.0}, {name: 130000.0}, key="update_orthogonality_error"),
        width=width,
    )
    assert max(map(len, text.splitlines())) <= width
    assert "update_participation_ratio" in text
    assert "update_orthogonality_error" in text
    assert "…" not in text
    assert sum(name in _unfolded(text, column) for column in ("extreme", "moved most")) == 2


def test_markup_in_names_is_shown_as_it_is():
    name = "net[bold].weight"
    text = printed(movement({name: 4.0}, {name: 1.0}), width=120)
    assert text.count(name) == 3
    assert "[title]" in _title("[title]")


def test_alarms_stand_under_the_table_and_stand_out():
    text = printed(movement({"a": 4.0}, {"a": 1.0}), force_terminal=True, color_system="truecolor")
    assert text.splitlines()[-1].startswith("\x1b[1;33m! spectral_norm of a doubled: 1 -> 4")
    calm = printed(movement({"a": 1.0}, {"a": 1.0}), force_terminal=True, color_system="truecolor")
    assert "\x1b[1;33m" not in calm


def _unfolded(text: str, column: str) -> str:
    """A column's lines as one string."""
    lines = text.splitlines()
    header = next(line for line in lines if "moved most" in line)
    start = header.index(column)
    end = header.index("moved most") if column == "extreme" else None
    return "".join(line[start:end].strip() for line in lines)


def _title(title: str) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(monitor_table([movement({"a": 1.0})], title))
    return console.file.getvalue()
