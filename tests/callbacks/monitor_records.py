"""What the monitors logged, what optimizers really did, and the two compared.

References are formulas over numpy's float64 singular values, one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.callbacks.monitor_subjects import PAIR_MATRICES, ZOO_MATRICES, matrices
from tests.lightning_helpers import Items, trainer
from tests.optim.observed import by_name


def _participation_ratio(s: np.ndarray) -> float:
    return float((s**2).sum() ** 2 / (s**4).sum())


def _effective_rank(s: np.ndarray) -> float:
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _orthogonality_error(s: np.ndarray) -> float:
    return float(np.sqrt(((s**2 / (s**2).mean() - 1) ** 2).mean()))


def condition_number(s: np.ndarray, quantile: float) -> float:
    """Infinite where the quantile is zero."""
    low = np.quantile(s, quantile)
    return float(s[0] / low) if low > 0 else math.inf


QUANTITIES: dict[str, Callable[[np.ndarray], float]] = {
    "spectral_norm": lambda s: float(s[0]),
    "stable_rank": lambda s: float((s**2).sum() / s[0] ** 2),
    "participation_ratio": _participation_ratio,
    "effective_rank": _effective_rank,
    "orthogonality_error": _orthogonality_error,
    "condition_number": lambda s: condition_number(s, 0.1),
}
"""Formulas over the singular values of one matrix, by the key without ``update_``."""

# Quantities that rest on power iteration are estimates; the others are exact.
TOLERANCE = {"spectral_norm": 0.01, "stable_rank": 0.02, "update_stable_rank": 0.05}


def quantity(key: str, matrix: np.ndarray) -> float:
    """Reference value of a quantity, by its key."""
    values = np.linalg.svd(matrix, compute_uv=False)
    if key == "rms_operator_norm":
        return float(values[0] * math.sqrt(matrix.shape[1] / matrix.shape[0]))
    return QUANTITIES[key.removeprefix("update_")](values)


class Records(Logger):
    """A logger in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "records"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step), {key: float(value) for key, value in metrics.items()}))

    def series(self, key: str) -> dict[int, float]:
        """Step -> value of one key; a key is logged at most once a step."""
        steps = [step for step, row in self.rows if key in row]
        assert len(steps) == len(set(steps)), f"{key} was logged more than once at a step: {steps}"
        return {step: row[key] for step, row in self.rows if key in row}

    def at(self, quantity_key: str) -> dict[int, dict[str, float]]:
        """Step -> what follows the quantity's key -> value, e.g. ``{0: {"mean": 1.2, "tall.weight": 1.3}}``."""
        prefix = f"{quantity_key}/"
        found: dict[int, dict[str, float]] = {}
        for step, row in self.rows:
            values = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
            if values:
                assert step not in found, f"{quantity_key} was logged more than once at step {step}"
                found[step] = values
        return found

    def watched(self) -> set[str]:
        """All keys but those of the module and the Trainer."""
        return {key for _, row in self.rows for key in row} - {"loss", "epoch"}


class Recorder(pl.Callback):
    """What optimizers really did, by the loggers' step: weights after it, and updates with the decay taken out.

    Args:
        decoupled: whether the optimizers shrink weights by ``1 - lr * weight_decay`` besides their update.
    """

    def __init__(self, decoupled: bool = True) -> None:
        self.decoupled = decoupled
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.updates: dict[int, dict[str, Tensor]] = {}
        self.with_decay: dict[int, dict[str, Tensor]] = {}
        self.observed: dict[int, dict[str, Tensor]] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.name_of = {p: name.replace("_orig_mod.", "") for name, p in pl_module.named_parameters()}
        self.loop = trainer.fit_loop.epoch_loop
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)
            if hasattr(optimizer, "observe_updates"):
                optimizer.observe_updates(by_name(self._observe))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.step in self.updates:
            self.weights[self.step] = {name: p.detach().clone() for p, name in self.name_of.items()}

    @property
    def step(self) -> int:
        return self.loop._batches_that_stepped

    def _before(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.before = {p: p.detach().to(torch.float64, copy=True) for p in params}
        self.factor = {
            p: 1 - float(group["lr"]) * group["weight_decay"] if self.decoupled else 1.0
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def _after(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        moved = [p for p in self.before if p.grad is not None]
        updates = {self.name_of[p]: self.before[p] * self.factor[p] - p.detach().double() for p in moved}
        self.updates.setdefault(self.step, {}).update(updates)
        with_decay = {self.name_of[p]: self.before[p] - p.detach().double() for p in moved}
        self.with_decay.setdefault(self.step, {}).update(with_decay)
        gradients = {self.name_of[p]: p.grad.detach().clone() for p in moved}
        self.gradients.setdefault(self.step, {}).update(gradients)

    def _observe(self, name: str, update: Tensor) -> None:
        self.observed.setdefault(self.step, {})[name.replace("_orig_mod.", "")] = update


def watch(monitor: type[pl.Callback], **settings: Any) -> pl.Callback:
    """A monitor that logs every matrix at every step and is silent otherwise; keywords replace its settings."""
    return monitor(**{"every_n_steps": 1, "per_parameter": True, "print_table": False, "plot": False, **settings})


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, decoupled: bool = True, batches: int = 5, **settings: Any
) -> tuple[Records, Recorder, pl.Trainer]:
    """Fit with a logger in memory that takes every step; 5 steps unless told."""
    records, recorder = Records(), Recorder(decoupled)
    fitted = trainer(
        **{"logger": records, "log_every_n_steps": 1, "callbacks": [recorder, *callbacks], **settings},
    )
    fitted.fit(module, datamodule=Items(batches))
    return records, recorder, fitted


def expected(
    key: str, steps: dict[int, dict[str, Tensor]], among: Iterable[str] = ZOO_MATRICES
) -> dict[int, dict[str, float]]:
    """Reference values of a quantity by step and matrix."""
    return {
        step: {name: quantity(key, matrix) for name, matrix in matrices(tensors, among).items()}
        for step, tensors in steps.items()
    }


def assert_values(
    logged: dict[int, dict[str, float]],
    reference: dict[int, dict[str, float]],
    key: str,
    rtol: float | None = None,
) -> None:
    """The same steps, matrices and values; aggregates are those of the logged values of the matrices.

    Args:
        logged: step -> name -> value, from :meth:`Records.at`.
        reference: the same from :func:`expected`.
        key: the quantity.
        rtol: relative tolerance; None for the quantity's own.
    """
    rtol = rtol or TOLERANCE.get(key, 1e-4)
    extreme, reduce = ("min", min) if "rank" in key or "participation" in key else ("max", max)
    assert logged.keys() == reference.keys()
    for step, values in reference.items():
        found = dict(logged[step])
        aggregates = found.pop("mean"), found.pop(extreme)
        assert found.keys() == values.keys(), f"step {step}"
        pairs = {name: (found[name], value) for name, value in values.items()}
        wrong = {name: pair for name, pair in pairs.items() if not _close(*pair, rtol, key)}
        assert not wrong, f"{key} at step {step} (logged, expected): {wrong}"
        counted = [value for value in found.values() if not math.isinf(value)]
        assert aggregates[0] == pytest.approx(sum(counted) / len(counted), rel=1e-5)
        assert aggregates[1] == pytest.approx(reduce(found.values()), rel=1e-5)


def _close(value: float, reference: float, rtol: float, key: str) -> bool:
    """Within ``rtol``, of what rounding leaves of it: singular values are known to 1e-5 of the largest."""
    if "condition_number" in key:
        value, reference = 1 / value, 1 / reference
    return abs(value - reference) <= rtol * abs(reference) + 1e-5


WEIGHT_KEYS = ("spectral_norm", "stable_rank", "participation_ratio", "effective_rank")
UPDATE_KEYS = (
    "update_orthogonality_error",
    "update_condition_number",
    "update_stable_rank",
    "update_participation_ratio",
    "update_effective_rank",
)


def update_monitors(every: int | None = 1, spectrum: int | None = None, **settings: Any) -> list[pl.Callback]:
    """Both monitors of updates; spectra as often as the rest unless told."""
    clock = {"every_n_steps": every, "spectrum_every_n_steps": every if spectrum is None else spectrum}
    return [watch(kind, **clock, **settings) for kind in (UpdateOrthogonalityMonitor, EffectiveRankMonitor)]


def all_three(every: int | None = 1, spectrum: int | None = None, **settings: Any) -> list[pl.Callback]:
    """The three monitors; spectra as often as the rest unless told."""
    return [watch(SpectralNormMonitor, every_n_steps=every, **settings), *update_monitors(every, spectrum, **settings)]


def only(steps: dict[int, Any], wanted: Iterable[int]) -> dict[int, Any]:
    """Those of the steps that are wanted, all of which must be there."""
    return {step: steps[step] for step in wanted}


def assert_weights(records: Records, weights: dict[int, Any], among: Iterable[str]) -> None:
    """Every quantity of weights, at exactly these steps."""
    for key in WEIGHT_KEYS:
        assert_values(records.at(key), expected(key, weights, among), key)


def assert_updates(records: Records, updates: dict[int, Any], among: Iterable[str], rtol: float = 1e-4) -> None:
    """Every quantity of updates, at exactly these steps; ``rtol`` is for those that are no estimates."""
    for key in UPDATE_KEYS:
        assert_values(records.at(key), expected(key, updates, among), key, rtol=TOLERANCE.get(key, rtol))


def assert_all(
    records: Records,
    weights: dict[int, Any],
    updates: dict[int, Any],
    among: Iterable[str] = PAIR_MATRICES,
    rtol: float = 1e-4,
) -> None:
    """Every quantity, at exactly these steps; ``rtol`` is for those of updates that are no estimates."""
    assert_weights(records, weights, among)
    assert_updates(records, updates, among, rtol)


def decay_shows(recorder: Recorder) -> bool:
    """Whether a monitor that forgot the decay would have logged something else."""
    key = "update_orthogonality_error"
    true, forgotten = (expected(key, steps, PAIR_MATRICES) for steps in (recorder.updates, recorder.with_decay))
    return any(
        abs(forgotten[step][name] - true[step][name]) > 0.02 * true[step][name]
        for step in true
        for name in PAIR_MATRICES
    )
