"""``lightning-muon spectra``: what it prints and writes of one, two and more checkpoints, and its arguments."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import rich
import torch

from lightning_muon import cli as cli_module
from tests.diagnostics.spectra.commands import matrices, refusal, rows, shown

# One checkpoint


def test_csv_has_the_step(runs, tmp_path, capsys):
    shown(capsys, runs / "net2.ckpt", "--output", tmp_path / "new" / "folder")
    lines = (tmp_path / "new" / "folder" / "spectra.csv").read_text().splitlines()
    assert lines[0] == "checkpoint,step,quantity,matrix,value"
    assert lines[1].startswith("net2.ckpt,2,spectral_norm,layers.up.weight,")
    assert len(lines) == 1 + 5 * 2


def test_output_is_a_folder_in_the_current_directory_by_default(runs, tmp_path, capsys, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    printed = shown(capsys, runs / "net2.ckpt")
    files = ["spectra.csv", "singular_values.png"]
    assert sorted(path.name for path in (tmp_path / "spectra").iterdir()) == sorted(files)
    assert [line for line in printed.splitlines() if line.startswith("Wrote")] == [f"Wrote spectra/{f}" for f in files]
    assert (tmp_path / "spectra" / "singular_values.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width, runs, tmp_path, capsys):
    rich.reconfigure(width=width)
    for files in (["net2"], ["net2", "net7"], ["net2", "net7", "net12"]):
        printed = shown(capsys, *(runs / f"{name}.ckpt" for name in files), "--output", tmp_path / "o")
        assert "…" not in printed
        assert "net7.ckpt" in printed or len(files) == 1
        assert max(len(line) for line in printed.splitlines() if not line.startswith("Wrote")) <= width


def test_broken_matrices_are_named_and_do_not_hide_the_others(tmp_path, capsys, figures):
    torch.save({"good": torch.eye(3), "bad": torch.full((3, 3), torch.nan)}, tmp_path / "a.pt")
    printed = shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert "NaN or infinity in a.pt: bad." in printed
    assert rows(tmp_path)["a.pt", "stable_rank", "good"] == pytest.approx(3.0)
    assert np.isnan(rows(tmp_path)["a.pt", "stable_rank", "bad"])


def test_include_shows_other_parameters_too_and_exclude_removes(runs, tmp_path, capsys):
    path = runs / "fused.ckpt"
    shown(capsys, path, "--output", tmp_path, "--include", "*.embed.*", "--include", "*in_proj*", "*.head.*")
    blocks = [f"layers.attention.in_proj_weight.{index}" for index in range(3)]
    assert matrices(tmp_path) == ["layers.embed.weight", *blocks, "layers.head.weight"]
    shown(capsys, path, "--output", tmp_path, "--exclude", "*.gru.*", "*.mix.*")
    assert matrices(tmp_path) == [*blocks, "layers.attention.out_proj.weight"]


def test_large_matrices_are_left_out_and_named(tmp_path, capsys):
    torch.save({"small": torch.randn(3, 50), "large": torch.randn(6, 5)}, tmp_path / "a.pt")
    printed = shown(capsys, tmp_path / "a.pt", "--max_size", 4, "--output", tmp_path)
    assert matrices(tmp_path) == ["small"]
    assert "with a smaller side above 4 (--max_size): large." in printed


# Two checkpoints


def test_two_checkpoints_are_compared(tmp_path, capsys, figures):
    torch.save({"a": 2 * torch.eye(4), "b": torch.eye(3)}, tmp_path / "first.pt")
    torch.save({"a": 3 * torch.eye(4), "b": torch.diag(torch.tensor([1.0, 1.0, 0.0]))}, tmp_path / "second.pt")
    printed = shown(capsys, tmp_path / "first.pt", tmp_path / "second.pt", "--output", tmp_path)
    assert "first.pt -> second.pt" in printed
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines() if line.strip()}
    assert lines["a"] == "2.00 -> 3.00 +50.0 % 4.00 -> 4.00 +0.0 % 4.00 -> 4.00 +0.0 %"
    assert lines["b"] == "1.00 -> 1.00 +0.0 % 3.00 -> 2.00 -33.3 % 3.00 -> 2.00 -33.3 %"
    assert lines["mean"] == "of 2 1.50 -> 2.00 +33.3 % 3.50 -> 3.00 -14.3 % 3.50 -> 3.00 -14.3 %"
    assert {checkpoint for checkpoint, _, _ in rows(tmp_path)} == {"first.pt", "second.pt"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["singular_values.png"]


def test_rows_stand_in_the_models_order(runs, tmp_path, capsys):
    printed = shown(capsys, runs / "net7.ckpt", runs / "net2.ckpt", "--output", tmp_path)
    assert printed.index("layers.up.weight") < printed.index("layers.down.weight")
    assert "net7.ckpt (step 7) -> net2.ckpt (step 2)" in printed


def test_checkpoints_of_the_same_name_are_told_apart_by_their_folders(tmp_path, capsys):
    for version in ("version_0", "version_1"):
        (tmp_path / version / "checkpoints").mkdir(parents=True)
        torch.save({"weight": torch.randn(3, 3)}, tmp_path / version / "checkpoints" / "last.pt")
    files = [tmp_path / version / "checkpoints" / "last.pt" for version in ("version_0", "version_1")]
    printed = shown(capsys, *files, "--output", tmp_path)
    assert "version_0/checkpoints/last.pt -> version_1/checkpoints/last.pt" in printed
    assert len(rows(tmp_path)) == 2 * 5


def test_what_does_not_agree_is_named_and_left_out(tmp_path, capsys):
    torch.save({"same": torch.eye(3), "grew": torch.eye(3), "gone": torch.eye(2)}, tmp_path / "a.pt")
    torch.save({"same": torch.eye(3), "grew": torch.eye(4)}, tmp_path / "b.pt")
    printed = shown(capsys, tmp_path / "a.pt", tmp_path / "b.pt", "--output", tmp_path)
    assert "mean of 1" in printed
    assert "Not in every checkpoint, and left out of the comparison: gone." in printed
    assert "Of different shapes, and left out of the comparison: grew (3 x 3, 4 x 4)." in printed
    assert ("a.pt", "spectral_norm", "gone") in rows(tmp_path)


# More checkpoints


def test_more_checkpoints_stand_in_the_order_of_their_steps(runs, tmp_path, capsys, figures):
    files = [runs / f"net{step}.ckpt" for step in (12, 2, 7)]
    printed = shown(capsys, *files, "--output", tmp_path)
    names = [line.split()[0] for line in printed.splitlines() if line.strip().startswith("net")]
    assert names == ["net2.ckpt", "net7.ckpt", "net12.ckpt"]
    found = rows(tmp_path)
    line = next(line for line in printed.splitlines() if "net7.ckpt" in line).split()
    expected = [7.0]
    for quantity, extreme in (("spectral_norm", max), ("stable_rank", min), ("effective_rank", min)):
        values = [found["net7.ckpt", quantity, f"layers.{name}.weight"] for name in ("up", "down")]
        expected += [sum(values) / 2, extreme(values)]
    assert [float(word) for word in line[1:]] == pytest.approx(expected, rel=1e-3)
    figures = {"singular_values.png", "spectral_norm.png", "stable_rank.png", "effective_rank.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == figures


def test_more_checkpoints_without_steps_keep_their_order(tmp_path, capsys, figures):
    for name in "bca":
        torch.save({"weight": torch.randn(3, 3)}, tmp_path / f"{name}.pt")
    printed = shown(capsys, *(tmp_path / f"{name}.pt" for name in "bca"), "--output", tmp_path)
    assert printed.index("b.pt") < printed.index("c.pt") < printed.index("a.pt")
    assert (tmp_path / "stable_rank.png").exists()


def test_without_matplotlib_there_is_the_csv_and_a_hint(runs, tmp_path, capsys):
    printed = shown(capsys, *(runs / f"net{step}.ckpt" for step in (2, 7, 12)), "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["spectra.csv"]
    assert "Figures take matplotlib: pip install matplotlib" in printed


# Errors


def test_nothing_to_show(runs, tmp_path, capsys):
    torch.save({"bias": torch.ones(3)}, tmp_path / "vectors.pt")
    assert "No tensor has two dimensions" in refusal(capsys, tmp_path / "vectors.pt")
    assert "No matrix to show" in refusal(capsys, runs / "net2.ckpt", "--exclude", "*", "--output", tmp_path)
    assert "larger than --max_size" in refusal(capsys, runs / "net2.ckpt", "--max_size", 2, "--output", tmp_path)
    nothing_in_common = refusal(capsys, runs / "net2.ckpt", runs / "fused.ckpt", "--output", tmp_path)
    assert "no matrix of the same name and shape" in nothing_in_common


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_globs_that_match_nothing_get_near_names(option, runs, capsys):
    error = refusal(capsys, runs / "net2.ckpt", option, "*.upp.weight")
    assert "'*.upp.weight'" in error
    assert "layers.up.weight" in error


def test_arguments_that_make_no_sense(runs, tmp_path, capsys):
    assert "max_size must be 1 or more, got 0" in refusal(capsys, runs / "net2.ckpt", "--max_size", 0)
    (tmp_path / "file").touch()
    assert "is a file" in refusal(capsys, runs / "net2.ckpt", "--output", tmp_path / "file")


# The console script


def test_console_script_has_the_subcommand(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-muon", "spectra", str(runs / "net2.ckpt"), "--output", str(tmp_path)])
    cli_module.main()
    assert "layers.up.weight" in capsys.readouterr().out
    assert (tmp_path / "spectra.csv").exists()


def test_console_script_mentions_the_subcommand(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-muon"])
    with pytest.raises(SystemExit) as error:
        cli_module.main(["--help"])
    assert error.value.code == 0
    assert "lightning-muon spectra" in " ".join(capsys.readouterr().out.split())
