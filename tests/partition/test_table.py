"""The table of a partition: what stands in its rows and under it, at usual widths."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_muon.partition import ParameterRule, partition_parameters
from lightning_muon.partition.table import ParameterName


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(1000, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(12))
        self.scores = nn.Linear(16, 1000)


def rows(module: nn.Module, *rules: ParameterRule) -> dict[str, list[str]]:
    """Cells by what stands in the first column."""
    table = partition_parameters(module, rules).table()
    columns = [list(column.cells) for column in table.columns]
    return {str(first): [str(cell) for cell in rest] for first, *rest in zip(*columns, strict=True)}


def test_one_row_a_pattern():
    cells = rows(Model())
    assert cells["blocks.*.self_attn.in_proj_weight x12"] == [
        "48 x 16 as 3 of 16 x 16",
        "hidden",
        "matrix",
        "Input projection of MultiheadAttention, q | k | v.",
    ]
    assert cells["items.weight"] == ["1000 x 16", "embedding", "other", "Embedding table."]
    assert cells["scores.weight"][1:3] == ["head", "other"]


def test_vectors_share_rows():
    cells = rows(Model())
    assert cells["blocks.*.weight x24"] == ["16", "vector", "other", "Gain of LayerNorm."]
    assert len(cells) < 12


def test_only_the_indices_that_differ_are_stars():
    assert "blocks.0.linear1.weight" in rows(Model(), ParameterRule(pattern="blocks.0.linear1.weight", group="other"))
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)), nn.Linear(6, 3))
    assert rows(net)["0.*.weight x2"][0] == "4 x 4; 6 x 4"


def test_layers_of_recurrent_networks_share_a_row():
    assert rows(nn.GRU(8, 8, num_layers=3))["weight_ih_l* x3"][0] == "24 x 8 as 3 of 8 x 8"


def test_options_have_a_column_where_there_are_any():
    cells = rows(Model(), ParameterRule(role="embedding", options={"lr": 0.1, "weight_decay": 0.0}))
    assert cells["items.weight"][3] == "lr=0.1\nweight_decay=0.0"
    assert cells["scores.weight"][3] == ""


def test_frozen_parameters_say_so():
    model = Model()
    model.items.requires_grad_(False)
    assert rows(model)["items.weight"][2] == "frozen"
    caption = str(partition_parameters(model).table().caption)
    assert "frozen: 1 parameter, 16 k elements, in no optimizer" in caption


def test_caption_counts_matrices_and_elements():
    """Per block 3 + 1 + 1 + 1 matrices and 3 * 256 + 256 + 2 * 512 = 2048 elements in them."""
    caption = str(partition_parameters(Model()).table().caption)
    vectors = 12 * (48 + 16 + 32 + 16 + 4 * 16) + 1000
    total = 24576 + vectors + 2 * 16000
    assert f"matrix: 72 matrices in 48 parameters, 24.6 k of {total / 1000:.1f} k elements" in caption
    assert f"({100 * 24576 / total:.1f}%)" in caption
    assert "param groups: other/embedding, matrix, other/vector, other/head" in caption


def test_caption_of_one():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(1, bias=False))
    caption = str(partition_parameters(net, [ParameterRule(pattern="0.weight", group="matrix")]).table().caption)
    assert "matrix: 1 matrix in 1 parameter, 16 of 17 elements (94.1%)" in caption
    assert "other: 1 parameter, 1 of 17 elements (5.9%)" in caption
    net[0].requires_grad_(False)
    caption = str(partition_parameters(net).table().caption)
    assert "matrix: 0 matrices in 0 parameters, 0 of 1 element (0.0%)" in caption
    assert "frozen: 1 parameter, 16 elements, in no optimizer" in caption


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_width(width):
    """No column is cut: all numbers and the roles can be read at 80 columns too."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(partition_parameters(Model(), [ParameterRule(role="embedding", options={"lr": 0.1})]).table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in ("embedding", "hidden", "vector", "matrix", "lr=0.1"):
        assert word in text


def test_long_names_break_after_dots():
    """And where there is no dot to break after, anywhere; nothing is lost."""
    names = ("layers.0.projection_in.weight", "a_name_that_is_long_without_any_dot.bias x12")
    printed = []
    for name in names:
        console = Console(width=16, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(ParameterName(name))
        printed.append([line.rstrip() for line in console.export_text().splitlines()])
    assert printed == [
        ["layers.0.", "projection_in.", "weight"],
        ["a_name_that_is_l", "ong_without_any_", "dot.bias x12"],
    ]


def test_names_with_brackets_are_no_markup():
    net = nn.ModuleDict({"[red]": nn.Linear(4, 4)})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(partition_parameters(net).table())
    assert "[red].weight" in console.export_text()


def test_large_counts():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(100_000, 40_000, bias=False), nn.Linear(40_000, 2, bias=False))
    assert "4 G of 4 G elements (100.0%)" in str(partition_parameters(net).table().caption)
