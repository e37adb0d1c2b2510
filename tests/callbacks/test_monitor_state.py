"""Monitors in checkpoints: a resumed fit logs, draws and prints what the uninterrupted one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_muon import Muon
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.callbacks.monitor_runs import Plain, Recorder, monitors, table_rows
from tests.lightning_helpers import Items, Net, assert_same, trainer, weights

MUON = partial(Net, matrix_optimizer=partial(Muon, lr=0.02))
STEPS_AN_EPOCH = 5
SETTINGS = {"every_n_steps": 2, "spectrum_every_n_steps": 4, "per_parameter": True, "print_table": True}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


class Run(NamedTuple):
    module: pl.LightningModule
    callbacks: list[pl.Callback]
    recorder: Recorder
    printed: str


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Trains up to an epoch in a folder, where a checkpoint of each epoch lies afterwards; may start from one."""

    def train(
        make: Callable[[], pl.LightningModule],
        folder: str,
        callbacks: list[pl.Callback],
        epochs: int = 4,
        checkpoint: Path | None = None,
    ) -> Run:
        torch.manual_seed(1)
        module, recorder = make(), Recorder(tmp_path / folder)
        saving = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
        settings = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True, "log_every_n_steps": 1}
        capsys.readouterr()
        fitted = trainer(callbacks=[*callbacks, saving], logger=recorder, **settings)
        fitted.fit(module, datamodule=Items(batches=STEPS_AN_EPOCH), ckpt_path=checkpoint)
        return Run(module, callbacks, recorder, capsys.readouterr().out)

    return train


def assert_same_state(first: Any, second: Any) -> None:
    """Tensors bit for bit, NaN equal to NaN; the rest by ``==``."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            assert_same_state(one, two)
    elif isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    else:
        assert first == second


@pytest.mark.parametrize("make", [MUON, Plain], ids=["muon", "adamw"])
def test_two_epochs_and_two_resumed_are_four(make: Any, run: Callable[..., Run], tmp_path: Path) -> None:
    whole = run(make, "whole", monitors(**SETTINGS))
    run(make, "half", monitors(**SETTINGS), epochs=2)
    resumed = run(make, "resumed", monitors(**SETTINGS), checkpoint=tmp_path / "half" / "epoch=1.ckpt")

    assert_same(weights(resumed.module), weights(whole.module))
    later = {(step, key): value for (step, key), value in whole.recorder.values().items() if step >= 10}
    assert {key.split("/")[0] for _, key in later} >= {"spectral_norm", "update_orthogonality_error", "effective_rank"}
    assert resumed.recorder.values() == later
    for one, two in zip(whole.callbacks, resumed.callbacks, strict=True):
        assert_same_state(one.state_dict(), two.state_dict())
    assert table_rows(tmp_path / "resumed") == table_rows(tmp_path / "whole")
    assert {int(row["step"]) for row in table_rows(tmp_path / "resumed")} == set(range(1, 20, 2))


def test_the_first_table_after_resuming_knows_the_last_before_it(run: Callable[..., Run], tmp_path: Path) -> None:
    whole = run(MUON, "whole", monitors(**SETTINGS))
    resumed = run(MUON, "resumed", monitors(**SETTINGS), checkpoint=tmp_path / "whole" / "epoch=1.ckpt")
    assert "spectral_norm" in resumed.printed
    assert whole.printed.endswith(resumed.printed)
    assert len(resumed.printed) < len(whole.printed)


def test_checkpoints_hold_monitors_and_load_as_plain_data(run: Callable[..., Run], tmp_path: Path) -> None:
    run(MUON, "saved", monitors(**SETTINGS), epochs=1)
    checkpoint = torch.load(tmp_path / "saved" / "epoch=0.ckpt", weights_only=True)
    for kind in (SpectralNormMonitor, UpdateOrthogonalityMonitor, EffectiveRankMonitor):
        (state,) = (state for key, state in checkpoint["callbacks"].items() if kind.__name__ in key)
        assert state


def test_an_unused_monitor_takes_the_state_of_an_unused_one() -> None:
    for saved, fresh in zip(monitors(), monitors(), strict=True):
        fresh.load_state_dict(saved.state_dict())
        assert_same_state(fresh.state_dict(), saved.state_dict())


@pytest.mark.parametrize("kind", [SpectralNormMonitor, UpdateOrthogonalityMonitor, EffectiveRankMonitor])
def test_instances_with_different_settings_have_keys_of_their_own(kind: type[pl.Callback]) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"every_n_steps": 2},
        {"every_n_steps": 4},
        {"include": ["*.up.weight"]},
        {"include": ["*.down.weight"]},
        {"include": ["*.weight"], "exclude": ["*.down.weight"]},
        {"exclude": ["*.down.weight"]},
    ]
    if kind is not SpectralNormMonitor:
        settings.append({"every_n_steps": 4, "spectrum_every_n_steps": 8})
    if kind is EffectiveRankMonitor:
        settings.append({"normalize": True})
    keys = [kind(**setting).state_key for setting in settings]
    assert len(set(keys)) == len(settings)
    assert keys == [kind(**setting).state_key for setting in settings]


def test_instances_of_one_class_keep_their_histories_apart(run: Callable[..., Run], tmp_path: Path) -> None:
    def pair() -> list[pl.Callback]:
        common = {"every_n_steps": 1, "plot": False, "print_table": False}
        return [
            SpectralNormMonitor(include=["*.up.weight"], **common),
            SpectralNormMonitor(include=["*.down.weight"], **common),
        ]

    whole = run(MUON, "whole", pair(), epochs=2)
    resumed = run(MUON, "resumed", pair(), epochs=2, checkpoint=tmp_path / "whole" / "epoch=0.ckpt")
    for one, two in zip(whole.callbacks, resumed.callbacks, strict=True):
        assert_same_state(two.state_dict(), one.state_dict())
    rows = table_rows(tmp_path / "resumed")
    assert {row["matrix"] for row in rows} == {"layers.up.weight", "layers.down.weight"}
    assert rows == table_rows(tmp_path / "whole")


def test_a_checkpoint_without_monitors_resumes_with_them(run: Callable[..., Run], tmp_path: Path) -> None:
    whole = run(MUON, "whole", [])
    resumed = run(MUON, "resumed", monitors(**SETTINGS), checkpoint=tmp_path / "whole" / "epoch=1.ckpt")
    assert_same(weights(resumed.module), weights(whole.module))
    assert resumed.recorder.steps("spectral_norm/mean") == [11, 13, 15, 17, 19]


def test_a_checkpoint_with_monitors_resumes_without_them(run: Callable[..., Run], tmp_path: Path) -> None:
    whole = run(MUON, "whole", monitors(**SETTINGS))
    resumed = run(MUON, "resumed", [], checkpoint=tmp_path / "whole" / "epoch=1.ckpt")
    assert_same(weights(resumed.module), weights(whole.module))
    assert resumed.recorder.values() == {}


def test_a_resumed_fit_may_watch_on_another_clock(run: Callable[..., Run], tmp_path: Path) -> None:
    run(MUON, "half", monitors(**SETTINGS), epochs=2)
    other = monitors(every_n_steps=5, spectrum_every_n_steps=5)
    resumed = run(MUON, "resumed", other, epochs=3, checkpoint=tmp_path / "half" / "epoch=1.ckpt")
    assert resumed.recorder.steps("effective_rank/mean") == [14]


def test_going_back_to_an_earlier_checkpoint_replaces_what_came_after(run: Callable[..., Run], tmp_path: Path) -> None:
    """The same callbacks, as in a notebook: fit, then fit again from the checkpoint of an earlier epoch."""
    callbacks = monitors(**{**SETTINGS, "print_table": False})
    whole = run(MUON, "whole", callbacks)
    before = [copy.deepcopy(callback.state_dict()) for callback in callbacks]
    logged = {(step, key): value for (step, key), value in whole.recorder.values().items() if step >= 10}
    again = run(MUON, "again", callbacks, checkpoint=tmp_path / "whole" / "epoch=1.ckpt")
    assert again.recorder.values() == logged
    for state, callback in zip(before, callbacks, strict=True):
        assert_same_state(callback.state_dict(), state)
