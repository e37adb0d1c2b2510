"""What checkpoints say about their matrices, how ``lightning-muon spectra`` reads them, and which it refuses."""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_muon import MuonCLI, MuonMixin, ParameterRule
from lightning_muon.diagnostics.spectra import checkpoints as checkpoints_module
from lightning_muon.partition import MatrixLayout
from tests.diagnostics.spectra.commands import matrices, refusal, rows, shown
from tests.diagnostics.spectra.fused import Fused, FusedLayers, fused_matrices
from tests.lightning_helpers import QUIET, Bare, Items, Layers, Net, fit

HELPERS = "tests.lightning_helpers"
NAMESPACES = pytest.mark.parametrize("library", [pl, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])


def reference(matrix):
    """The quantities of one matrix, from numpy's singular values in float64."""
    values = np.linalg.svd(matrix.double().flatten(1).numpy(), compute_uv=False)
    shares = values / values.sum()
    return {
        "spectral_norm": values[0],
        "stable_rank": (values**2).sum() / values[0] ** 2,
        "participation_ratio": (values**2).sum() ** 2 / (values**4).sum(),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "condition_number": values[0] / values[-1],
    }


# What MuonMixin writes into checkpoints


@NAMESPACES
def test_checkpoints_say_how_matrices_are_read(library, tmp_path):
    class Module(MuonMixin, library.LightningModule):
        def __init__(self):
            super().__init__(parameter_rules=[ParameterRule(pattern="layers.gru.weight_hh_l0", group="other")])
            self.layers = FusedLayers()

        training_step = Bare.training_step

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*torch.zeros(2, 4, 5).long()))

    module = Module()
    fitted = library.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    fitted.fit(module)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    layouts = torch.load(tmp_path / "last.ckpt", weights_only=True)["matrix_layouts"]
    assert layouts == {
        "layers.attention.in_proj_weight": {"split": [8, 8, 8]},
        "layers.attention.out_proj.weight": {},
        "layers.gru.weight_ih_l0": {"split": [6, 6, 6]},
        "layers.mix.weight": {},
    }
    assert {name: MatrixLayout(**fields) for name, fields in layouts.items()} == {
        entry.name: entry.layout for entry in module.partition() if entry.group == "matrix"
    }


def test_checkpoints_of_weights_alone_say_it_too(tmp_path):
    fit(Net()).save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "layers.up.weight" in torch.load(tmp_path / "weights.ckpt", weights_only=True)["matrix_layouts"]


def test_what_other_bases_write_is_kept():
    class Base(Bare):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["base"] = 1

    class Module(MuonMixin, Base):
        pass

    checkpoint = {}
    Module().on_save_checkpoint(checkpoint)
    assert checkpoint["base"] == 1
    assert checkpoint["matrix_layouts"] == {"layers.up.weight": {}, "layers.down.weight": {}}


def test_a_partition_that_fails_loses_no_checkpoint():
    module = Net(parameter_rules=[ParameterRule(pattern="gone.*", group="other")])
    checkpoint = {}
    with pytest.warns(UserWarning, match="does not say how matrices are read: .*gone"):
        module.on_save_checkpoint(checkpoint)
    assert checkpoint == {}


# Reading


def test_every_block_of_fused_parameters_is_measured_exactly(runs, tmp_path, capsys):
    printed = shown(capsys, runs / "fused.ckpt", "--output", tmp_path)
    state = torch.load(runs / "fused.ckpt", weights_only=True)["state_dict"]
    found = rows(tmp_path)
    expected = {name: reference(matrix) for name, matrix in fused_matrices(state).items()}
    assert matrices(tmp_path) == list(expected)
    for name, quantities in expected.items():
        for quantity, value in quantities.items():
            assert found["fused.ckpt", quantity, name] == pytest.approx(value, rel=1e-4), (quantity, name)
    line = next(line for line in printed.splitlines() if "layers.gru.weight_ih_l0.1" in line)
    assert "6 x 8" in line
    assert [float(word) for word in line.split()[-5:]] == pytest.approx(
        list(expected["layers.gru.weight_ih_l0.1"].values()), rel=2e-3
    )
    assert "6 x 18" in printed
    assert "Nothing says" not in printed
    norms = [value for (_, quantity, _), value in found.items() if quantity == "spectral_norm"]
    mean = next(line for line in printed.splitlines() if "mean of 11" in line)
    assert float(mean.split()[3]) == pytest.approx(np.mean(norms), rel=1e-3)


def test_without_layouts_all_matrices_are_shown_and_the_model_asked_for(runs, tmp_path, capsys):
    printed = shown(capsys, runs / "baseline.ckpt", "--output", tmp_path)
    assert matrices(tmp_path) == [f"layers.{name}.weight" for name in ("embed", "up", "down", "head")]
    assert "Nothing says which tensors are matrices" in printed
    assert "--model my.Module" in printed


def test_model_says_which_tensors_are_matrices(runs, tmp_path, capsys):
    printed = shown(capsys, runs / "baseline.ckpt", "--model", f"{HELPERS}.Bare", "--output", tmp_path)
    assert matrices(tmp_path) == ["layers.up.weight", "layers.down.weight"]
    assert "Nothing says" not in printed


def test_model_wins_over_the_checkpoint(tmp_path, capsys):
    module = Net(parameter_rules=[ParameterRule(pattern="*.up.weight", group="other")])
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    shown(capsys, tmp_path / "a.ckpt", "--output", tmp_path)
    assert matrices(tmp_path) == ["layers.down.weight"]
    shown(capsys, tmp_path / "a.ckpt", "--model", f"{HELPERS}.Net", "--output", tmp_path)
    assert matrices(tmp_path) == ["layers.up.weight", "layers.down.weight"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", "legacy"])
def test_plain_state_dicts(suffix, tmp_path, capsys):
    state = FusedLayers().state_dict()
    path = tmp_path / f"weights{suffix.replace('legacy', '.pth')}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix != "legacy")
    printed = shown(capsys, path, "--output", tmp_path)
    found = rows(tmp_path)
    assert set(matrices(tmp_path)) == {name for name, tensor in state.items() if tensor.ndim > 1}
    for quantity, value in reference(state["mix.weight"]).items():
        assert found[path.name, quantity, "mix.weight"] == pytest.approx(value, rel=1e-4)
    assert "plain state dicts" in printed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_point_type_is_read(dtype, tmp_path, capsys):
    weight = torch.randn(6, 4).to(dtype)
    others = {"indices": torch.ones(3, 3).long(), "bias": torch.ones(3), "empty": torch.ones(0, 3)}
    torch.save({"weight": weight, **others}, tmp_path / "a.pt")
    shown(capsys, tmp_path / "a.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["weight"]
    assert rows(tmp_path)["a.pt", "spectral_norm", "weight"] == pytest.approx(
        reference(weight.float())["spectral_norm"], rel=1e-5
    )


def test_shared_tensors_are_measured_once(tmp_path, capsys):
    module = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    module["head"].weight = module["embed"].weight
    torch.save(module.state_dict(), tmp_path / "tied.pt")
    shown(capsys, tmp_path / "tied.pt", "--output", tmp_path)
    assert matrices(tmp_path) == ["embed.weight"]
    shown(capsys, tmp_path / "tied.pt", "--include", "head.*", "--output", tmp_path)
    assert matrices(tmp_path) == ["embed.weight"]


def test_names_have_no_prefixes_of_wrappers(tmp_path, capsys):
    class Compiled(Fused):
        def __init__(self):
            super().__init__()
            self.layers = torch.compile(self.layers, backend="eager")

    module = Compiled()
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "compiled.ckpt")
    shown(capsys, tmp_path / "compiled.ckpt", "--output", tmp_path)
    assert matrices(tmp_path) == list(fused_matrices(Fused().state_dict()))


def test_a_checkpoint_without_layouts_is_read_as_the_other(runs, tmp_path, capsys):
    printed = shown(capsys, runs / "baseline.ckpt", runs / "net7.ckpt", "--output", tmp_path)
    assert matrices(tmp_path) == ["layers.up.weight", "layers.down.weight"]
    assert f"it is read as {runs / 'net7.ckpt'} is." in printed


# Refusing


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("model: 1")
    (tmp_path / "empty.ckpt").touch()
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([torch.ones(2, 2)], tmp_path / "list.pt")
    torch.save({"epoch": 3, "parts": {"model": {"weight": torch.ones(2, 2)}}}, tmp_path / "nested.pt")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    (tmp_path / "text.safetensors").write_text("model: 1")
    expected = {
        "text.ckpt": "torch.save did not write it",
        "empty.ckpt": "the file is empty",
        "module.pt": "torch.nn.modules.linear.Linear",
        "list.pt": "an object of type list",
        "nested.pt": "Its keys: epoch, parts.",
        "half.pt": "not all of it is there",
        "text.safetensors": "is not a safetensors file",
        "absent.ckpt": "No such file",
        ".": "is a folder, not a checkpoint. In it: ",
    }
    for name, words in expected.items():
        assert words in refusal(capsys, tmp_path / name), name


def test_a_mistyped_path_gets_near_names(runs, capsys):
    assert "Near names: net7.ckpt, net2.ckpt" in refusal(capsys, runs / "net8.ckpt")


def test_sharded_checkpoints_are_to_be_consolidated(tmp_path, capsys):
    (tmp_path / "epoch.ckpt").mkdir()
    (tmp_path / "epoch.ckpt" / ".metadata").touch()
    assert "consolidate_checkpoint" in refusal(capsys, tmp_path / "epoch.ckpt")


def test_safetensors_without_the_package(tmp_path, capsys, monkeypatch):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(checkpoints_module, "find_spec", lambda name: None)
    assert "pip install safetensors" in refusal(capsys, tmp_path / "a.safetensors")


def test_layouts_that_do_not_fit(tmp_path, capsys):
    state = {"state_dict": {"weight": torch.ones(4, 4)}}
    torch.save({**state, "matrix_layouts": {"weight": {"split": [3, 3]}}}, tmp_path / "split.ckpt")
    torch.save({**state, "matrix_layouts": {"weight": {"unknown": 1}}}, tmp_path / "unknown.ckpt")
    assert "'weight'" in refusal(capsys, tmp_path / "split.ckpt")
    assert "is not what MuonMixin writes" in refusal(capsys, tmp_path / "unknown.ckpt")


def test_models_that_do_not_load(runs, tmp_path, capsys):
    path = runs / "net2.ckpt"
    assert "no attribute 'Nett'" in refusal(capsys, path, "--model", f"{HELPERS}.Nett")
    assert "No module named 'nowhere'" in refusal(capsys, path, "--model", "nowhere.Net")
    assert "is no LightningModule" in refusal(capsys, path, "--model", "torch.nn.Linear")
    mismatch = refusal(capsys, runs / "fused.ckpt", "--model", f"{HELPERS}.Net")
    assert "Net does not load" in mismatch
    assert "Missing key(s)" in mismatch
    torch.save(Layers(5, 4).state_dict(), tmp_path / "a.pt")
    assert "plain state dict" in refusal(capsys, tmp_path / "a.pt", "--model", f"{HELPERS}.Net")


class Hooked(Bare):
    """Without the mixin, and with something of its own to save."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 1


def test_checkpoints_of_modules_without_the_mixin_say_it_under_the_cli(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    rule = [{"pattern": "*.up.weight", "split": 2}]
    cli = MuonCLI(
        Hooked,
        Items,
        args=["fit", "--parameter_rules", json.dumps(rule)],
        save_config_callback=None,
        trainer_defaults={**QUIET, "max_steps": 1},
    )
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    checkpoint = torch.load(tmp_path / "cli.ckpt", weights_only=True)
    assert checkpoint["own"] == 1
    assert checkpoint["matrix_layouts"] == {"layers.up.weight": {"split": [8, 8]}, "layers.down.weight": {}}
