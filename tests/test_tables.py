"""What tables share: names that break at dots, and a console that is wide enough."""

from __future__ import annotations

import io
import os

import pytest
import rich
from rich.console import Console
from rich.table import Table

from lightning_muon.tables import DottedText, print_table, shortened


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("layers.0.projection_in.weight", ["layers.0.", "projection_in.", "weight"]),
        (
            "a_name_that_is_long_without_any_dot.bias x12",
            ["a_name_that_is_", "long_without_", "any_dot.bias x12"],
        ),
        (
            "scaled_dot_product: SelfAttentionOutputProjection",
            ["scaled_dot_", "product:", "SelfAttentionOut", "putProjection"],
        ),
    ],
)
def test_long_names_break_after_dots(text: str, lines: list[str]):
    """And where there is no dot to break after, after an underscore, or anywhere; nothing is lost."""
    console = Console(width=16, file=io.StringIO())
    console.print(DottedText(text))
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == lines


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (43, "encoder.layers.2.self_attn.in_proj_weight.q"),
        (42, "…layers.2.self_attn.in_proj_weight.q"),
        (29, "…2.self_attn.in_proj_weight.q"),
        (28, "…2…in_proj_weight.q"),
        (9, "…2…q"),
        (3, "….q"),
    ],
)
def test_a_shortened_name_keeps_its_end_and_its_layer(width: int, expected: str):
    assert shortened("encoder.layers.2.self_attn.in_proj_weight.q", width) == expected
    assert shortened("a_long_name.weight", 10) == "…me.weight"


@pytest.mark.parametrize(("columns", "width"), [(None, 100), ("70", 70)])
def test_output_that_is_no_terminal_is_wide_unless_told_otherwise(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)

    def no_terminal(descriptor: int) -> os.terminal_size:
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    shown = io.StringIO()
    rich.reconfigure(file=shown)
    try:
        print_table(Table("x" * 100, box=None, padding=0))
        assert max(map(len, shown.getvalue().split())) == width
        assert rich.get_console().width == (80 if columns is None else width)
    finally:
        rich.reconfigure()
