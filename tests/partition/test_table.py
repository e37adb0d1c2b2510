"""The table of a partition: what stands in its rows and under it, at usual widths."""

from __future__ import annotations

import io
from itertools import groupby

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_muon.partition import ParameterRule, partition_parameters


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(1000, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(12))
        self.scores = nn.Linear(16, 1000)


def rows(module: nn.Module, *rules: ParameterRule) -> dict[str, list[str]]:
    """Cells by what stands in the first column."""
    return {row.name: list(row[1:5]) for row in partition_parameters(module, rules).table().rows}


def caption(module: nn.Module, *rules: ParameterRule) -> str:
    return partition_parameters(module, rules).table().caption


def printed(module: nn.Module, width: int, *rules: ParameterRule) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(partition_parameters(module, rules).table())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


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


def test_options_stand_below_the_group():
    cells = rows(Model(), ParameterRule(role="embedding", options={"lr": 0.1, "weight_decay": 0.0}))
    assert cells["items.weight"][2] == "other\nlr=0.1\nweight_decay=0.0"
    assert cells["scores.weight"][2] == "other"


def test_frozen_parameters_say_so():
    model = Model()
    model.items.requires_grad_(False)
    assert rows(model)["items.weight"][2] == "frozen"
    assert "frozen: 1 parameter, 16 k elements, in no optimizer" in caption(model)


def test_caption_counts_matrices_and_elements():
    """Per block 3 + 1 + 1 + 1 matrices and 3 * 256 + 256 + 2 * 512 = 2048 elements in them."""
    shown = caption(Model())
    vectors = 12 * (48 + 16 + 32 + 16 + 4 * 16) + 1000
    total = 24576 + vectors + 2 * 16000
    assert f"matrix: 72 matrices in 48 parameters, 24.6 k of {total / 1000:.1f} k elements" in shown
    assert f"({100 * 24576 / total:.1f}%)" in shown
    assert "param groups: other/embedding, matrix, other/vector, other/head" in shown


def test_caption_of_one():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(1, bias=False))
    shown = caption(net, ParameterRule(pattern="0.weight", group="matrix"))
    assert "matrix: 1 matrix in 1 parameter, 16 of 17 elements (94.1%)" in shown
    assert "other: 1 parameter, 1 of 17 elements (5.9%)" in shown
    net[0].requires_grad_(False)
    shown = caption(net)
    assert "matrix: 0 matrices in 0 parameters, 0 of 1 element (0.0%)" in shown
    assert "frozen: 1 parameter, 16 elements, in no optimizer" in shown


class Unwieldy(nn.Module):
    """Deep, with long names and a class whose path is long."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"multi_head_self_attention": nn.ModuleDict({"output_projection": nn.Linear(8, 8)})})
        self.encoder = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})
        self.a_name_that_is_long_without_any_dot_in_it_at_all = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.recurrent = nn.GRU(8, 8, num_layers=2)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", [Model, Unwieldy])
def test_nothing_is_cut_off(kind: type[nn.Module], width: int):
    """Whole words and numbers in lines that fit, in rows of a few lines."""
    options = ParameterRule(role="hidden", options={"lr": 0.003, "weight_decay": 0.0})
    module = kind()
    lines = printed(module, width, options)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    table = partition_parameters(module, [options]).table()
    squeezed = "".join("".join(lines).split())
    for row in table.rows:
        assert row.role in squeezed
        assert all(option in squeezed for option in row.group.split("\n"))
        assert "".join(row.reason.split()) in _columns(lines)
        assert "".join(row.name.split()) in _columns(lines)
    body = lines[next(index for index, line in enumerate(lines) if "───" in line) + 1 :]
    starts = [any(f" {row.role} " in line for row in table.rows) for line in body[: body.index("")]]
    assert max(len(list(rest)) for started, rest in groupby(starts) if not started) < 7


def test_reasons_stand_below_where_names_need_the_room():
    lines = printed(Model(), 90)
    (row,) = (line for line in lines if "scores.weight" in line)
    number = row.removesuffix("]")[-1]
    assert row.endswith(f"Output head [{number}]")
    note = next(index for index, line in enumerate(lines) if line.startswith(f"[{number}] Output head: "))
    assert lines[note + 1].startswith("    ")
    assert "[1]" not in "".join(printed(Model(), 200))


def _columns(lines: list[str]) -> str:
    """What stands in the columns, one column after another, and what stands below, without spaces."""
    rule = next(index for index, line in enumerate(lines) if "───" in line)
    end = next(index for index, line in enumerate(lines) if index > rule and not line)
    header = lines[rule - 1]
    starts = [header.index(word) for word in ("parameters", "shape", "role", "group", "reason")]
    body = lines[rule + 1 : end]
    cells = ["".join(line[a:b] for line in body) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return "".join("".join([*cells, *lines[end:]]).split())


def test_names_with_brackets_are_no_markup():
    assert any("[red].weight" in line for line in printed(nn.ModuleDict({"[red]": nn.Linear(4, 4)}), 100))


def test_large_counts():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(100_000, 40_000, bias=False), nn.Linear(40_000, 2, bias=False))
    assert "4 G of 4 G elements (100.0%)" in caption(net)
