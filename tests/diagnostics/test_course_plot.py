"""What stands in the figure that compares runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.text import Text

from lightning_muon.diagnostics.figures import course_plot
from lightning_muon.diagnostics.history import History


def history(rows: dict[int, dict[str, float]]) -> History:
    made = History()
    for step, values in rows.items():
        made.append(step, values)
    return made


RANK, NORM = ("rank", "effective rank / r"), ("norm-1", "")
ONE = {RANK: history({4: {"a": 1.0, "b": 3.0}, 9: {"a": 2.0, "b": 6.0}}), NORM: history({4: {"a": 5.0, "b": 5.0}})}
OTHER = {RANK: history({4: {"a": 0.5}, 9: {"a": math.nan}, 14: {"a": 0.7}})}


def headings(axes: Any) -> list[str]:
    """What stands above a panel, from the top."""
    return [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]


def test_a_panel_a_quantity_and_a_line_a_run_of_means():
    figure = course_plot({"one.ckpt": ONE, "other.ckpt": OTHER}, "What was measured")
    rank, norm = (axes for axes in figure.axes if axes.get_visible())
    assert headings(rank) == ["effective rank / r", "rank"]
    assert headings(norm) == ["", "norm-1"]
    first, second = rank.get_lines()
    assert first.get_xydata().tolist() == [[4, 2.0], [9, 4.0]]
    assert second.get_xydata().tolist() == [[4, 0.5], [14, 0.7]], "what is not finite is left out"
    assert first.get_color() != second.get_color()
    assert rank.get_xlabel() == "optimizer step"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one.ckpt", "other.ckpt"]
    assert figure.get_suptitle() == "What was measured"


def test_the_same_key_with_other_words_has_a_panel_of_its_own():
    plain = {("rank", "effective rank"): history({4: {"a": 9.0}})}
    figure = course_plot({"one.ckpt": ONE, "plain.ckpt": plain}, "")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [headings(axes) for axes in shown] == [
        ["effective rank / r", "rank"],
        ["", "norm-1"],
        ["effective rank", "rank"],
    ]
    drawn = [[len(line.get_xdata()) for line in axes.get_lines()] for axes in shown]
    assert drawn == [[2, 0], [1, 0], [0, 1]]


def test_long_keys_and_words_do_not_overlap():
    key = "a_prefix_of_some_length/update_participation_ratio-1"
    figure = course_plot({"run": {(key, "participation ratio"): history({1: {"a": 1.0}})}}, "")
    figure.canvas.draw()
    axes = figure.axes[0]
    (small,) = axes.texts
    (title,) = (text for text in axes.findobj(Text) if text.get_text() == "participation ratio")
    above = title.get_window_extent()
    assert above.y0 >= small.get_window_extent().y1
    assert above.y1 <= figure.bbox.y1


def test_the_band_reaches_from_the_smallest_to_the_largest_matrix():
    figure = course_plot({"one.ckpt": ONE}, "")
    outline = figure.axes[0].collections[0].get_paths()[0].vertices
    assert sorted(set(outline[outline[:, 0] == 9, 1])) == [2.0, 6.0]


@pytest.mark.parametrize(("smallest", "scale"), [(0.01, "log"), (0.5, "linear"), (0.0, "linear"), (-1.0, "linear")])
def test_a_wide_range_of_positive_values_is_logarithmic(smallest: float, scale: str):
    figure = course_plot({"run": {("number", ""): history({1: {"a": smallest, "b": 7.0}})}}, "")
    assert figure.axes[0].get_yscale() == scale


def test_no_history_is_refused():
    with pytest.raises(ValueError, match=r"\['run'\]"):
        course_plot({"run": {}}, "")
