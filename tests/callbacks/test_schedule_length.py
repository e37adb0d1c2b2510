"""A schedule ends with the run, however the length of the run changes."""

import csv
import time
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_muon import Muon, MuonMixin, UseMuon, configure_hybrid_optimizer
from lightning_muon.schedules import Constant, Cosine, Linear, WarmupStableDecay
from tests.lightning_helpers import BATCH, Bare, Items, Net, WithOptimizer, trainer
from tests.ways import KINDS, WAYS, train

PEAK = {"matrix": 0.02, "other": 0.001}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


class Rates(pl.Callback):
    """The multiplier of each group at each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        multipliers = {round(g["lr"] / PEAK[g["name"].split("/")[0]], 9) for g in optimizer.param_groups}
        assert len(multipliers) == 1, "the groups have lost their ratio"
        self.seen.append(multipliers.pop())


class Sized(Items):
    """Batches whose size a BatchSizeFinder may change."""

    def __init__(self, batches=16, batch_size=BATCH):
        super().__init__(batches)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset(), batch_size=self.batch_size)


def fit(schedule, data, *callbacks, way="mixin", kind="Muon", **kwargs):
    """The multipliers of a fit, and its Trainer."""
    rates = Rates()
    limits = {"max_epochs": 2, **kwargs}
    used = train(way, kind=KINDS[kind], schedule=schedule, data=data, callbacks=[*callbacks, rates], **limits)
    return rates.seen, used


def whole(schedule, steps):
    return pytest.approx([schedule.at_step(step, steps) for step in range(steps)], abs=1e-8)


@EVERY_WAY
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "schedulefree"])
def test_accumulation_that_changes_between_epochs(way, kind):
    """Lightning's estimate uses the accumulation of the first epoch only."""
    schedule = Linear(warmup=2)
    seen, _ = fit(schedule, Items(8), GradientAccumulationScheduler({0: 1, 2: 4}), way=way, kind=kind, max_epochs=4)
    assert seen == whole(schedule, 8 + 8 + 2 + 2)


@EVERY_WAY
@pytest.mark.parametrize("schedule", [Cosine(warmup=0.2), WarmupStableDecay(decay=4)], ids=repr)
def test_a_batch_size_finder_shortens_the_run(way, schedule, tmp_path):
    data = Sized()
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=4, max_trials=2)
    seen, used = fit(schedule, data, finder, way=way, max_epochs=3, default_root_dir=str(tmp_path))
    assert data.batch_size > BATCH
    assert len(seen) == used.global_step == 3 * -(-16 * BATCH // data.batch_size)
    assert seen == whole(schedule, len(seen))


@EVERY_WAY
def test_a_second_fit_has_a_schedule_of_its_own(way):
    schedule, rates = Linear(), Rates()
    used = train(way, schedule=schedule, callbacks=[rates], max_epochs=2)
    assert rates.seen == whole(schedule, 8)
    rates.seen.clear()
    used.fit_loop.max_epochs = 5
    used.fit(used.lightning_module, datamodule=Items(4))
    assert rates.seen == whole(schedule, 12)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"max_steps": 4}, {"max_steps": 12}),
        ({"max_epochs": 1}, {"max_epochs": 3}),
        ({"max_steps": 6}, {"max_epochs": 3}),
    ],
    ids=["max_steps", "max_epochs", "in the middle of an epoch"],
)
@EVERY_WAY
def test_a_run_made_longer_on_resume_follows_the_longer_schedule(way, before, after, tmp_path):
    schedule = Linear()
    first, used = fit(schedule, Items(4), way=way, **{"max_epochs": -1, **before})
    used.save_checkpoint(tmp_path / "a.ckpt")
    rest, used = fit(schedule, Items(4), way=way, ckpt_path=tmp_path / "a.ckpt", **{"max_epochs": -1, **after})
    steps = len(first) + len(rest)  # Lightning ends an epoch that max_steps has cut
    assert steps == (10 if before == {"max_steps": 6} else 12)
    assert rest == pytest.approx([schedule.at_step(step, steps) for step in range(len(first), steps)])


def test_other_data_on_resume(tmp_path):
    schedule = Linear()
    _, used = fit(schedule, Items(4), max_epochs=1)
    used.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = fit(schedule, Items(10), ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert rest == pytest.approx([schedule.at_step(step, 4 + 20) for step in range(4, 24)])


class OfUnknownLength(Items):
    def train_dataloader(self):
        batches = list(super().train_dataloader())

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(batches)

        return DataLoader(Stream(), batch_size=None)


def test_data_of_unknown_length_tells_its_length_in_the_first_epoch():
    schedule = Linear()
    seen, _ = fit(schedule, OfUnknownLength(4), max_epochs=3, max_steps=100)
    assert seen[:4] == pytest.approx([schedule.at_step(step, 100) for step in range(4)])
    assert seen[4:] == pytest.approx([schedule.at_step(step, 12) for step in range(4, 12)])


class Clock(Timer):
    """A Timer whose clock counts steps, one second each."""

    def __init__(self, duration):
        super().__init__(duration=duration)
        self.steps = 0

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, stage="train"):
        return float(self.steps) + 0.5


@pytest.mark.parametrize("schedule", [Linear(), Cosine(warmup=5), WarmupStableDecay(warmup=0.1, decay=0.5)], ids=repr)
@pytest.mark.parametrize(
    "limits", [{"max_epochs": -1}, {"max_epochs": 1000}, {"max_epochs": -1, "max_steps": 900}], ids=str
)
def test_max_time_ends_the_schedule(schedule, limits):  # fmt: skip
    seen, _ = fit(schedule, Items(4), Clock({"seconds": 20}), **limits)
    assert len(seen) in (20, 21)
    assert seen[:20] == whole(schedule, 20)


def test_steps_that_end_before_the_time_count():
    seen, _ = fit(Linear(), Items(4), Clock({"seconds": 1000}), max_epochs=2)
    assert seen == whole(Linear(), 8)


def test_max_time_of_the_trainer_with_a_real_clock():
    class Slow(pl.Callback):
        def on_train_batch_end(self, *args, **kwargs):
            time.sleep(0.05)

    seen, _ = fit(Linear(), Items(4), Slow(), max_epochs=-1, max_time={"seconds": 1})
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.7
    assert seen[-1] < 0.3


def test_a_learning_rate_monitor_logs_the_rates_that_are_used(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    accumulate = GradientAccumulationScheduler({0: 1, 1: 2})
    logger = CSVLogger(tmp_path)
    seen, _ = fit(Linear(), Items(4), accumulate, monitor, logger=logger, log_every_n_steps=1)
    with open(logger.experiment.metrics_file_path) as file:
        logged = [float(row["lr/matrix"]) / 0.02 for row in csv.DictReader(file)]
    assert logged == pytest.approx([seen[0], *seen[1:4], seen[4], seen[4], seen[5], seen[5]])


# Learning-rate finders


def with_rate(lr, way="mixin", schedule=None):
    """A module with an attribute for Lightning's finder, and callbacks, with one learning rate for all groups."""
    settings = {
        "matrix_optimizer": partial(Muon, lr=lr[0]),
        "other_optimizer": partial(torch.optim.AdamW, lr=lr[1]),
        "schedule": schedule,
    }
    module, extra = (Net(**settings), []) if way == "mixin" else (WithOptimizer(), [UseMuon(**settings)])
    module.lr = 0.1
    return module, extra


@pytest.mark.parametrize("way", ["mixin", "UseMuon"])
@pytest.mark.parametrize("tuner", [True, False], ids=["Tuner", "callback"])
def test_a_finder_that_would_lose_the_ratio_is_refused(way, tuner, tmp_path):
    module, extra = with_rate((0.02, 0.001), way)
    finder = [] if tuner else [LearningRateFinder()]
    used = trainer(callbacks=[*extra, *finder], default_root_dir=tmp_path)
    search = Tuner(used).lr_find if tuner else used.fit
    with pytest.raises(RuntimeError, match=r"other/embedding 0\.001.*matrix 0\.02.*ratio would be lost.*the same lr"):
        search(module, datamodule=Items())


@pytest.mark.parametrize("way", ["mixin", "UseMuon"])
@pytest.mark.parametrize("schedule", [None, Constant(), Linear(warmup=2)], ids=repr)
def test_a_found_rate_is_the_peak_of_the_schedule(way, schedule, tmp_path):
    module, extra = with_rate((0.001, 0.001), way, schedule)
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, max_lr=0.5, early_stop_threshold=None)
    seen = []

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({group["lr"] for group in optimizer.param_groups})

    used = trainer(callbacks=[*extra, finder, Record()], max_steps=-1, max_epochs=2, default_root_dir=tmp_path)
    used.fit(module, datamodule=Items(30))
    found = finder.optimal_lr.suggestion()
    assert module.lr == found != 0.001
    multipliers = [1.0 if schedule is None else schedule.at_step(step, 60) for step in range(60)]
    assert [rates.pop() for rates in seen] == pytest.approx([found * m for m in multipliers])
    assert not any(seen)


# Schedules that nobody steps


class Manual(MuonMixin, Bare):
    """Steps its optimizer itself, and its schedule at each step, at each epoch or never."""

    automatic_optimization = False
    schedule_steps = "each step"

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        if self.schedule_steps == "each step":
            self.lr_schedulers().step()

    def on_train_epoch_end(self):
        if self.schedule_steps == "each epoch":
            self.lr_schedulers().step()


@pytest.mark.parametrize("steps", ["each step", "each epoch", ""], ids=["stepped", "by epoch", "forgotten"])
def test_manual_optimization_that_never_steps_its_schedule_is_named(steps, recwarn):
    module = Manual()
    module.schedule_steps = steps
    module.schedule = Linear()
    trainer(max_steps=-1, max_epochs=2).fit(module, datamodule=Items(4))
    named = [str(w.message) for w in recwarn if "never steps it" in str(w.message)]
    if steps:
        assert not named
    else:
        assert len(named) == 1
        assert "Manual has the schedule Linear(" in named[0]
        assert "self.lr_schedulers().step()" in named[0]


def test_max_time_under_manual_optimization():
    """Without a number of steps the learning rate would stay at the start of the warmup, which is 0."""
    schedule, rates = Linear(warmup=0.2), Rates()
    optimizers = {"matrix_optimizer": partial(Muon, lr=0.02), "other_optimizer": partial(torch.optim.AdamW, lr=0.001)}
    clock = Clock({"seconds": 20})
    used = trainer(max_steps=-1, max_epochs=-1, callbacks=[clock, rates])
    used.fit(Manual(schedule=schedule, **optimizers), datamodule=Items(4))
    assert rates.seen[:20] == whole(schedule, 20)


@pytest.mark.parametrize(
    "name", ["Timer", "GradientAccumulationScheduler", "LearningRateFinder", "StochasticWeightAveraging"]
)
def test_callbacks_of_the_users_own_with_lightnings_names(name):
    seen, _ = fit(Linear(), Items(4), type(name, (pl.Callback,), {})())
    assert seen == whole(Linear(), 8)


def test_a_search_for_the_batch_size_in_mid_run(tmp_path):
    class Later(BatchSizeFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.scale_batch_size(trainer, pl_module)

    finder = Later(mode="power", steps_per_trial=1, init_val=4, max_trials=2)
    seen, used = fit(Linear(), Sized(), finder, max_epochs=3, default_root_dir=str(tmp_path))
    assert seen[:16] == pytest.approx([Linear().at_step(step, 48) for step in range(16)])
    left = used.global_step - 16
    assert seen[16:] == pytest.approx([Linear().at_step(step, 16 + left) for step in range(16, 16 + left)])


@pytest.mark.parametrize("way", ["mixin", "UseMuon"])
@pytest.mark.parametrize("update", [True, False])
def test_a_rate_that_a_tuner_leaves_in_the_module_is_not_used_in_silence(way, update, tmp_path, recwarn):
    module, extra = with_rate((0.001, 0.001), way)
    used = trainer(callbacks=extra, default_root_dir=tmp_path)
    Tuner(used).lr_find(module, datamodule=Items(), num_training=5, update_attr=update, early_stop_threshold=None)
    named = [str(w.message) for w in recwarn if "Tuner.lr_find writes the learning rate" in str(w.message)]
    assert len(named) == update
    assert all("later fits do not use it. Pass its suggestion() as lr" in line for line in named)


def test_a_rate_of_the_modules_own_that_a_tuner_sets_is_used(tmp_path, recwarn):
    class Reads(Bare):
        lr = 0.001

        def configure_optimizers(self):
            return configure_hybrid_optimizer(self, partial(Muon, lr=self.lr), partial(torch.optim.AdamW, lr=self.lr))

    Tuner(trainer(default_root_dir=tmp_path)).lr_find(Reads(), datamodule=Items(), num_training=5)
    assert not [w for w in recwarn if "Tuner.lr_find writes" in str(w.message)]
