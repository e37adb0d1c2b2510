"""The table of what moved, and its alarms."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from lightning_muon.diagnostics.report import MonitorTable, Movement, alarms


def movement(values: dict[str, float], before: dict[str, float] | None = None, **kwargs: Any) -> Movement:
    defaults = {"key": "spectral_norm", "step": 149, "extreme": "max", "alarm": "doubled"}
    return Movement(**{**defaults, "values": values, "before": before, **kwargs})


def printed(*movements: Movement, width: int = 80, whole: str = "", **kwargs: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **kwargs)
    console.print(MonitorTable(movements, "Matrices after step 149", whole))
    return console.file.getvalue()


def row(values: dict[str, float], before: dict[str, float] | None = None, width: int = 120, **kwargs: Any) -> list[str]:
    """The cells of a row: mean, change, extreme, how far which matrix moved most."""
    line = printed(movement(values, before, **kwargs), width=width).splitlines()[3]
    return re.split(" {2,}", line.strip())[1:]


def test_a_row_tells_mean_extreme_and_what_moved_most():
    values = {"a": 1.2, "b": 3.0, "c": 1.8}
    before = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert row(values, before) == ["2", "+0.0 %", "max 3", "+20 %", "a"]
    assert row(values, before, width=80) == ["2", "+0.0 %", "+20 %", "a"]


def test_the_smallest_is_told_where_small_is_bad():
    assert row({"a": 5.0, "b": 3.0}, key="stable_rank", extreme="min")[2] == "min 3"


def test_a_fall_can_move_most():
    assert row({"a": 1.5, "b": 0.6}, {"a": 1.0, "b": 1.0})[3:] == ["-40 %", "b"]


def test_the_first_table_has_no_changes():
    assert row({"a": 1.0}) == ["1", "-", "max 1", "-", "-"]


def test_the_mean_changes_over_matrices_measured_both_times():
    assert row({"a": 1.1, "new": 100.0}, {"a": 1.0, "gone": 50.0})[1] == "+10 %"


def test_a_large_change_is_a_factor():
    assert row({"a": 30.0}, {"a": 2.0})[3:] == ["x 15", "a"]


@pytest.mark.parametrize(("value", "mean"), [(math.inf, "2"), (math.nan, "nan")])
def test_what_is_not_finite_is_counted_and_is_the_extreme(value: float, mean: str):
    """Infinity is no part of the mean."""
    found = row({"a": 1.0, "b": value, "d": 3.0}, {"a": 1.0, "b": 1.0, "d": 3.0})
    assert found == [f"{mean} (1 not finite)", "+0.0 %", f"max {value}", "+0.0 %", "a"]


def test_a_row_of_nothing():
    assert row({}, {"a": 1.0}) == ["-", "-", "-", "-", "-"]


def test_zeros_before_have_no_relative_change():
    assert row({"a": 1.0}, {"a": 0.0}) == ["1", "-", "max 1", "-", "-"]


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


def test_alarms_of_four_lines_are_told_and_the_rest_counted():
    values = {f"m{index}": 2.0 + index for index in range(4)} | {"broken": math.nan}
    before = dict.fromkeys(values, 1.0)
    lines = printed(movement(values, before), movement({"a": 2.0}, {"a": 1.0}, key="rms_operator_norm")).splitlines()
    told = [line.split(" of ")[-1].split(" ")[0] for line in lines if line.startswith("!")]
    assert told[:4] == ["broken", "m3", "m2", "m1"]
    assert "! and 2 more" in [line.strip() for line in lines]


NAMES = {
    "transformer": [f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in range(12)],
    "fused": [f"encoder.layers.{layer}.self_attn.in_proj_weight.{block}" for layer in range(4) for block in "qkv"],
    "recurrent": [f"gru.weight_hh_l0.{gate}" for gate in "rzn"],
    "experts": [f"model.layers.31.block_sparse_moe.experts.gate_up_proj.{expert}.gate" for expert in range(128)],
}
QUANTITIES = [
    "spectral_norm", "rms_operator_norm", "update_orthogonality_error", "update_condition_number", "stable_rank",
    "participation_ratio", "effective_rank", "update_stable_rank", "update_participation_ratio",
    "update_effective_rank",
]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("factor", [1.1, 3.0])
@pytest.mark.parametrize("model", NAMES)
def test_all_monitors_take_a_dozen_lines(model: str, factor: float, width: int):
    before = dict.fromkeys(NAMES[model], 12.3456)
    values = {name: value * factor ** (index % 2) for index, (name, value) in enumerate(before.items())}
    moved = [movement(values, before, key=key, before_step=12345) for key in QUANTITIES]
    whole = "lightning_logs/version_0/spectral/*.csv at the end of the fit."
    lines = printed(*moved, width=width, whole=whole).rstrip().splitlines()
    assert max(map(len, lines)) <= width
    assert 5 <= sum(bool(line.strip()) for line in lines) <= 12
    assert any(NAMES[model][1].rpartition(".")[2] in line for line in lines), "the end of a name is not cut"
    text = " ".join(" ".join(lines).split())
    assert f"All {len(before)} matrices" in text
    assert "of 10 quantities" in text
    assert ("! spectral_norm of" in text) == (factor > 2)


def test_quantities_that_moved_most_are_shown_in_their_order():
    moved = [
        movement({"a": 1.0 + index / 100}, {"a": 1.0}, key=f"{key}_{index}", alarm=None) for index, key in
        enumerate(["x"] * 20)
    ]  # fmt: skip
    alarm = movement({"a": math.nan}, {"a": 1.0}, key="broken")
    lines = printed(alarm, *moved[::-1]).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith(("x", "broken"))]
    assert shown == ["broken", *(f"x_{index}" for index in range(19, 19 - len(shown) + 1, -1))]


def test_markup_in_names_is_shown_as_it_is():
    name = "net[bold].weight"
    text = printed(movement({name: 4.0}, {name: 1.0}, key="[red]norm"), width=120)
    assert text.count(name) == 2
    assert "[red]norm" in text


def test_alarms_stand_under_the_table_and_stand_out():
    text = printed(movement({"a": 4.0}, {"a": 1.0}), force_terminal=True, color_system="truecolor")
    assert text.splitlines()[4].startswith("\x1b[1;33m! spectral_norm of a doubled: 1 -> 4")
    calm = printed(movement({"a": 1.0}, {"a": 1.0}), force_terminal=True, color_system="truecolor")
    assert "\x1b[1;33m" not in calm
