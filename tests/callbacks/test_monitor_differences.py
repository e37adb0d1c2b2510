"""The values that the monitors log of updates of optimizers that do not show them: those of torch, for example."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from tests.callbacks.monitor_records import (
    UPDATE_KEYS,
    assert_updates,
    decay_shows,
    fit,
    quantity,
    update_monitors,
)
from tests.callbacks.monitor_subjects import (
    PAIR_MATRICES,
    ZOO_MATRICES,
    Pair,
    Zoo,
)

DECAY = 0.5  # so large that it would show among the updates


TORCH = {
    "AdamW": (partial(AdamW, lr=0.02, weight_decay=DECAY), True),
    "AdamW of one tensor at a time": (partial(AdamW, lr=0.02, weight_decay=DECAY, foreach=False), True),
    "AdamW fused": (partial(AdamW, lr=0.02, weight_decay=DECAY, fused=True), True),
    "AdamW with amsgrad": (partial(AdamW, lr=0.02, weight_decay=DECAY, amsgrad=True), True),
    "AdamW with a rate in a tensor": (partial(AdamW, lr=torch.tensor(0.02), weight_decay=DECAY, foreach=False), True),
    "Adam with L2 decay": (partial(Adam, lr=0.02, weight_decay=DECAY), False),
    "Adam with decoupled decay": (partial(Adam, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True), True),
    "NAdam with L2 decay": (partial(NAdam, lr=0.02, weight_decay=DECAY), False),
    "NAdam with decoupled decay": (partial(NAdam, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True), True),
    "RAdam with decoupled decay": (partial(RAdam, lr=0.02, weight_decay=DECAY, decoupled_weight_decay=True), True),
    "SGD": (partial(SGD, lr=0.1), False),
    "SGD with momentum": (partial(SGD, lr=0.1, momentum=0.9, nesterov=True), False),
    "SGD with L2 decay": (partial(SGD, lr=0.1, momentum=0.9, weight_decay=DECAY), False),
    "SGD that maximizes": (partial(SGD, lr=0.001, maximize=True), False),
    "RMSprop with L2 decay": (partial(RMSprop, lr=0.01, weight_decay=DECAY), False),
    "Adamax with L2 decay": (partial(Adamax, lr=0.02, weight_decay=DECAY), False),
    "Adagrad": (partial(Adagrad, lr=0.1), False),
    "Adafactor": (partial(Adafactor, lr=0.02, weight_decay=DECAY), True),
    "L-BFGS, which evaluates several times a step": (partial(LBFGS, lr=0.1, max_iter=3), False),
}


@pytest.mark.parametrize("optimizer", TORCH)
def test_optimizers_of_torch_in_a_module_without_the_mixin(optimizer: str) -> None:
    make, decoupled = TORCH[optimizer]
    module = Zoo(make)
    records, recorder, _ = fit(module, *update_monitors(), decoupled=decoupled, precision="64-true", max_steps=3)
    assert_updates(records, recorder.updates, ZOO_MATRICES)
    if decoupled:
        assert decay_shows(recorder)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam with L2 decay", "SGD with momentum"])
def test_optimizers_of_torch_in_float32(optimizer: str) -> None:
    make, decoupled = TORCH[optimizer]
    records, recorder, _ = fit(Zoo(make), *update_monitors(), decoupled=decoupled)
    assert_updates(records, recorder.updates, ZOO_MATRICES, rtol=1e-3)  # of the rounding of weights


def test_muon_of_torch() -> None:
    def matrices_only(params: Any) -> Optimizer:
        return torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02, weight_decay=DECAY)

    records, recorder, _ = fit(Pair(matrices_only), *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)
    assert decay_shows(recorder)


@pytest.mark.parametrize("decoupled", [True, False])
def test_optimizers_of_another_package_say_whether_decay_is_decoupled(decoupled: bool) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    make = partial(package.AdaBelief, lr=0.02, weight_decay=DECAY, weight_decouple=decoupled, fixed_decay=False)
    records, recorder, _ = fit(Pair(make), *update_monitors(), decoupled=decoupled, precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)
    assert decay_shows(recorder) == decoupled


def test_adamw_by_its_equations() -> None:
    """Not from differences of weights: momentum over root of the second moment, from the gradients of each step."""
    rate, beta1, beta2, eps = 0.02, 0.9, 0.999, 1e-8
    records, recorder, _ = fit(Pair(partial(AdamW, lr=rate, weight_decay=DECAY)), *update_monitors(), max_steps=4)
    mean: dict[str, np.ndarray] = {}
    square: dict[str, np.ndarray] = {}
    for step in range(4):
        for name in PAIR_MATRICES:
            grad = recorder.gradients[step][name].double().numpy()
            mean[name] = beta1 * mean.get(name, 0.0) + (1 - beta1) * grad
            square[name] = beta2 * square.get(name, 0.0) + (1 - beta2) * grad**2
            corrected = mean[name] / (1 - beta1 ** (step + 1)), square[name] / (1 - beta2 ** (step + 1))
            update = corrected[0] / (np.sqrt(corrected[1]) + eps)
            for key in set(UPDATE_KEYS) - {"update_stable_rank"}:
                assert records.at(key)[step][name] == pytest.approx(quantity(key, update), rel=1e-3), (key, step)


class Scheduled(Pair):
    """A multiplier of the learning rate a step."""

    def __init__(self, make_optimizer: Callable[[Any], Optimizer], multiplier: Callable[[int], float]) -> None:
        super().__init__(make_optimizer)
        self.multiplier = multiplier

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self.multiplier), "interval": "step"}]


def test_decay_follows_a_schedule() -> None:
    module = Scheduled(partial(AdamW, lr=0.05, weight_decay=DECAY), lambda step: 1 / (1 + step))
    records, recorder, _ = fit(module, *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)
    assert decay_shows(recorder)


def test_steps_with_a_learning_rate_of_zero_have_no_update() -> None:
    module = Scheduled(partial(AdamW, lr=0.05, weight_decay=DECAY), lambda step: 0.0 if step in (0, 3) else 1.0)
    records, recorder, _ = fit(module, *update_monitors(), precision="64-true")
    moving = {step: updates for step, updates in recorder.updates.items() if step not in (0, 3)}
    assert len(moving) == 3
    assert_updates(records, moving, among=PAIR_MATRICES)
    assert all(math.isfinite(value) for _, row in records.rows for value in row.values())


def test_optimizer_that_finds_its_learning_rate_itself() -> None:
    """As Adafactor with a relative step: its group has None for a learning rate."""

    class Relative(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None, "weight_decay": 0.0, "decoupled_weight_decay": True})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad / 10)
            return loss

    records, recorder, _ = fit(Pair(Relative), *update_monitors(), decoupled=False, precision="64-true")
    assert_updates(records, recorder.gradients, among=PAIR_MATRICES)
