"""The values that the monitors log of weights, for every kind of matrix, and which matrices they watch."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, AdamW

from lightning_muon import HybridOptimizer, Muon, ParameterRule
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.callbacks.monitor_records import assert_values, expected, fit, quantity, watch
from tests.callbacks.monitor_subjects import (
    PAIR_MATRICES,
    ZOO_MATRICES,
    GaussianLayers,
    MuonPair,
    MuonZoo,
    Pair,
    Zoo,
    matrices,
)
from tests.lightning_helpers import NUM_ITEMS

adamw = partial(AdamW, lr=0.01)
sgd = partial(SGD, lr=0.05)


def names_logged(records: Any, key: str) -> set[str]:
    """Everything after the quantity's key but the aggregates, over all steps."""
    return {name for values in records.at(key).values() for name in values} - {"mean", "max", "min"}


SUBJECTS = {
    "Muon": (lambda: MuonZoo(matrix_optimizer=partial(Muon, lr=0.02)), {}),
    "SGD": (lambda: Zoo(sgd), {}),
    "AdamW in float64": (lambda: Zoo(adamw), {"precision": "64-true"}),
    "Muon in bfloat16": (lambda: MuonZoo(matrix_optimizer=partial(Muon, lr=0.02)), {"precision": "bf16-true"}),
    "AdamW in bfloat16": (lambda: Zoo(adamw), {"precision": "bf16-true"}),
    "Muon with bfloat16 autocast": (MuonZoo, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_ranks_of_every_kind_of_matrix(subject: str) -> None:
    make, settings = SUBJECTS[subject]
    records, recorder, _ = fit(make(), watch(EffectiveRankMonitor, spectrum_every_n_steps=1), **settings)
    assert len(recorder.weights) == 5
    for key in ("participation_ratio", "effective_rank", "stable_rank"):
        assert_values(records.at(key), expected(key, recorder.weights), key)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_spectral_norm_of_every_kind_of_matrix(subject: str) -> None:
    """An estimate from below, which the first steps improve."""
    make, settings = SUBJECTS[subject]
    records, recorder, _ = fit(
        make(), watch(SpectralNormMonitor, rms=True), max_steps=20, max_epochs=-1, batches=4, **settings
    )
    for key in ("spectral_norm", "rms_operator_norm"):
        logged, reference = records.at(key), expected(key, recorder.weights)
        assert_values(logged, reference, key, rtol=0.05)
        assert_values({19: logged[19]}, {19: reference[19]}, key, rtol=0.01)
        for step, values in reference.items():
            assert all(logged[step][name] <= value * (1 + 1e-5) for name, value in values.items())


def test_spectral_norm_of_larger_matrices_within_one_percent_after_twenty_steps() -> None:
    records, recorder, _ = fit(GaussianLayers(), watch(SpectralNormMonitor), max_steps=20, max_epochs=-1)
    weights = recorder.weights[19]
    logged = records.at("spectral_norm")[19]
    for name in ("square.weight", "tall.weight", "wide.weight"):
        exact = quantity("spectral_norm", weights[name].double().numpy())
        assert logged[name] == pytest.approx(exact, rel=0.01)
        assert logged[name] <= exact * (1 + 1e-5), "an estimate from below"


def test_spectral_norm_follows_a_jump_of_the_weights() -> None:
    """The direction of another matrix is no use, as after loading weights in the middle of a fit."""

    class Jump(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 10:
                torch.manual_seed(77)
                for layer in (pl_module.square, pl_module.tall, pl_module.wide):
                    nn.init.normal_(layer.weight, std=0.2)

    records, recorder, _ = fit(GaussianLayers(), Jump(), watch(SpectralNormMonitor), max_steps=30, max_epochs=-1)
    for step, rel in ((10, 0.1), (29, 0.01)):
        for name in ("square.weight", "tall.weight", "wide.weight"):
            exact = quantity("spectral_norm", recorder.weights[step][name].double().numpy())
            assert records.at("spectral_norm")[step][name] == pytest.approx(exact, rel=rel)


def test_spectral_norm_follows_a_direction_that_overtakes() -> None:
    """The largest direction decays until another one is the largest, orthogonal to what was tracked."""

    class Diagonal(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)
            nn.init.eye_(self.layer.weight)
            self.head = nn.Linear(6, NUM_ITEMS)
            with torch.no_grad():
                self.layer.weight[0, 0] = 2.0

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.layer.weight[0, 0] * 1.0 - self.layer.weight[3, 3] + 0 * self.head.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters(), lr=0.1)

    monitor = watch(SpectralNormMonitor, include=["layer.weight"])
    records, recorder, _ = fit(Diagonal(), monitor, max_steps=20, max_epochs=-1)
    logged = {step: values["layer.weight"] for step, values in records.at("spectral_norm").items()}
    for step, weights in recorder.weights.items():
        exact = quantity("spectral_norm", weights["layer.weight"].double().numpy())
        assert logged[step] <= exact * (1 + 1e-5)
        if step not in range(4, 9):  # around step 5 both are nearly equal
            assert logged[step] == pytest.approx(exact, rel=0.01), step
    assert logged[19] == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize(
    ("monitor", "settings", "keys"),
    [
        (SpectralNormMonitor, {}, {"spectral_norm/mean", "spectral_norm/max"}),
        (
            UpdateOrthogonalityMonitor,
            {},
            {"update_orthogonality_error/mean", "update_orthogonality_error/max"}
            | {"update_condition_number/mean", "update_condition_number/max"},
        ),
        (
            EffectiveRankMonitor,
            {},
            {
                f"{update}{rank}/{aggregate}"
                for update in ("", "update_")
                for rank in ("stable_rank", "participation_ratio", "effective_rank")
                for aggregate in ("mean", "min")
            },
        ),
    ],
)
def test_without_per_parameter_only_aggregates_are_logged(monitor: Any, settings: Any, keys: set[str]) -> None:
    quiet = {"print_table": False, "plot": False, "every_n_steps": 1}
    if monitor is not SpectralNormMonitor:
        quiet["spectrum_every_n_steps"] = 1
    records, _, _ = fit(Pair(adamw), monitor(**quiet, **settings))
    assert records.watched() == keys
    each, _, _ = fit(Pair(adamw), monitor(per_parameter=True, **quiet, **settings))
    for key in keys:
        assert records.series(key) == pytest.approx(each.series(key), rel=1e-6)
    quantities = {key.split("/")[0] for key in keys}
    assert each.watched() == keys | {f"{key}/{name}" for key in quantities for name in PAIR_MATRICES}


def test_normalized_ranks_are_fractions_of_the_smaller_side() -> None:
    settings = {"spectrum_every_n_steps": 1}
    plain, _, _ = fit(MuonZoo(), watch(EffectiveRankMonitor, **settings))
    records, recorder, _ = fit(MuonZoo(), watch(EffectiveRankMonitor, normalize=True, **settings))
    sizes = {name: min(matrix.shape) for name, matrix in matrices(recorder.weights[0], ZOO_MATRICES).items()}
    for rank in ("stable_rank", "participation_ratio", "effective_rank"):
        for key in (rank, f"update_{rank}"):
            assert not records.at(key), "one key has one unit"
            for step, values in records.at(f"{key}_over_r").items():
                for name, size in sizes.items():
                    assert 0 < values[name] <= 1 + 1e-5
                    assert values[name] * size == pytest.approx(plain.at(key)[step][name], rel=1e-5)
                assert values["mean"] == pytest.approx(sum(values[name] for name in sizes) / len(sizes), rel=1e-5)
                assert values["min"] == pytest.approx(min(values[name] for name in sizes), rel=1e-5)


def test_include_replaces_the_choice_and_exclude_takes_away() -> None:
    module = MuonZoo(matrix_optimizer=partial(Muon, lr=0.02))
    monitor = watch(SpectralNormMonitor, include=["embed.weight", "*.qkv.weight", "experts.*"], exclude=["*.down"])
    records, recorder, _ = fit(module, monitor)
    names = ["embed.weight", *(f"query.qkv.weight.{block}" for block in "qkv"), *(f"experts.up.{i}" for i in range(3))]
    assert_values(
        records.at("spectral_norm"), expected("spectral_norm", recorder.weights, among=names), "spectral_norm"
    )


def test_globs_know_every_name_of_a_shared_parameter() -> None:
    monitor = watch(SpectralNormMonitor, include=["head.weight", "shared_b.*", "square.*"], exclude=["shared_b.*"])
    records, _, _ = fit(Zoo(adamw), monitor)
    assert names_logged(records, "spectral_norm") == {"embed.weight", "square.weight"}


def test_exclude_alone_takes_from_the_default_choice() -> None:
    records, recorder, _ = fit(Zoo(adamw), watch(SpectralNormMonitor, exclude=["experts.*", "*.in_proj_weight"]))
    kept = [name for name in ZOO_MATRICES if not name.startswith(("experts.", "attention.in_proj"))]
    assert_values(records.at("spectral_norm"), expected("spectral_norm", recorder.weights, among=kept), "spectral_norm")


def test_include_of_everything_watches_what_has_two_dimensions() -> None:
    records, _, _ = fit(Zoo(adamw), watch(EffectiveRankMonitor, include=["*"], spectrum_every_n_steps=0))
    assert names_logged(records, "participation_ratio") == {*ZOO_MATRICES, "embed.weight"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_glob_that_matches_nothing_is_refused_with_near_names(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"tall\.weigth.*tall\.weight"):
        fit(Pair(adamw), watch(SpectralNormMonitor, **{argument: ["tall.weigth"]}))


@pytest.mark.parametrize("module", [Zoo, MuonZoo])
def test_frozen_are_left_out_tied_counted_once_embeddings_and_heads_not_watched(module: Any) -> None:
    records, _, _ = fit(module(adamw) if module is Zoo else module(), watch(SpectralNormMonitor))
    names = names_logged(records, "spectral_norm")
    assert "shared_a.weight" in names
    assert not {"frozen.weight", "shared_b.weight", "embed.weight", "head.weight"} & names
    assert not any(name.endswith("bias") for name in names)


def test_frozen_matrix_is_not_watched_on_request_either() -> None:
    records, _, _ = fit(Zoo(adamw), watch(SpectralNormMonitor, include=["frozen.weight", "square.weight"]))
    assert names_logged(records, "spectral_norm") == {"square.weight"}


class Unfreeze(pl.Callback):
    """Trains ``frozen`` from a step on; tells the optimizer where that did not know it."""

    def __init__(self, step: int, add: bool) -> None:
        self.at, self.add = step, add

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            pl_module.frozen.requires_grad_(True)
            if self.add:
                trainer.optimizers[0].add_param_group({"params": [pl_module.frozen.weight]})


@pytest.mark.parametrize("kind", ["AdamW of all", "Muon"])
def test_matrix_unfrozen_in_the_middle_is_watched_from_then_on(kind: str) -> None:
    module = Zoo(partial(AdamW, lr=0.01, weight_decay=0.5)) if kind == "AdamW of all" else MuonZoo()
    monitors = [
        watch(SpectralNormMonitor),
        watch(EffectiveRankMonitor, spectrum_every_n_steps=2),
        watch(UpdateOrthogonalityMonitor, spectrum_every_n_steps=2),
    ]
    records, recorder, _ = fit(module, Unfreeze(3, add=kind == "Muon"), *monitors, max_steps=6, max_epochs=-1)
    updates = recorder.observed if kind == "Muon" else recorder.updates
    for key, tensors in (
        ("spectral_norm", recorder.weights),
        ("participation_ratio", recorder.weights),
        ("update_orthogonality_error", updates),
    ):
        reference = expected(key, tensors)
        for step in (3, 4, 5):
            reference[step] |= expected(key, {step: tensors[step]}, among=["frozen.weight"])[step]
        assert_values(records.at(key), reference, key, rtol=0.05 if key == "spectral_norm" else None)


def test_rules_decide_what_is_watched_in_a_module_without_the_mixin() -> None:
    rules = [ParameterRule(pattern="tall.weight", group="other")]
    records, _, _ = fit(Pair(adamw), watch(SpectralNormMonitor, parameter_rules=rules))
    assert names_logged(records, "spectral_norm") == {"wide.weight"}


def test_rules_of_the_mixin_decide_what_is_watched() -> None:
    rules = [ParameterRule(pattern="tall.weight", group="other"), ParameterRule(pattern="head.weight", group="matrix")]
    records, recorder, _ = fit(MuonPair(parameter_rules=rules), watch(SpectralNormMonitor))
    names = {"wide.weight", "head.weight"}
    assert names_logged(records, "spectral_norm") == names
    assert_values(records.at("spectral_norm"), expected("spectral_norm", recorder.weights, names), "spectral_norm")


def test_layout_of_a_rule_decides_how_a_weight_is_split() -> None:
    rules = [ParameterRule(pattern="tall.weight", split=[12, 8])]
    records, recorder, _ = fit(MuonPair(parameter_rules=rules), watch(SpectralNormMonitor))
    assert names_logged(records, "spectral_norm") == {"tall.weight.0", "tall.weight.1", "wide.weight"}
    for step, weights in recorder.weights.items():
        tall = weights["tall.weight"].double().numpy()
        for name, rows in (("tall.weight.0", tall[:12]), ("tall.weight.1", tall[12:])):
            assert records.at("spectral_norm")[step][name] == pytest.approx(quantity("spectral_norm", rows), rel=0.01)


def test_matrix_stored_transposed_keeps_its_name_and_swaps_its_fans() -> None:
    rules = [ParameterRule(pattern="tall.weight", transposed=True)]
    records, recorder, _ = fit(MuonPair(parameter_rules=rules), watch(SpectralNormMonitor, rms=True))
    for step, weights in recorder.weights.items():
        tall = weights["tall.weight"].double().numpy()
        logged = {key: records.at(key)[step]["tall.weight"] for key in ("spectral_norm", "rms_operator_norm")}
        assert logged["spectral_norm"] == pytest.approx(quantity("spectral_norm", tall), rel=0.01)
        assert logged["rms_operator_norm"] == pytest.approx(quantity("rms_operator_norm", tall.T), rel=0.01)


def test_partition_of_a_hybrid_that_the_module_builds_itself_decides() -> None:
    class Own(Pair):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            rules = [ParameterRule(pattern="tall.weight", group="other")]
            return HybridOptimizer.from_module(self, rules=rules)

    records, _, _ = fit(Own(), watch(SpectralNormMonitor))
    assert names_logged(records, "spectral_norm") == {"wide.weight"}


@pytest.mark.parametrize(("largest", "kept"), [(4, {"grouped.weight.0", "query.qkv.weight.k"}), (6, {"back.weight"})])
def test_matrices_too_large_for_a_decomposition_have_no_spectrum_but_all_the_rest(largest: int, kept: set[str]) -> None:
    monitor = watch(EffectiveRankMonitor, spectrum_every_n_steps=1, max_spectrum_size=largest)
    records, recorder, _ = fit(MuonZoo(), monitor)
    sizes = {name: min(matrix.shape) for name, matrix in matrices(recorder.weights[0], ZOO_MATRICES).items()}
    small = {name for name, size in sizes.items() if size <= largest}
    assert kept <= small
    for key, steps in (("effective_rank", recorder.weights), ("update_effective_rank", recorder.observed)):
        assert_values(records.at(key), expected(key, steps, among=small), key)
    assert names_logged(records, "participation_ratio") == set(sizes)


def test_at_most_max_spectra_matrices_are_decomposed_at_a_step() -> None:
    monitor = watch(EffectiveRankMonitor, spectrum_every_n_steps=1, max_spectra=5)
    records, recorder, _ = fit(MuonZoo(), monitor)
    reference = expected("effective_rank", recorder.weights)
    for step, values in records.at("effective_rank").items():
        names = values.keys() - {"mean", "min"}
        assert 1 <= len(names) <= 5
        for name in names:
            assert values[name] == pytest.approx(reference[step][name], rel=1e-4)
    assert names_logged(records, "participation_ratio") == set(ZOO_MATRICES)


def test_ranks_are_between_one_and_the_smaller_side() -> None:
    records, recorder, _ = fit(MuonZoo(), watch(EffectiveRankMonitor, spectrum_every_n_steps=1))
    sizes = {name: min(matrix.shape) for name, matrix in matrices(recorder.weights[0], ZOO_MATRICES).items()}
    for rank in ("stable_rank", "participation_ratio", "effective_rank"):
        for key in (rank, f"update_{rank}"):
            for values in records.at(key).values():
                assert all(1 - 1e-5 <= values[name] <= size * (1 + 1e-5) for name, size in sizes.items()), key


def test_a_zero_matrix_has_zero_norm_and_rank() -> None:
    """As the second factor of a LoRA adapter before its first step, here with a learning rate of 0."""
    module = Pair(partial(SGD, lr=0.0))
    nn.init.zeros_(module.wide.weight)
    monitors = watch(SpectralNormMonitor), watch(EffectiveRankMonitor, spectrum_every_n_steps=1)
    records, _, _ = fit(module, *monitors)
    for key in ("spectral_norm", "stable_rank", "participation_ratio", "effective_rank"):
        assert {values["wide.weight"] for values in records.at(key).values()} == {0.0}
        assert all(values["tall.weight"] > 0 for values in records.at(key).values())
