"""What stands in the figures, and where they go."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_muon.diagnostics.figures import (
    figures_available,
    heat_map,
    publish,
    save_pngs,
    shows_figures,
    spectra_plot,
)
from lightning_muon.diagnostics.history import History


def history(rows: dict[int, dict[str, float]]) -> History:
    made = History()
    for step, values in rows.items():
        made.append(step, values)
    return made


def drawn(rows: dict[int, dict[str, float]]) -> Figure:
    return heat_map(history(rows), "spectral_norm", "largest singular value", "After 10 steps")


def parts(figure: Figure) -> tuple[Axes, Axes]:
    """The map and its colour bar."""
    axes, bar = figure.axes
    return axes, bar


def tick_names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def names(count: int) -> list[str]:
    return [f"blocks.{index // 2}.attention.{'query' if index % 2 else 'key'}.weight" for index in range(count)]


def snapshot(count: int, ratio: float = 0.5, size: int = 4) -> dict[str, torch.Tensor]:
    return {name: 3 * ratio ** torch.arange(size) for name in names(count)}


def panels(figure: Figure) -> dict[str, Axes]:
    """By the matrix's name."""
    return {axes.get_title().replace("\n", ""): axes for axes in figure.axes if axes.get_visible()}


def test_a_map_has_a_row_per_matrix_and_a_column_per_step():
    axes, bar = parts(drawn({4: {"b": 1.0, "a": 2.0}, 9: {"b": 3.0, "a": 4.0}, 14: {"b": 5.0, "a": 6.0}}))
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    assert tick_names(axes) == ["b", "a"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first matrix is on top"
    assert axes.get_xticks().tolist() == [4, 9, 14]
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_title(loc="left") == "After 10 steps"
    assert "spectral_norm" in [text.get_text() for text in axes.texts]
    assert bar.get_ylabel().split() == ["largest", "singular", "value"]


def test_columns_are_centred_at_their_steps():
    axes, _ = parts(drawn({0: {"a": 1.0}, 10: {"a": 2.0}, 40: {"a": 3.0}}))
    assert axes.collections[0].get_coordinates()[0, :, 0].tolist() == [-5.0, 5.0, 25.0, 55.0]


def test_one_matrix_at_one_step():
    axes, _ = parts(drawn({49: {"a": 1.0}}))
    assert axes.collections[0].get_array().shape == (1, 1)
    assert 49 in axes.get_xticks()


def test_missing_and_infinite_values_are_grey_and_the_bar_says_so():
    axes, bar = parts(drawn({4: {"a": 1.0, "b": math.nan}, 9: {"a": math.inf, "c": 2.0}}))
    mesh = axes.collections[0]
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [[False, True], [True, True], [True, False]]
    red, green, blue, _ = mesh.cmap.get_bad()
    assert red == green == blue
    assert "grey" in bar.get_ylabel()
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 2.0)


def test_a_map_without_a_finite_value_can_be_drawn(tmp_path: Path):
    save_pngs({"map": drawn({4: {"a": math.nan}})}, tmp_path)


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([1e-3, 1e3], True), ([0.1, 1.0], False), ([0.0, 1e3], False), ([-1e-3, 1e3], False), ([2.0, 2.0], False)],
)
def test_colours_are_logarithmic_over_many_decades_of_positive_values(values: list[float], logarithmic: bool):
    axes, _ = parts(drawn({4: dict(zip("ab", values, strict=True))}))
    assert isinstance(axes.collections[0].norm, LogNorm) is logarithmic


@pytest.mark.parametrize("count", [12, 200, 1000])
def test_names_do_not_overlap(count: int):
    figure = drawn({step: dict.fromkeys(names(count), float(step)) for step in (4, 9)})
    axes, _ = parts(figure)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes), "no name is cut off"
    at = {round(tick): name for tick, name in zip(axes.get_yticks(), tick_names(axes), strict=True)}
    assert all(names(count)[index] == name for index, name in at.items())
    assert len(at) == count if count == 12 else 40 <= len(at) < count
    assert (f"{count} matrices" in axes.get_ylabel()) == (count > 12)


def test_a_very_long_name_keeps_both_ends():
    name = "module." + "a_long_part." * 12 + "weight"
    (shown,) = tick_names(parts(drawn({4: {name: 1.0}}))[0])
    assert len(shown) < 60
    assert shown.startswith("module.a_long")
    assert shown.endswith("part.weight")


def test_a_bar_label_fits_a_small_map():
    figure = heat_map(
        history({4: {"a": 1.0}}), "key", "distance of the update from the nearest orthogonal one", "title"
    )
    figure.draw_without_rendering()
    box = parts(figure)[1].yaxis.label.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("rows", [{}, {4: {}}])
def test_an_empty_history_is_refused(rows: dict[int, dict[str, float]]):
    with pytest.raises(ValueError, match="'spectral_norm' has no values"):
        drawn(rows)


def test_a_panel_per_matrix_with_a_line_per_snapshot():
    figure = spectra_plot({"step 4": snapshot(3), "step 9": snapshot(3, 0.1)}, "Singular values")
    assert list(panels(figure)) == names(3)
    for axes in panels(figure).values():
        first, last = axes.get_lines()
        assert first.get_xdata().tolist() == last.get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0]
        assert first.get_ydata() == pytest.approx([1, 0.5, 0.25, 0.125])
        assert last.get_ydata() == pytest.approx([1, 0.1, 0.01, 0.001])
        assert (first.get_linestyle(), last.get_linestyle()) == ("--", "-")
        assert first.get_color() != last.get_color()
        assert axes.get_yscale() == "log"
        assert "r = 4" in [text.get_text() for text in axes.texts]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 4", "step 9"]
    assert figure.get_suptitle() == "Singular values"
    assert "s_1" in figure.get_supylabel()
    assert "r" in figure.get_supxlabel()


def test_panels_share_their_axes():
    first, *others = panels(spectra_plot({"now": snapshot(4) | {names(4)[3]: torch.tensor([1.0, 1e-3])}}, "t")).values()
    assert {axes.get_ylim() for axes in others} == {first.get_ylim()}
    assert first.get_ylim()[0] <= 1e-3
    assert {axes.get_xlim() for axes in others} == {first.get_xlim()}


def test_singular_values_of_rounding_size_do_not_flatten_the_rest():
    (axes,) = panels(spectra_plot({"now": {"x": torch.tensor([1.0, 0.5, 1e-9])}}, "t")).values()
    assert axes.get_ylim()[0] == pytest.approx(1e-5)


def test_one_snapshot_is_solid():
    (line,) = panels(spectra_plot({"now": snapshot(1)}, "t"))[names(1)[0]].get_lines()
    assert line.get_linestyle() == "-"


def test_twelve_of_many_matrices_are_drawn_and_the_title_says_so():
    figure = spectra_plot({"now": snapshot(64)}, "Singular values")
    shown = [names(64).index(name) for name in panels(figure)]
    assert figure.get_suptitle() == "Singular values (12 of 64 matrices)"
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (0, 63)
    gaps = {second - first for first, second in pairwise(shown)}
    assert gaps <= {5, 6}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 12])
def test_every_count_of_panels_has_numbers_under_its_lowest(count: int):
    figure = spectra_plot({"now": snapshot(count)}, "t")
    figure.draw_without_rendering()
    shown = list(panels(figure).values())
    columns = shown[0].get_gridspec().ncols
    assert len(shown) == count
    for index, axes in enumerate(shown):
        labelled = any(label.get_visible() and label.get_text() for label in axes.get_xticklabels())
        assert labelled == (index + columns >= count)


def test_titles_of_long_names_do_not_overlap():
    long = {f"model.decoder.layers.{index}.self_attn.in_proj_weight.{index}": torch.ones(4) for index in range(4)}
    figure = spectra_plot({"now": long}, "t")
    figure.draw_without_rendering()
    first, second = (axes.title.get_window_extent() for axes in list(panels(figure).values())[:2])
    assert first.x1 < second.x0
    assert list(panels(figure)) == list(long)


@pytest.mark.parametrize(
    "values", [torch.zeros(4), torch.full((4,), math.nan), torch.tensor([1.0, math.inf, 0.0]), torch.empty(0)]
)
def test_a_spectrum_that_cannot_be_drawn_is_named(values: torch.Tensor, tmp_path: Path):
    figure = spectra_plot({"now": snapshot(1) | {"broken": values}}, "t")
    assert "zero or not finite" in panels(figure)["broken"].texts[0].get_text()
    save_pngs({"spectra": figure}, tmp_path)


def test_a_matrix_missing_in_one_snapshot_and_zeros_at_the_end():
    figure = spectra_plot(
        {"a": {"x": torch.tensor([2.0, 0.0])}, "b": {"x": torch.tensor([1.0, 0.5]), "y": torch.ones(2)}}, "t"
    )
    with_zero, _ = panels(figure)["x"].get_lines()
    assert with_zero.get_ydata()[0] == 1
    assert math.isnan(with_zero.get_ydata()[1])
    missing, there = panels(figure)["y"].get_lines()
    assert len(missing.get_ydata()) == 0
    assert there.get_ydata() == pytest.approx([1, 1])


def test_singular_values_in_any_order_and_precision():
    values = torch.tensor([1.0, 4.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    (line,) = panels(spectra_plot({"now": {"x": values}}, "t"))["x"].get_lines()
    assert line.get_ydata() == pytest.approx([1, 0.5, 0.25])


@pytest.mark.parametrize("snapshots", [{}, {"now": {}}])
def test_no_spectra_are_refused(snapshots: dict[str, Any]):
    with pytest.raises(ValueError, match="no singular values"):
        spectra_plot(snapshots, "t")


def test_pngs_are_written_and_can_be_read(tmp_path: Path):
    figures = {"spectral_norm/map": drawn({4: {"a": 1.0}}), "spectra": spectra_plot({"now": snapshot(2)}, "t")}
    paths = save_pngs(figures, tmp_path / "not" / "there")
    assert paths == [tmp_path / "not" / "there" / name for name in ("spectral_norm_map.png", "spectra.png")]
    for path in paths:
        image = imread(path)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.01


def test_drawing_leaves_pyplot_without_figures(tmp_path: Path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    save_pngs({"map": drawn({4: {"a": 1.0}}), "spectra": spectra_plot({"now": snapshot(2)}, "t")}, tmp_path)
    assert pyplot.get_fignums() == before


def test_figures_need_matplotlib(monkeypatch: pytest.MonkeyPatch):
    assert figures_available()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "matplotlib")
    sys.path_importer_cache.clear()
    assert not figures_available()


class Shown:
    """Stands in for a logger of either namespace and notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.experiment = self

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.seen.append((tag, figure, global_step))

    def log_image(self, key: str, images: list[Figure], step: int) -> None:
        self.seen.append((key, images, step))


def test_every_logger_that_can_shows_every_figure():
    class TensorBoardLogger(Shown): ...

    class WandbLogger(Shown): ...

    class Derived(WandbLogger): ...

    class CSVLogger(Shown): ...

    figures = {"first": Figure(), "second": Figure()}
    boards, tables, images = TensorBoardLogger(), CSVLogger(), Derived()
    publish(figures, [boards, tables, images], 49)
    assert boards.seen == [(tag, figure, 49) for tag, figure in figures.items()]
    assert images.seen == [(tag, [figure], 49) for tag, figure in figures.items()]
    assert tables.seen == []


@pytest.mark.parametrize("figures", [{}, {"map": Figure()}])
def test_nothing_is_shown_without_a_logger_that_can(figures: dict[str, Figure]):
    class CSVLogger(Shown): ...

    assert not shows_figures(CSVLogger())
    publish(figures, [CSVLogger()], 49)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_tensorboard_keeps_the_figure(namespace: str, tmp_path: Path):
    loggers = pytest.importorskip(f"{namespace}.loggers")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = loggers.TensorBoardLogger(tmp_path)
    publish({"spectral_norm": drawn({4: {"a": 1.0}, 9: {"a": 2.0}})}, [logger], 9)
    logger.finalize("success")
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("spectral_norm")
    assert image.step == 9
    assert min(image.width, image.height) > 200


def test_wandb_keeps_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = loggers.WandbLogger(offline=True, save_dir=str(tmp_path))
    try:
        publish({"spectral_norm": drawn({4: {"a": 1.0}, 9: {"a": 2.0}})}, [logger], 9)
        assert logger.experiment.summary["trainer/global_step"] == 9
    finally:
        wandb.finish()
    (png,) = tmp_path.rglob("media/images/spectral_norm*.png")
    assert min(imread(png).shape[:2]) > 200
