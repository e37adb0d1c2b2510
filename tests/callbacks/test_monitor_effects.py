"""Monitors only look: a fit ends the same with and without them, and nothing of theirs stays behind."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_muon import Muon, MuonHyperball, NorMuon
from lightning_muon.callbacks import SpectralNormMonitor
from tests.callbacks.monitor_runs import Dropped, Plain, Recorder, monitors, table_rows, watched
from tests.lightning_helpers import Items, Net, assert_same, fit, trainer, weights

STEPS = 20
MUON = partial(Net, matrix_optimizer=partial(Muon, lr=0.02, weight_decay=0.1))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The same training


def outcome(make: Callable[[], pl.LightningModule], callbacks: list[pl.Callback], **kwargs: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    random.seed(3)
    module = make()
    fitted, recorder = watched(module, callbacks, **{"max_steps": STEPS, **kwargs})
    assert fitted.global_step == kwargs.get("max_steps", STEPS)
    return {
        "weights": weights(module),
        "optimizer": fitted.optimizers[0].state_dict(),
        "random": (torch.get_rng_state(), random.getstate()),
        "recorder": recorder,
    }


def assert_same_outcome(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert_same(first["weights"], second["weights"])
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    torch.testing.assert_close(first["optimizer"]["state"], second["optimizer"]["state"], rtol=0, atol=0)
    assert torch.equal(first["random"][0], second["random"][0])
    assert first["random"][1] == second["random"][1]


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        pytest.param(MUON, {}, id="muon"),
        pytest.param(partial(Net, matrix_optimizer=partial(NorMuon, lr=0.02)), {}, id="normuon"),
        pytest.param(partial(Net, matrix_optimizer=partial(MuonHyperball, lr=0.02)), {}, id="hyperball"),
        pytest.param(Plain, {}, id="adamw"),
        pytest.param(Dropped, {}, id="dropout"),
        pytest.param(MUON, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, id="accumulation"),
        pytest.param(Plain, {"accumulate_grad_batches": 2}, id="adamw accumulation"),
        pytest.param(MUON, {"precision": "bf16-true"}, id="bf16-true"),
        pytest.param(Plain, {"precision": "bf16-mixed"}, id="bf16-mixed"),
    ],
)
def test_a_fit_ends_bit_for_bit_as_without_monitors(make: Callable[[], pl.LightningModule], kwargs: Any) -> None:
    without = outcome(make, [], **kwargs)
    every_step = outcome(make, monitors(every_n_steps=1, spectrum_every_n_steps=1, per_parameter=True), **kwargs)
    assert_same_outcome(every_step, without)
    assert len(every_step["recorder"].steps("spectral_norm/mean")) == STEPS


@pytest.mark.parametrize("make", [MUON, Plain])
def test_with_tables_figures_and_their_own_clocks(make: Callable[[], pl.LightningModule]) -> None:
    callbacks = monitors(every_n_steps=3, spectrum_every_n_steps=6, print_table=True, plot=True)
    recorded = outcome(make, callbacks, max_steps=13)
    assert_same_outcome(recorded, outcome(make, [], max_steps=13))
    assert recorded["recorder"].steps("stable_rank/mean") == [2, 5, 8, 11]
    assert recorded["recorder"].steps("effective_rank/mean") == [5, 11]


def test_a_fit_goes_on_in_evaluation_and_training_modes_as_set() -> None:
    """A module that the user has put into evaluation mode stays there."""
    module = Net()
    module.layers.norm.eval()
    watched(module, monitors(every_n_steps=1, spectrum_every_n_steps=1))
    assert not module.layers.norm.training
    assert module.layers.up.training
    assert all(parameter.requires_grad for parameter in module.parameters())


# Nothing stays behind


def attachments(fitted: pl.Trainer, module: nn.Module) -> list[str]:
    """Which hooks and observers optimizers, modules and parameters have."""
    found = []
    for optimizer in fitted.optimizers:
        for one in (optimizer, *getattr(optimizer, "optimizers", {}).values()):
            named = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_observers")
            found += [f"{type(one).__name__}.{name}" for name in named if getattr(one, name, None)]
    for path, part in module.named_modules():
        named = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        found += [f"{path}.{name}" for name in named if getattr(part, name)]
    for path, parameter in module.named_parameters():
        named = ("_backward_hooks", "_post_accumulate_grad_hooks")
        found += [f"{path}.{name}" for name in named if getattr(parameter, name)]
    return found


def attributes(fitted: pl.Trainer, module: nn.Module) -> dict[str, set[str]]:
    """What optimizers, modules and parameters have as attributes of their own: a replaced method is one."""
    owners: dict[str, Any] = {f"module {name}": part for name, part in module.named_modules()}
    owners |= {f"parameter {name}": parameter for name, parameter in module.named_parameters()}
    for optimizer in fitted.optimizers:
        for one in (optimizer, *getattr(optimizer, "optimizers", {}).values()):
            owners[type(one).__name__] = one
    return {name: set(vars(owner)) for name, owner in owners.items()}


@pytest.mark.parametrize("make", [MUON, Plain, partial(Net, matrix_optimizer=partial(MuonHyperball, lr=0.02))])
def test_nothing_is_left_on_optimizer_or_module(make: Callable[[], pl.LightningModule]) -> None:
    bare, watched_module = make(), make()
    without, _ = watched(bare, [])
    fitted, _ = watched(watched_module, monitors(every_n_steps=1, spectrum_every_n_steps=1))
    assert attachments(fitted, watched_module) == []
    assert attributes(fitted, watched_module) == attributes(without, bare)


class Between(pl.Callback):
    """Looks for attachments wherever nothing is to be measured; must be the last callback."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.found: list[str] = []
        self.looks = 0

    def look(self, fitted: pl.Trainer, module: pl.LightningModule) -> None:
        if (fitted.fit_loop.epoch_loop._batches_that_stepped + 1) % self.every:
            self.found += attachments(fitted, module)
            self.looks += 1

    def on_train_batch_start(self, fitted: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.look(fitted, module)

    def on_before_optimizer_step(self, fitted: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.look(fitted, module)

    def on_train_batch_end(self, fitted: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.found += attachments(fitted, module)
        self.looks += 1


@pytest.mark.parametrize("make", [MUON, Plain])
def test_nothing_is_attached_between_measured_steps(make: Callable[[], pl.LightningModule]) -> None:
    between = Between(every=3)
    _, recorder = watched(make(), [*monitors(every_n_steps=3), between], max_steps=10)
    assert recorder.steps("update_orthogonality_error/mean") == [2, 5, 8]
    assert between.looks >= 20
    assert between.found == []


@pytest.mark.parametrize("make", [MUON, Plain])
def test_module_and_optimizer_can_be_freed_while_the_callbacks_live(make: Callable[[], pl.LightningModule]) -> None:
    callbacks = monitors(every_n_steps=1, spectrum_every_n_steps=1, plot=True, print_table=True)

    def references() -> list[weakref.ref[Any]]:
        module = make()
        fitted, _ = watched(module, callbacks)
        for callback in callbacks:  # Lightning's own bound methods of the module
            vars(callback).pop("log", None)
            vars(callback).pop("log_dict", None)
        return [weakref.ref(each) for each in (module, module.layers.up.weight, fitted.optimizers[0], fitted)]

    alive = references()
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4


# Exceptions


class Failing(Net):
    """Raises at its fourth step, in the hook that ``fails_in`` names."""

    fails_in: str | None = None

    def fail(self, hook: str) -> None:
        if self.fails_in == hook and self.trainer.global_step == 3:
            raise RuntimeError("no further")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.fail("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.fail("on_before_optimizer_step")


@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step"])
def test_after_an_exception_nothing_is_left_and_the_callbacks_serve_again(hook: str) -> None:
    def twice(callbacks: list[pl.Callback]) -> tuple[Failing, pl.Trainer, Recorder]:
        torch.manual_seed(5)
        module = Failing(matrix_optimizer=partial(Muon, lr=0.02))
        module.fails_in = hook
        failed = trainer(callbacks=callbacks, logger=Recorder(), log_every_n_steps=1)
        with pytest.raises(RuntimeError, match="no further"):
            failed.fit(module, datamodule=Items())
        assert attachments(failed, module) == []
        module.fails_in = None
        again, recorder = watched(module, callbacks, max_steps=4)
        return module, again, recorder

    module, again, recorder = twice(monitors(every_n_steps=1, spectrum_every_n_steps=1))
    without, _, _ = twice([])
    assert_same(weights(module), weights(without))
    assert attachments(again, module) == []
    assert recorder.steps("update_orthogonality_error/mean") == [0, 1, 2, 3]


# Another fit


def largest_singular_value(module: pl.LightningModule) -> float:
    return torch.linalg.matrix_norm(module.layers.up.weight.detach(), 2).item()


@pytest.mark.parametrize("same_trainer", [True, False], ids=["same trainer", "another trainer"])
def test_a_second_fit_watches_its_own_module(same_trainer: bool) -> None:
    callbacks = monitors(every_n_steps=1, spectrum_every_n_steps=2, per_parameter=True, plot=True)
    first, second, alone = Net(), Plain(width=6), Plain(width=6)
    alone.load_state_dict(second.state_dict())
    with torch.no_grad():
        first.layers.up.weight.mul_(50)
    fitted, _ = watched(first, callbacks, max_steps=-1, max_epochs=1)
    recorder = Recorder()
    if same_trainer:
        fitted.loggers = [recorder]
        fitted.fit_loop.max_epochs = 2
        fitted.fit(second, datamodule=Items())
    else:
        fitted, _ = watched(second, callbacks, logger=recorder)
    fit(alone)
    assert_same(weights(second), weights(alone))
    assert attachments(fitted, second) == []
    steps = recorder.steps("spectral_norm/layers.up.weight")
    assert steps == ([5, 6, 7, 8, 9] if same_trainer else [0, 1, 2, 3, 4])
    values = recorder.values()
    assert values[steps[-1], "spectral_norm/layers.up.weight"] == pytest.approx(
        largest_singular_value(second), rel=0.02
    )
    assert values[steps[-1], "spectral_norm/layers.up.weight"] < largest_singular_value(first) / 5


def test_a_fit_by_another_trainer_starts_a_history_of_its_own(folder: Path) -> None:
    callbacks = [SpectralNormMonitor(every_n_steps=1, print_table=False)]
    watched(Net(), callbacks, max_steps=5, logger=Recorder(folder / "first"))
    watched(Net(), callbacks, max_steps=2, logger=Recorder(folder / "second"))
    assert {row["step"] for row in table_rows(folder / "first")} == {"0", "1", "2", "3", "4"}
    assert {row["step"] for row in table_rows(folder / "second")} == {"0", "1"}
