"""Weights that not Lightning saved: where they lie in their file, what wrapped them, and what cannot be read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.diagnostics.spectra.commands import matrices, refusal, rows, shown
from tests.lightning_helpers import Bare

NET = "tests.lightning_helpers.Net"


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))


class Holder(Bare):
    """A LightningModule that itself calls what it trains ``module``."""

    def __init__(self):
        super().__init__()
        self.module = self.layers
        del self.layers

    def forward(self, items):
        return self.module(items)


# Wrapped in DistributedDataParallel or DataParallel


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_the_prefix_of_parallel_wrappers_is_left_out(key, tmp_path, capsys):
    plain = two_layers()
    state = nn.DataParallel(plain).state_dict()
    torch.save(state if key is None else {key: state}, tmp_path / "parallel.pt")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    shown(capsys, tmp_path / "parallel.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["0.weight", "1.weight"]
    shown(capsys, tmp_path / "parallel.pt", tmp_path / "plain.pt", "--output", tmp_path)
    found = rows(tmp_path)
    for name in ("0.weight", "1.weight"):
        assert found["parallel.pt", "spectral_norm", name] == found["plain.pt", "spectral_norm", name]


def test_the_prefix_is_left_out_behind_that_of_a_compiled_module_too(tmp_path, capsys):
    compiled = torch.compile(nn.DataParallel(two_layers()), backend="eager")
    torch.save(compiled.state_dict(), tmp_path / "a.pt")
    shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["0.weight", "1.weight"]


def test_the_prefix_stays_where_not_all_tensors_have_it(tmp_path, capsys):
    torch.save({"module.weight": torch.eye(3), "head.weight": torch.eye(3)}, tmp_path / "a.pt")
    shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["module.weight", "head.weight"]


def test_names_in_lightning_checkpoints_stay_as_they_are(tmp_path, capsys):
    path = tmp_path / "holder.ckpt"
    module = Holder()
    torch.save(
        {"state_dict": module.state_dict(), "global_step": 1, "pytorch-lightning_version": "2.5.0"},
        path,
    )
    shown(capsys, path, "--output", tmp_path)
    assert matrices(tmp_path) == [name for name, tensor in module.state_dict().items() if tensor.ndim > 1]


# One key deep


@pytest.mark.parametrize("key", ["model", "model_state_dict", "module"])
def test_state_dicts_one_key_deep_are_read_and_the_output_says_so(key, tmp_path, capsys):
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "optimizer": optimizer.state_dict(), key: model.state_dict(), "rng": torch.ones(9).byte()}
    torch.save({**content, "loss": torch.tensor(0.5)}, tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    printed = shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert f"Of {tmp_path / 'a.pt'} the state dict under '{key}' is read." in printed
    found = rows(tmp_path)
    assert "is read." not in shown(capsys, tmp_path / "plain.pt", "--output", tmp_path)
    expected = {(quantity, name): value for (_, quantity, name), value in rows(tmp_path).items()}
    assert {(quantity, name): value for (_, quantity, name), value in found.items()} == expected


def test_of_several_state_dicts_the_first_is_read_and_the_others_are_named(tmp_path, capsys):
    parts = {name: {f"{name}.weight": torch.eye(3)} for name in ("generator", "discriminator", "ema")}
    torch.save(parts, tmp_path / "a.pt")
    printed = shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["generator.weight"]
    assert "under 'generator' is read, and not what is under 'discriminator', 'ema'." in printed


def test_tensors_at_the_top_come_before_deeper_ones(tmp_path, capsys):
    torch.save({"weight": torch.eye(3), "extra": {"cache": torch.eye(2)}}, tmp_path / "a.pt")
    printed = shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["weight"]
    assert "is read" not in printed


# What cannot be read


def test_tensors_without_values_are_refused(tmp_path, capsys):
    with torch.device("meta"):
        state = two_layers().state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"model": state}, tmp_path / "deep.pt")
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    for arguments in (["a.pt"], ["deep.pt"], ["a.ckpt"], ["a.ckpt", "--model", NET]):
        error = refusal(capsys, tmp_path / arguments[0], *arguments[1:])
        assert f"{tmp_path / arguments[0]} has tensors without values" in error
        assert "'0.weight'" in error
        assert "does not load" not in error


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.pt", "last.pth", "last.ckpt"])
def test_a_folder_names_the_checkpoints_in_it(name, tmp_path, capsys):
    (tmp_path / "version_0").mkdir()
    path = tmp_path / "version_0" / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"weight": torch.eye(3)}, path)
    (tmp_path / "version_0" / "config.json").touch()
    assert refusal(capsys, tmp_path).strip().endswith(f"is a folder, not a checkpoint. In it: {path}.")


def test_a_folder_names_lightnings_checkpoints_first_and_not_too_many(tmp_path, capsys):
    for index in range(6):
        (tmp_path / f"{index}.bin").touch()
    (tmp_path / "z.ckpt").touch()
    error = refusal(capsys, tmp_path)
    assert f"In it: {tmp_path / 'z.ckpt'}, {tmp_path / '0.bin'}" in error
    assert "3.bin, ..." in error
    assert "4.bin" not in error


def test_a_folder_without_checkpoints(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    assert "no .ckpt, .safetensors, .pt, .pth or .bin file" in refusal(capsys, tmp_path)
