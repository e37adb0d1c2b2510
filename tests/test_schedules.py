"""Schedules: shapes, lengths, errors, and what they do to the learning rates of an optimizer."""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_muon.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay

ALL = [
    Constant(warmup=0.1),
    Linear(warmup=0.1, final=0.2),
    Cosine(warmup=0.1, final=0.2),
    WarmupStableDecay(warmup=0.1, decay=0.3, final=0.2),
]


def two_groups(lrs=(0.1, 0.002)):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups)


def learning_rates(schedule, steps, optimizer=None):
    """(steps, groups) learning rates that the steps of a run are taken with."""
    optimizer = optimizer or two_groups()
    scheduler = schedule.scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_warmup_is_linear_and_ends_at_one(schedule):
    assert schedule(0.0) == 0.0
    assert schedule(0.05) == pytest.approx(0.5)
    assert schedule(0.1) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_stays_between_final_and_one_and_never_rises_after_warmup(schedule):
    values = [schedule(0.1 + 0.9 * i / 100) for i in range(101)]
    assert all(0.2 - 1e-12 <= value <= 1.0 + 1e-12 for value in values)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("schedule", ALL[1:], ids=repr)
def test_final_value_is_reached_and_kept_beyond_the_end(schedule):
    assert schedule(1.0) == pytest.approx(0.2)
    assert schedule(1.7) == pytest.approx(0.2)


def test_shapes_at_hand_computed_points():
    assert Constant()(0.7) == 1.0
    assert Linear(final=0.5)(0.5) == pytest.approx(0.75)
    assert Cosine(final=0.1)(0.5) == pytest.approx(0.55)
    assert Cosine()(0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    stable = WarmupStableDecay(warmup=0.2, decay=0.4)
    assert [stable(p) for p in (0.1, 0.2, 0.6, 0.8, 1.0)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("make", [Constant, Linear, Cosine, WarmupStableDecay])
def test_steps_and_fractions_of_the_run_agree(make):
    steps, fraction = learning_rates(make(warmup=25), 100), learning_rates(make(warmup=0.25), 100)
    assert torch.tensor(steps).allclose(torch.tensor(fraction))


def test_decay_in_steps_covers_the_last_steps():
    rates = [lr for lr, _ in learning_rates(WarmupStableDecay(warmup=2, decay=4), 10)]
    assert rates[2:6] == pytest.approx([0.1] * 4)
    assert rates[6:] == pytest.approx([0.1 * m for m in (0.875, 0.625, 0.375, 0.125)])


@pytest.mark.parametrize(
    "schedule", [Linear(warmup=3), Cosine(warmup=0.5), WarmupStableDecay(warmup=1, decay=2)], ids=repr
)
def test_no_step_is_taken_at_learning_rate_zero(schedule):
    assert all(lr > 0 for rates in learning_rates(schedule, 12) for lr in rates)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_groups_keep_the_ratio_of_their_learning_rates(schedule):
    rates = torch.tensor(learning_rates(schedule, 30), dtype=torch.float64)
    assert rates[:, 0].div(rates[:, 1]).allclose(torch.tensor(50.0, dtype=torch.float64))
    assert len(set(rates[:, 0].tolist())) > 1  # it did move


def test_state_loads_with_weights_only_and_continues_exactly():
    whole = learning_rates(Cosine(warmup=3), 12)

    optimizer = two_groups()
    scheduler = Cosine(warmup=3).scheduler(optimizer, 12)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    optimizer = two_groups(lrs=(9.0, 9.0))
    scheduler = Cosine(warmup=3).scheduler(optimizer, 12)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    for step in range(5, 12):
        assert [group["lr"] for group in optimizer.param_groups] == whole[step]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_and_their_schedulers_can_be_pickled_and_copied(schedule):
    for copied in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert vars(copied) == vars(schedule)
        assert copied(0.3) == schedule(0.3)
    scheduler = pickle.loads(pickle.dumps(schedule.scheduler(two_groups(), 10)))
    assert scheduler.get_last_lr() == schedule.scheduler(two_groups(), 10).get_last_lr()


@pytest.mark.parametrize("schedule", [Linear(), Constant(warmup=9), Cosine(warmup=0.5)], ids=repr)
def test_a_group_added_during_the_run_has_its_rate_at_the_peak(schedule):
    optimizer = two_groups(lrs=(0.1,))
    scheduler = schedule.scheduler(optimizer, 10)
    for step in range(10):
        if step == 5:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.02})
        elif step > 5:
            assert optimizer.param_groups[1]["lr"] == pytest.approx(0.02 * schedule.at_step(step, 10))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * schedule.at_step(step, 10))
        optimizer.step()
        scheduler.step()


def test_callbacks_that_add_groups_find_a_lambda_lr():
    """finetuning-scheduler takes known schedulers only, and asks them for the multiplier of a new group."""
    optimizer = two_groups()
    scheduler = Cosine(warmup=3).scheduler(optimizer, 12)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    assert len(scheduler.lr_lambdas) == len(optimizer.param_groups)
    assert scheduler.lr_lambdas[-1](5) == Cosine(warmup=3).at_step(5, 12)


def test_a_length_set_anew_moves_the_rates_at_once():
    optimizer = two_groups()
    scheduler = Linear().scheduler(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    scheduler.set_length(20)
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["initial_lr"] * (1 - 4.5 / 20))


def test_another_schedule_than_the_saved_one_is_named():
    state = Cosine(warmup=3).scheduler(two_groups(), 12).state_dict()
    with pytest.warns(UserWarning, match=r"saved run had the schedule Cosine\(warmup=3, final=0\.0\)\. .*Linear\("):
        Linear().scheduler(two_groups(), 12).load_state_dict(state)
    before = {key: value for key, value in state.items() if key != "schedule_name"}  # of an older version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Linear().scheduler(two_groups(), 12).load_state_dict(before)
        Cosine(warmup=3).scheduler(two_groups(), 12).load_state_dict(state)


def test_agrees_with_lambda_lr():
    schedule, optimizer = Cosine(warmup=3, final=0.1), two_groups()
    reference = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.at_step(step, 12))
    expected = []
    for _ in range(12):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        reference.step()
    assert learning_rates(schedule, 12) == expected


def test_a_schedule_of_your_own_is_one_method():
    class Square(Schedule):
        def after_warmup(self, progress, warmup, total_steps):
            return (1.0 - progress) ** 2

    assert Square(warmup=0.5)(0.25) == 0.5
    assert learning_rates(Square(), 4)[1][0] == pytest.approx(0.1 * 0.625**2)


def test_repr_shows_how_it_was_made():
    assert repr(Cosine(warmup=0.02, final=0.1)) == "Cosine(warmup=0.02, final=0.1)"


@pytest.mark.parametrize("warmup", [-0.1, -3, math.nan, math.inf])
def test_lengths_out_of_range_are_refused(warmup):
    with pytest.raises(ValueError, match=r"warmup must be 0 or more, got .*fraction of the run"):
        Cosine(warmup=warmup)


def test_steps_must_be_whole():
    with pytest.raises(ValueError, match=r"decay=2\.5 is read as a number of steps"):
        WarmupStableDecay(decay=2.5)


@pytest.mark.parametrize("final", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("make", [Linear, Cosine, WarmupStableDecay])
def test_final_out_of_range_is_refused(make, final):
    with pytest.raises(ValueError, match=r"final, the multiplier at the end of the run, must be 0 or more, got"):
        make(final=final)


def test_fractions_that_exceed_the_run_are_refused():
    with pytest.raises(ValueError, match=r"warmup=0\.5 and decay=0\.6 .* add up to more than 1"):
        WarmupStableDecay(warmup=0.5, decay=0.6)


def test_steps_need_the_length_of_the_run():
    with pytest.raises(ValueError, match=r"warmup=10 is a number of steps: also give total_steps"):
        Cosine(warmup=10)(0.5)
    assert Cosine(warmup=10)(0.05, total_steps=100) == pytest.approx(0.5)


def test_negative_progress_is_refused():
    with pytest.raises(ValueError, match=r"progress must be 0 .* got -0\.1"):
        Cosine()(-0.1)


@pytest.mark.parametrize("total_steps", [math.inf, math.nan, -1, 0])
def test_endless_or_unknown_runs_are_refused_and_max_steps_is_named(total_steps):
    with pytest.raises(ValueError, match=r"Cosine needs the number of optimizer steps .* Trainer\(max_steps=\.\.\.\)"):
        Cosine().scheduler(two_groups(), total_steps)


def test_a_run_shorter_than_its_warmup_warns_and_runs():
    with pytest.warns(UserWarning, match=r"run of 5 steps ends within the warmup of 10 steps"):
        scheduler = Linear(warmup=10).scheduler(two_groups(), 5)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.05)


def test_a_run_too_short_for_its_decay_warns_and_decays_after_the_warmup():
    schedule = WarmupStableDecay(warmup=4, decay=10)
    with pytest.warns(UserWarning, match=r"do not fit in the run of 8 steps"):
        rates = [lr for lr, _ in learning_rates(schedule, 8)]
    assert rates == pytest.approx([0.1 * m for m in (0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125)])
