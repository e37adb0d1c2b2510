"""What a resumed run goes on with is what its checkpoint has, and where that is not what was given, a line says so."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_muon import Muon, NorMuon, UseMuon
from lightning_muon.schedules import Constant, Cosine, Linear
from tests.lightning_helpers import Items, Net, WithOptimizer, trainer
from tests.ways import KINDS, WAYS, train

EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def saved(tmp_path):
    def save(way, **kwargs):
        train(way, max_epochs=2, **kwargs).save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return save


def rates(used):
    return {group["name"]: group["lr"] for group in used.optimizers[0].param_groups}


def lines(recwarn, *parts):
    return [str(w.message) for w in recwarn if all(part in str(w.message) for part in parts)]


@EVERY_WAY
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_other_rates_are_named_and_the_checkpoints_count(way, kind, saved, recwarn):
    path = saved(way, kind=kind)
    again = train(way, max_epochs=3, kind=kind, lr=0.3, ckpt_path=path)
    assert rates(again)["matrix"] == 0.02
    (line,) = lines(recwarn, "learning rates of its checkpoint")
    assert "matrix 0.02 (given now: 0.3)" in line
    assert "other" not in line
    assert "load the weights alone" in line


@EVERY_WAY
@pytest.mark.parametrize("schedule", [None, Linear(warmup=3)], ids=str)
def test_the_same_settings_say_nothing(way, schedule, saved, recwarn):
    train(way, max_epochs=3, schedule=schedule, ckpt_path=saved(way, schedule=schedule))
    assert not lines(recwarn, "checkpoint", "given")
    assert not lines(recwarn, "saved run")


@EVERY_WAY
@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Constant(warmup=3)], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, NorMuon], ids=lambda kind: kind.__name__)
def test_a_schedule_left_out_is_refused(way, schedule, kind, saved):
    path = saved(way, schedule=schedule, kind=kind)
    with pytest.raises(RuntimeError, match=r"was saved under a schedule.*has none now.*schedule=Constant\(\)"):
        train(way, max_epochs=3, kind=kind, ckpt_path=path)
    again = train(way, max_epochs=3, kind=kind, schedule=Constant(), ckpt_path=path)
    assert rates(again)["matrix"] == 0.02


@EVERY_WAY
def test_another_schedule_is_named_and_followed(way, saved, recwarn):
    again = train(way, max_epochs=4, schedule=Linear(), ckpt_path=saved(way, schedule=Cosine(warmup=2)))
    (line,) = lines(recwarn, "saved run had the schedule Cosine(warmup=2")
    assert "goes on at step 8 with Linear(" in line
    assert rates(again)["matrix"] == pytest.approx(0.02 * Linear().at_step(16, 16))


@EVERY_WAY
def test_a_schedule_that_is_new_is_named_and_runs_over_the_rest(way, saved, recwarn):
    again = train(way, max_epochs=4, schedule=Linear(), ckpt_path=saved(way))
    assert len(lines(recwarn, "saved without a schedule: Linear(", "over the rest")) == 1
    assert again.lr_scheduler_configs[0].scheduler.total_steps == 8


# Rates that are not what was given, and should not be


class Own(Net):
    """Its optimizer with a scheduler of the module's own."""

    kind = "OneCycleLR"

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedulers = torch.optim.lr_scheduler
        if self.kind == "OneCycleLR":
            peaks = [group["lr"] for group in optimizer.param_groups]
            return [optimizer], [schedulers.OneCycleLR(optimizer, peaks, total_steps=40)]
        if self.kind == "ReduceLROnPlateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}
        self.scheduler = schedulers.LambdaLR(optimizer, lambda step: 1.0)
        return optimizer


@pytest.mark.parametrize("kind", ["OneCycleLR", "ReduceLROnPlateau", "kept by the module"])
def test_schedulers_of_the_modules_own_say_nothing(kind, saved, recwarn, monkeypatch):
    monkeypatch.setattr(Own, "kind", kind)
    settings = {"classes": (Own, Own), "limit_val_batches": 1}
    train("mixin", max_epochs=3, ckpt_path=saved("mixin", **settings), **settings)
    assert not lines(recwarn, "given now")


@EVERY_WAY
@pytest.mark.parametrize("schedule", [None, Linear()], ids=str)
def test_weight_averaging_goes_on(way, schedule, tmp_path, recwarn):
    """It has a scheduler of its own, and takes away the other."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(**kwargs):
        averaging = StochasticWeightAveraging(swa_lrs=[0.01] * 4, swa_epoch_start=1)
        return train(way, max_epochs=5, schedule=schedule, callbacks=[averaging, Save()], **kwargs)

    whole = rates(run())
    assert rates(run(ckpt_path=tmp_path / "2.ckpt")) == pytest.approx(whole)
    assert not lines(recwarn, "given now")


@pytest.mark.parametrize("way", ["mixin", "UseMuon"])
def test_other_options_are_named_and_the_checkpoints_count(way, tmp_path, recwarn):
    def run(epochs, ckpt_path=None, **options):
        settings = {"matrix_optimizer": partial(Muon, **options)}
        module, extra = (Net(**settings), []) if way == "mixin" else (WithOptimizer(), [UseMuon(**settings)])
        used = trainer(max_steps=-1, max_epochs=epochs, callbacks=extra)
        used.fit(module, datamodule=Items(4), ckpt_path=ckpt_path)
        return used

    run(1, weight_decay=0.3, momentum=0.9).save_checkpoint(tmp_path / "a.ckpt")
    again = run(2, tmp_path / "a.ckpt", momentum=0.9)
    assert next(g["weight_decay"] for g in again.optimizers[0].param_groups if g["name"] == "matrix") == 0.3
    (line,) = lines(recwarn, "options of its checkpoint")
    assert "given now: weight_decay of matrix 0.3 (given now: 0.1). To use" in line


@EVERY_WAY
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_optimizer_is_refused(way, kind, saved):
    other = NorMuon if kind == "Muon" else KINDS["Muon"]
    path = saved(way, kind=KINDS[kind])
    with pytest.raises(ValueError, match=r"saved by .*oad the weights alone"):
        train(way, max_epochs=3, kind=other, ckpt_path=path)


@EVERY_WAY
@pytest.mark.parametrize("own", [True, False], ids=["to its own scheduler", "from its own scheduler"])
def test_a_scheduler_of_another_kind_is_named(way, own, saved, recwarn):
    class Steps(pl.Callback):
        """Puts a scheduler of torch in place of ours."""

        def on_fit_start(self, trainer, pl_module):
            for config in trainer.lr_scheduler_configs:
                config.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizers[0], 2)

    first, second = ([], [Steps()]) if own else ([Steps()], [])
    path = saved(way, schedule=Cosine(), callbacks=first)
    train(way, max_epochs=3, schedule=Cosine(), callbacks=second, ckpt_path=path)
    wanted = (
        ("saved run had the schedule Cosine(", "StepLR goes on") if own else ("scheduler of another kind", "step_size")
    )
    assert len(lines(recwarn, *wanted)) == 1
