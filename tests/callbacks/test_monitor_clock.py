"""Under which steps the monitors log, how often, and who else can read it."""

from __future__ import annotations

import csv
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.callbacks.monitor_records import (
    all_three,
    assert_all,
    assert_values,
    expected,
    fit,
    only,
    watch,
)
from tests.callbacks.monitor_subjects import PAIR_MATRICES, Pair
from tests.lightning_helpers import Items, trainer

adamw = partial(AdamW, lr=0.02, weight_decay=0.5)


def read_csv(logger: CSVLogger, key: str) -> dict[int, float]:
    """Step -> value of one column of what a CSVLogger wrote."""
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(lines) if row.get(key)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_in_a_logger_is_that_of_the_loss(accumulate: int, tmp_path: Path) -> None:
    class Ratio(Pair):
        """Logs, on the way to the loss, what the monitor should have said at the step before."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                gram = self.tall.weight.T @ self.tall.weight
                self.log("before", gram.trace() ** 2 / gram.square().sum())
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    monitor = watch(EffectiveRankMonitor, include=["tall.weight"])
    fit(
        Ratio(partial(AdamW, lr=0.1)),
        monitor,
        logger=logger,
        batches=6,
        accumulate_grad_batches=accumulate,
        max_steps=-1,
        max_epochs=2,
    )
    loss, before = read_csv(logger, "loss"), list(read_csv(logger, "before").values())
    after = read_csv(logger, "participation_ratio/tall.weight")
    assert list(after) == list(loss) == list(range(12 // accumulate))
    # Weights after one step are those before the next.
    assert list(after.values())[:-1] == pytest.approx(before[1:], rel=1e-4)
    assert any(abs(one - other) > 0.01 * one for one, other in pairwise(before))


def test_measured_every_n_steps_and_not_between() -> None:
    """And what was measured earlier is not logged again where the Trainer logs more often."""
    records, recorder, _ = fit(
        Pair(adamw), *all_three(every=4), log_every_n_steps=2, precision="64-true", max_steps=12, max_epochs=-1
    )
    steps = (3, 7, 11)
    assert list(records.series("loss")) == [1, 3, 5, 7, 9, 11]
    assert_all(records, only(recorder.weights, steps), only(recorder.updates, steps))


def test_count_of_steps_goes_on_over_epochs() -> None:
    """Epochs of five batches, of which every third step is measured; the last epoch is cut short."""
    records, recorder, _ = fit(
        Pair(adamw),
        *all_three(every=3),
        batches=5,
        log_every_n_steps=3,
        precision="64-true",
        max_steps=13,
        max_epochs=-1,
    )
    steps = (2, 5, 8, 11)
    assert_all(records, only(recorder.weights, steps), only(recorder.updates, steps))


def test_the_trainers_interval_is_the_default() -> None:
    monitors = all_three(every=None, spectrum=0)
    records, _, _ = fit(Pair(adamw), *monitors, log_every_n_steps=5, max_steps=12, max_epochs=-1)
    assert list(records.series("spectral_norm/mean")) == [4, 9]
    assert list(records.series("update_orthogonality_error/mean")) == [4, 9]
    assert list(records.series("participation_ratio/mean")) == [4, 9]


@pytest.mark.parametrize("logged_every", [2, 7, 50])
def test_interval_does_not_depend_on_the_trainers(logged_every: int) -> None:
    records, recorder, _ = fit(
        Pair(adamw),
        *all_three(every=3),
        log_every_n_steps=logged_every,
        precision="64-true",
        max_steps=9,
        max_epochs=-1,
    )
    steps = (2, 5, 8)
    assert list(records.series("loss")) == list(range(logged_every - 1, 9, logged_every))
    assert_all(records, only(recorder.weights, steps), only(recorder.updates, steps))


@pytest.mark.parametrize("every", [2, None], ids=["own", "the Trainer's"])
@pytest.mark.parametrize("monitor", [UpdateOrthogonalityMonitor, EffectiveRankMonitor])
def test_spectrum_clock_that_is_no_multiple_is_refused(monitor: Any, every: int | None) -> None:
    with pytest.raises(MisconfigurationException, match=r"spectrum_every_n_steps.*5.*every_n_steps.*2"):
        fit(Pair(adamw), watch(monitor, every_n_steps=every, spectrum_every_n_steps=5), log_every_n_steps=2)


def test_nothing_is_decomposed_between_the_steps_of_the_spectrum_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock is for: singular values of large matrices take long."""
    at: list[int] = []
    batches: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            batches.append(0)

    def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
        at.append(len(batches) - 1)
        return real(*args, **kwargs)

    for name in ("svd", "svdvals", "eigvalsh"):  # not eigh, which power iteration has for a few vectors
        monkeypatch.setattr(torch.linalg, name, partial(counted, getattr(torch.linalg, name)))
    fit(Pair(adamw), Counts(), *all_three(every=2, spectrum=6), max_steps=12, max_epochs=-1)
    assert set(at) == {5, 11}


def test_monitors_with_clocks_and_choices_of_their_own_do_not_mix() -> None:
    """Though they share one pass over the matrices."""
    records, recorder, _ = fit(
        Pair(adamw),
        watch(SpectralNormMonitor, include=["embed.weight"]),
        watch(UpdateOrthogonalityMonitor, every_n_steps=2, spectrum_every_n_steps=4, exclude=["tall.*"]),
        watch(EffectiveRankMonitor, every_n_steps=2, spectrum_every_n_steps=6),
        precision="64-true",
        max_steps=12,
        max_epochs=-1,
    )
    second, fourth, sixth = (tuple(range(n - 1, 12, n)) for n in (2, 4, 6))
    for key, steps, among in (
        ("spectral_norm", range(12), ["embed.weight"]),
        ("update_orthogonality_error", second, ["wide.weight"]),
        ("update_condition_number", fourth, ["wide.weight"]),
        ("participation_ratio", second, PAIR_MATRICES),
        ("update_participation_ratio", second, PAIR_MATRICES),
        ("effective_rank", sixth, PAIR_MATRICES),
        ("update_effective_rank", sixth, PAIR_MATRICES),
    ):
        tensors = recorder.updates if key.startswith("update") else recorder.weights
        assert_values(records.at(key), expected(key, only(tensors, steps), among), key)


CLOCKED = ("update_condition_number", "effective_rank", "update_effective_rank")


@pytest.mark.parametrize(
    ("spectrum", "steps"), [(6, [5, 11, 17, 23]), (0, []), (None, [19])], ids=["6", "never", "10 x every_n_steps"]
)
def test_spectra_have_a_clock_of_their_own(spectrum: int | None, steps: list[int]) -> None:
    clock = {} if spectrum is None else {"spectrum_every_n_steps": spectrum}
    monitors = [watch(kind, every_n_steps=2, **clock) for kind in (UpdateOrthogonalityMonitor, EffectiveRankMonitor)]
    records, recorder, _ = fit(
        Pair(adamw), *monitors, log_every_n_steps=2, precision="64-true", max_steps=24, max_epochs=-1
    )
    assert list(records.series("update_orthogonality_error/mean")) == list(range(1, 24, 2))
    assert list(records.series("participation_ratio/mean")) == list(range(1, 24, 2))
    for key in CLOCKED:
        tensors = recorder.updates if key.startswith("update") else recorder.weights
        assert_values(records.at(key), expected(key, only(tensors, steps), PAIR_MATRICES), key)


def test_values_are_metrics_for_other_callbacks(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="spectral_norm/max", mode="max", save_top_k=1, every_n_train_steps=1, filename="{step}"
    )
    records, recorder, fitted = fit(
        Pair(partial(SGD, lr=0.3)), watch(SpectralNormMonitor), checkpoint, enable_checkpointing=True, max_steps=8
    )
    logged = records.series("spectral_norm/max")
    assert float(fitted.callback_metrics["spectral_norm/max"]) == pytest.approx(logged[max(logged)])
    assert float(checkpoint.best_model_score) == pytest.approx(max(logged.values()))
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    step = max(logged, key=logged.get)
    assert torch.equal(best["state_dict"]["tall.weight"], recorder.weights[step]["tall.weight"])


def test_metrics_without_loggers() -> None:
    """Callbacks may ask for them all the same."""

    class Asks(pl.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.found.append(float(trainer.callback_metrics["spectral_norm/max"]))

    asks, module = Asks(), Pair(adamw)
    trainer(callbacks=[watch(SpectralNormMonitor), asks]).fit(module, datamodule=Items())
    largest = max(float(torch.linalg.matrix_norm(layer.weight, ord=2)) for layer in (module.tall, module.wide))
    assert asks.found == [pytest.approx(largest, rel=0.01)]
