"""What a resumed run goes on with is what its checkpoint has, and where that is not what was given, a line says so."""

import pytest
import torch

from lightning_muon import NorMuon
from lightning_muon.schedules import Constant, Cosine, Linear
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
