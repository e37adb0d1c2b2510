"""Optimizers of other packages, chosen in YAML: trained and resumed beside Muon, or in its place."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_muon import HybridOptimizer, Muon, MuonCLI
from lightning_muon.callbacks.create_graph import CreateGraph
from lightning_muon.callbacks.optimizer_modes import OptimizerModes
from tests.lightning_helpers import QUIET, Bare, Items, Net, assert_same, weights

BATCHES = 3  # an epoch
DEFAULTS = {"model": "examples.plain.Classifier", "data": "examples.plain.RandomTokens"}


@pytest.fixture(autouse=True)
def only_the_arguments_given(monkeypatch):
    """Pytest's own arguments are no command line of the CLI."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def optimizer(path: str, **more: Any) -> dict[str, Any]:
    """As it stands in YAML; keywords beyond the signature are for classes that take any."""
    pytest.importorskip(path.split(".", maxsplit=1)[0])
    return {"class_path": path, "init_args": {"lr": 1e-3}, **({"dict_kwargs": more} if more else {})}


def command(folder: Path, config: dict[str, Any], *args: Any, subcommand: str = "fit") -> MuonCLI:
    """``lightning-muon fit`` of a module and data given by path, from one YAML file."""
    config = {**DEFAULTS, **config}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    defaults = {**QUIET, "max_epochs": 2, "limit_train_batches": BATCHES, "gradient_clip_val": 0.5}
    return MuonCLI(
        args=[subcommand, "-c", str(path), *map(str, args)],
        save_config_callback=None,
        seed_everything_default=1,
        trainer_defaults=defaults,
    )


def epochs_kept(folder: Path) -> dict[str, Any]:
    """Settings that keep a checkpoint of each epoch."""
    checkpoint = {"dirpath": str(folder), "filename": "{epoch}", "save_top_k": -1, "enable_version_counter": False}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    return {"enable_checkpointing": True, "callbacks": [callback]}


def assert_trains_and_resumes(folder: Path, settings: dict[str, Any], plugins: tuple[str, ...] = ()) -> MuonCLI:
    """Two epochs at once and one after the other are the same, every parameter moves and so does every rate."""
    config = {**settings, "schedule": {"class_path": "lightning_muon.schedules.Cosine"}}
    config["trainer"] = {**epochs_kept(folder), "plugins": [{"class_path": plugin} for plugin in plugins]}
    whole = command(folder, config)
    start = torch.load(folder / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert not [name for name, weight in weights(whole.model).items() if torch.equal(weight, start[name])]
    for group in whole.trainer.optimizers[0].param_groups:
        assert float(group["lr"]) == pytest.approx(0.0, abs=1e-9)
        assert float(group["initial_lr"]) == pytest.approx(1e-3)
    resumed = command(folder, config, f"--ckpt_path={folder / 'epoch=0.ckpt'}")
    assert resumed.trainer.global_step == 2 * BATCHES
    assert_same(weights(resumed.model), weights(whole.model))
    return whole


OTHERS = {
    "Lion": "pytorch_optimizer.Lion",
    "AdaBelief": "pytorch_optimizer.AdaBelief",
    "EXAdam": "pytorch_optimizer.EXAdam",
    "DualAdam": "pytorch_optimizer.DualAdam",
    "APOLLO": "pytorch_optimizer.APOLLO",
    "SOAP": "pytorch_optimizer.SOAP",
    "AdEMAMix": "pytorch_optimizer.AdEMAMix",
    "Adan": "pytorch_optimizer.Adan",
    "Prodigy": "pytorch_optimizer.Prodigy",
    "AdaFactor, states in bfloat16": "pytorch_optimizer.AdaFactor",
    "StableSPAM, states of its own": "pytorch_optimizer.StableSPAM",
    "FlashAdamW, 8 bit": "pytorch_optimizer.FlashAdamW",
    "schedule-free AdamW of pytorch-optimizer": "pytorch_optimizer.ScheduleFreeAdamW",
    "schedule-free AdamW": "schedulefree.AdamWScheduleFree",
    "schedule-free SGD": "schedulefree.SGDScheduleFree",
    "AdamW, 8 bit, of bitsandbytes": "bitsandbytes.optim.AdamW8bit",
    "Lion, 8 bit, of bitsandbytes": "bitsandbytes.optim.Lion8bit",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizer(name, tmp_path):
    cli = assert_trains_and_resumes(tmp_path, {"other_optimizer": optimizer(OTHERS[name])})
    children = cli.trainer.optimizers[0].optimizers
    assert type(children["other"]).__name__ == OTHERS[name].split(".")[-1]
    assert type(children["matrix"]) is Muon


class OnTheCPU(TorchCheckpointIO):
    """Reads checkpoints as torch can read states of torchao: the Trainer's own way has a function for a device."""

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location="cpu", weights_only=weights_only)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
def test_other_optimizer_of_torchao(name, tmp_path):
    """Slow, because torchao compiles its step."""
    settings = {"other_optimizer": optimizer(f"torchao.optim.{name}")}
    cli = assert_trains_and_resumes(tmp_path, settings, plugins=("tests.test_foreign_yaml.OnTheCPU",))
    table = cli.trainer.optimizers[0].state[cli.model.embedding.weight]
    assert type(table["exp_avg"]) is not torch.Tensor


LOW_RANK = {"rank": 4, "update_proj_gap": 100, "scale": 1.0, "projection_type": "std"}  # projections are drawn once
MATRICES = {
    "SOAP": ("pytorch_optimizer.SOAP", {}),
    "Conda": ("pytorch_optimizer.Conda", {}),
    "APOLLO": ("pytorch_optimizer.APOLLO", LOW_RANK),
    "Muon": ("pytorch_optimizer.Muon", {}),
    "NorMuon": ("pytorch_optimizer.NorMuon", {}),
    "AdaMuon": ("pytorch_optimizer.AdaMuon", {}),
    "torch's Muon": ("torch.optim.Muon", {}),
    "schedule-free AdamW": ("schedulefree.AdamWScheduleFree", {}),
    "AdamW, 8 bit, of bitsandbytes": ("bitsandbytes.optim.AdamW8bit", {}),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_optimizer(name, tmp_path):
    path, more = MATRICES[name]
    settings = {"matrix_optimizer": optimizer(path, **more), "other_optimizer": optimizer("torch.optim.AdamW")}
    allowed = []
    if name in ("Conda", "APOLLO"):  # they keep an object in their state, in a hybrid or not
        allowed = [pytest.importorskip("pytorch_optimizer.optimizer.utils.galore").GaLoreProjector]
    with torch.serialization.safe_globals(allowed):
        assert_trains_and_resumes(tmp_path, settings)


def test_two_packages_in_one_hybrid_under_the_mixin(tmp_path):
    model = {
        "class_path": "tests.lightning_helpers.Net",
        "init_args": {
            "matrix_optimizer": optimizer("pytorch_optimizer.SOAP"),
            "other_optimizer": optimizer("schedulefree.AdamWScheduleFree"),
            "parameter_rules": [{"role": "embedding", "options": {"lr": 2e-3, "weight_decay": 0.01}}],
        },
    }
    config = {"model": model, "data": "tests.lightning_helpers.Items", "trainer": epochs_kept(tmp_path)}
    whole = command(tmp_path, config)
    children = whole.trainer.optimizers[0].optimizers
    assert [type(children[name]).__name__ for name in ("matrix", "other")] == ["SOAP", "AdamWScheduleFree"]
    assert {group["lr"] for group in children["other"].param_groups} == {1e-3, 2e-3}
    resumed = command(tmp_path, config, f"--ckpt_path={tmp_path / 'epoch=0.ckpt'}")
    assert_same(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("name", ["SophiaH", "AdaHessian"])
def test_second_order_optimizers_get_gradients_with_a_graph(name, tmp_path):
    """They would fail at the first step without; both draw random numbers, SophiaH in the first epoch only."""
    more = {"update_period": 2 * BATCHES} if name == "SophiaH" else {}
    config = {
        "model": "tests.lightning_helpers.Bare",  # torch has no second derivative of the example's EmbeddingBag
        "data": "tests.lightning_helpers.Items",
        "other_optimizer": {**optimizer(f"pytorch_optimizer.{name}"), "init_args": {"lr": 1e-3, **more}},
        "trainer": epochs_kept(tmp_path),
    }
    whole = command(tmp_path, config)
    hybrid, module = whole.trainer.optimizers[0], whole.model
    assert float(hybrid.state[module.layers.head.weight]["hessian"].abs().sum()) > 0.0
    assert "backward" not in vars(module)
    resumed = command(tmp_path, config, f"--ckpt_path={tmp_path / 'epoch=0.ckpt'}")
    if name == "SophiaH":
        assert_same(weights(resumed.model), weights(module))


def test_a_trainer_that_goes_on_with_another_module_keeps_no_graphs() -> None:
    """Callbacks stay with the Trainer; a second fit must not pay for what the first one needed."""
    optimizers = pytest.importorskip("pytorch_optimizer")
    trainer = pl.Trainer(**QUIET, max_epochs=1)
    trainer.fit(Net(other_optimizer=partial(optimizers.SophiaH, lr=1e-3)), Items(batches=1))
    kept = []

    class Plain(Net):
        def on_before_optimizer_step(self, optimizer):
            kept.extend(parameter.grad.grad_fn for parameter in self.parameters())

    trainer.fit_loop.max_epochs = 2
    trainer.fit(Plain(), Items(batches=1))
    assert kept
    assert kept == [None] * len(kept)


def test_second_order_optimizers_are_refused_beside_a_gradient_scaler(tmp_path):
    scaled = {"class_path": "lightning.pytorch.plugins.MixedPrecision"}
    scaled["init_args"] = {"precision": "16-mixed", "device": "cpu"}
    config = {"other_optimizer": optimizer("pytorch_optimizer.SophiaH"), "trainer": {"plugins": [scaled]}}
    with pytest.raises(RuntimeError, match=r"SophiaH differentiates the gradients.*without precision='16-mixed'"):
        command(tmp_path, config)


def test_second_order_optimizers_are_refused_in_several_processes(tmp_path, monkeypatch):
    """Each would see the Hessian of its own batches, and their weights would part."""
    cli = instantiated(tmp_path, {"other_optimizer": optimizer("pytorch_optimizer.SophiaH")})
    monkeypatch.setattr(type(cli.trainer), "world_size", 2)
    cli.model.trainer = cli.trainer
    with pytest.raises(RuntimeError, match=r"SophiaH differentiates the gradients.*in one process"):
        cli.model.configure_optimizers()


SCHEDULE_FREE = ("schedulefree.AdamWScheduleFree", "pytorch_optimizer.ScheduleFreeAdamW")


class Watch(pl.Callback):
    """Notes the mode and the weights of the schedule-free child in validation, in training and when saved."""

    def __init__(self) -> None:
        self.modes: dict[str, set[bool]] = {"train": set(), "validation": set()}
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.modes["train"] |= modes(trainer.optimizers[0])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.modes["validation"] |= modes(trainer.optimizers[0])

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(weights(pl_module))


class Forgetful(Bare):
    """Overrides the hooks that matter, and does not call super."""

    def on_fit_start(self): ...
    def on_train_start(self): ...
    def on_train_epoch_start(self): ...
    def on_train_batch_start(self, batch, batch_idx): ...
    def on_validation_start(self): ...
    def on_validation_end(self): ...
    def on_train_end(self): ...
    def on_save_checkpoint(self, checkpoint): ...
    def configure_callbacks(self):
        return []


def modes(hybrid: HybridOptimizer) -> set[bool]:
    """Whether the groups of the schedule-free child are on the weights to train on."""
    return {group["train_mode"] for group in hybrid.param_groups if "train_mode" in group}


def averages(module: pl.LightningModule, hybrid: HybridOptimizer) -> dict[str, torch.Tensor]:
    """The averaged weights of the schedule-free parameters by their definition, x = y + (1 - 1/beta) (z - y)."""
    found = {}
    for name, parameter in module.named_parameters():
        state = hybrid.state[parameter]
        if "z" in state:
            found[name] = torch.lerp(parameter.detach(), state["z"], 1.0 - 1.0 / 0.9)
    return found


@pytest.mark.parametrize("path", SCHEDULE_FREE)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_free_weights_are_where_they_belong(path, accumulate, tmp_path):
    """Trained in train mode; validated, saved and left behind as averages, whatever hooks the module overrides."""
    watch, expected = Watch(), []

    class Averages(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.is_last_batch:
                expected.append(averages(pl_module, trainer.optimizers[0]))

    config = {
        "model": "tests.test_foreign_yaml.Forgetful",
        "data": "tests.lightning_helpers.Items",
        "other_optimizer": optimizer(path),
    }
    trainer = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "accumulate_grad_batches": accumulate}
    cli = instantiated(tmp_path, {**config, "trainer": {**trainer, **epochs_kept(tmp_path)}})
    cli.trainer.callbacks[:0] = [watch, Averages()]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert watch.modes == {"train": {True}, "validation": {False}}
    assert len(expected) == 2
    for number, average in enumerate(expected):
        assert len(average) > 3
        validated = watch.validated[number + 1]  # the first is the sanity check
        saved = torch.load(tmp_path / f"epoch={number}.ckpt", weights_only=True)
        assert {group.get("train_mode", False) for group in saved["optimizer_states"][0]["param_groups"]} == {False}
        for name, value in average.items():
            torch.testing.assert_close(validated[name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(saved["state_dict"][name], validated[name])
    assert_same(weights(cli.model), watch.validated[-1])
    assert modes(cli.trainer.optimizers[0]) == {False}


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_in_the_middle_of_an_epoch_holds_averages(weights_only, tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                self.expected = averages(pl_module, trainer.optimizers[0])
                trainer.save_checkpoint(tmp_path / "middle.ckpt", weights_only=weights_only)

    saves = Saves()
    config = {"other_optimizer": optimizer("schedulefree.AdamWScheduleFree"), "trainer": {"max_epochs": 1}}
    cli = instantiated(tmp_path, config)
    cli.trainer.callbacks.append(saves)
    cli.trainer.fit(cli.model, cli.datamodule)
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    for name, value in saves.expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def test_an_interrupted_fit_leaves_averages_behind_and_no_hook(tmp_path):
    class Interrupts(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                raise ZeroDivisionError

    cli = instantiated(tmp_path, {"other_optimizer": optimizer("schedulefree.AdamWScheduleFree")})
    cli.trainer.callbacks.append(Interrupts())
    with pytest.raises(ZeroDivisionError):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert modes(cli.trainer.optimizers[0]) == {False}
    assert not cli.model._state_dict_pre_hooks


def test_callbacks_are_added_only_where_an_optimizer_needs_them(tmp_path):
    cli = command(tmp_path, {"trainer": {"fast_dev_run": True}})
    assert not any(isinstance(callback, (CreateGraph, OptimizerModes)) for callback in cli.trainer.callbacks)
    config = {"other_optimizer": optimizer("schedulefree.AdamWScheduleFree")}
    own = {"class_path": "lightning_muon.callbacks.optimizer_modes.OptimizerModes"}
    for callbacks in ([], [own]):
        cli = command(tmp_path, {**config, "trainer": {"fast_dev_run": True, "callbacks": callbacks}})
        assert sum(isinstance(callback, OptimizerModes) for callback in cli.trainer.callbacks) == 1


def instantiated(folder: Path, config: dict[str, Any]) -> MuonCLI:
    """Model, data and Trainer of a YAML file, before anything runs."""
    path = folder / "config.yaml"
    trainer = {**QUIET, "max_epochs": 2, "limit_train_batches": BATCHES, **config.get("trainer", {})}
    path.write_text(yaml.safe_dump({**DEFAULTS, **config, "trainer": trainer}))
    return MuonCLI(args=["-c", str(path)], run=False, save_config_callback=None, seed_everything_default=1)


REFUSED = {
    "LBFGS": ("torch.optim.LBFGS", {}, "LBFGS"),
    "LBFGS of one group": ("torch.optim.LBFGS", {"matrix": True}, "LBFGS, whose step must evaluate the model"),
    "SAM": ("pytorch_optimizer.SAM", {"base_optimizer": "torch.optim.SGD"}, "SAM, a wrapper of SGD"),
    "Lookahead": ("pytorch_optimizer.Lookahead", {}, "Lookahead cannot be the optimizer of 'other'"),
    "AliG": ("pytorch_optimizer.AliG", {}, "AliG, whose step must evaluate the model"),
    "AdamMini": ("pytorch_optimizer.AdamMini", {}, "AdamMini cannot be the optimizer of 'other'.*takes the model"),
    "a closure of schedulefree": ("schedulefree.SGDScheduleFreeClosure", {}, "SGDScheduleFreeClosure, whose step must"),
    "CPU offload": ("torchao.optim.CPUOffloadOptimizer", {}, "CPUOffloadOptimizer cannot be the optimizer of 'other'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(name, tmp_path):
    path, arguments, message = REFUSED[name]
    arguments = dict(arguments)
    setting = "matrix_optimizer" if arguments.pop("matrix", False) else "other_optimizer"
    pytest.importorskip(path.split(".", maxsplit=1)[0])
    cli = instantiated(tmp_path, {setting: {"class_path": path, "init_args": arguments}})
    with pytest.raises(Exception, match=message):
        cli.model.configure_optimizers()
