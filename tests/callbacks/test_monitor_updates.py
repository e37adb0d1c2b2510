"""The values that the monitors log of updates: of Muon and its relatives, alone and in hybrids."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from torch.optim import SGD, AdamW, Optimizer

from lightning_muon import (
    REG,
    AdaMuon,
    Muon,
    MuonHyperball,
    MuonMixin,
    NorMuon,
    ParameterRule,
    SinkGD,
    SpectralSphere,
    partition_parameters,
)
from lightning_muon.callbacks import EffectiveRankMonitor, UpdateOrthogonalityMonitor
from lightning_muon.schedules import Cosine
from tests.callbacks.monitor_records import (
    assert_updates,
    assert_values,
    condition_number,
    decay_shows,
    expected,
    fit,
    quantity,
    update_monitors,
    watch,
)
from tests.callbacks.monitor_subjects import (
    PAIR_MATRICES,
    ZOO_MATRICES,
    GaussianLayers,
    MuonPair,
    MuonZoo,
    Pair,
    Zoo,
)

DECAY = 0.5  # so large that it would show among the updates


RULES = {
    "Muon": Muon,
    "Muon without look-ahead": partial(Muon, nesterov=False),
    "NorMuon": NorMuon,
    "AdaMuon": AdaMuon,
    "REG": REG,
    "SinkGD": SinkGD,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_updates_of_matrix_rules_are_what_they_observe_and_what_they_subtract(rule: str, precision: str) -> None:
    module = MuonZoo(matrix_optimizer=partial(RULES[rule], lr=0.05, weight_decay=DECAY))
    records, recorder, _ = fit(module, *update_monitors(), precision=precision)
    assert_updates(records, recorder.observed, ZOO_MATRICES)
    # The same from the weights before and after; float32 rounds their difference.
    assert_updates(records, recorder.updates, ZOO_MATRICES, rtol=1e-4 if precision == "64-true" else 1e-3)


@pytest.mark.parametrize("rule", [MuonHyperball, SpectralSphere], ids=lambda rule: rule.__name__)
def test_updates_of_rules_that_rescale_weights_are_what_they_observe(rule: type[Optimizer]) -> None:
    records, recorder, _ = fit(MuonZoo(matrix_optimizer=partial(rule, lr=0.05)), *update_monitors())
    assert_updates(records, recorder.observed, ZOO_MATRICES)


def test_cautious_decay_is_taken_out() -> None:
    module = MuonZoo(matrix_optimizer=partial(Muon, lr=0.05, weight_decay=DECAY, cautious=True))
    records, recorder, _ = fit(module, *update_monitors())
    assert_updates(records, recorder.observed, ZOO_MATRICES)


def test_updates_of_bfloat16_weights_are_not_differences_of_them() -> None:
    """Differences of rounded weights would show the rounding: a true update of a matrix rule is nearly orthogonal."""
    module = MuonZoo(matrix_optimizer=partial(Muon, lr=0.002))
    records, recorder, _ = fit(module, *update_monitors(), precision="bf16-true")
    assert_updates(records, recorder.observed, ZOO_MATRICES)
    difference = expected("update_orthogonality_error", recorder.updates)[4]
    logged = records.at("update_orthogonality_error")[4]
    assert all(difference[name] > 1.2 * logged[name] for name in ("tall.weight", "wide.weight"))


def test_hybrid_of_adamw_for_the_matrices_too() -> None:
    module = MuonZoo(
        matrix_optimizer=partial(AdamW, lr=0.02, weight_decay=DECAY),
        other_optimizer=partial(AdamW, lr=0.01, weight_decay=0.0),
    )
    records, recorder, _ = fit(module, *update_monitors())
    assert recorder.observed == {}
    assert_updates(records, recorder.updates, ZOO_MATRICES, rtol=1e-3)
    assert decay_shows(recorder)


def test_embedding_beside_muon_is_updated_by_adamw() -> None:
    """One monitor watches parameters of both children: those of Muon are observed, those of AdamW differ."""
    module = MuonZoo(
        matrix_optimizer=partial(Muon, lr=0.02, weight_decay=DECAY),
        other_optimizer=partial(AdamW, lr=0.02, weight_decay=DECAY),
    )
    monitors = update_monitors(include=["embed.weight", "tall.weight", "conv.weight"])
    records, recorder, _ = fit(module, *monitors)
    updates = {
        step: {**recorder.observed[step], "embed.weight": recorder.updates[step]["embed.weight"]}
        for step in recorder.updates
    }
    assert_updates(records, updates, among=["embed.weight", "tall.weight", "conv.weight"], rtol=1e-3)


def test_groups_of_a_hybrid_have_their_own_rate_and_decay() -> None:
    rules = [ParameterRule(pattern="tall.weight", options={"lr": 0.05, "weight_decay": 2.0})]
    module = MuonPair(matrix_optimizer=partial(AdamW, lr=0.01, weight_decay=0.0), parameter_rules=rules)
    records, recorder, _ = fit(module, *update_monitors())
    assert_updates(records, recorder.updates, among=PAIR_MATRICES, rtol=1e-3)


def test_muon_with_a_schedule_that_starts_at_zero() -> None:
    module = MuonZoo(
        matrix_optimizer=partial(Muon, lr=0.05, weight_decay=DECAY),
        schedule=Cosine(warmup=2),
    )
    records, recorder, _ = fit(module, *update_monitors())
    logged = records.at("update_orthogonality_error").keys()
    assert logged >= {1, 2, 3, 4}
    assert_updates(records, {step: recorder.observed[step] for step in logged}, ZOO_MATRICES)


def test_sgd_without_decay_moves_by_the_gradient() -> None:
    records, recorder, _ = fit(Zoo(partial(SGD, lr=0.1)), *update_monitors(), precision="64-true")
    assert_updates(records, recorder.gradients, ZOO_MATRICES)


def test_muon_is_nearly_orthogonal_and_adamw_is_not() -> None:
    """The same real run under both: what the monitor is for."""
    settings = {"max_steps": 10, "max_epochs": -1}
    muon, _, _ = fit(MuonZoo(matrix_optimizer=partial(Muon, lr=0.01)), *update_monitors(), **settings)
    adamw, _, _ = fit(Zoo(partial(AdamW, lr=0.01)), *update_monitors(), **settings)
    errors = {name: records.series("update_orthogonality_error/mean") for name, records in (("m", muon), ("a", adamw))}
    assert len(errors["m"]) == len(errors["a"]) == 10
    assert max(errors["m"].values()) < 0.4
    assert min(errors["a"].values()) > 0.7
    assert all(errors["a"][step] > 2 * errors["m"][step] for step in errors["m"])
    for step, conditions in muon.at("update_condition_number").items():
        assert conditions["mean"] < adamw.at("update_condition_number")[step]["mean"] / 2
    for step, ranks in muon.at("update_effective_rank").items():
        assert ranks["mean"] > adamw.at("update_effective_rank")[step]["mean"]


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5])
def test_quantile_of_the_condition_number(quantile: float) -> None:
    monitor = watch(UpdateOrthogonalityMonitor, spectrum_every_n_steps=1, quantile=quantile)
    records, recorder, _ = fit(MuonPair(), monitor)
    for step, values in records.at("update_condition_number").items():
        for name in PAIR_MATRICES:
            s = np.linalg.svd(recorder.observed[step][name].double().numpy(), compute_uv=False)
            assert values[name] == pytest.approx(condition_number(s, quantile), rel=1e-4)


def test_quantile_is_a_tenth_by_default() -> None:
    records, recorder, _ = fit(MuonPair(), watch(UpdateOrthogonalityMonitor, spectrum_every_n_steps=1))
    key = "update_condition_number"
    assert_values(records.at(key), expected(key, recorder.observed, PAIR_MATRICES), key)


def test_parameters_outside_the_optimizer_have_no_update() -> None:
    """Trainable, but left to no optimizer: its weight is watched, an update it has none."""

    class Half(Pair):
        def configure_optimizers(self) -> Optimizer:
            return AdamW([p for name, p in self.named_parameters() if not name.startswith("wide")], lr=0.02)

    records, recorder, _ = fit(Half(), *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=["tall.weight"])
    assert all(set(PAIR_MATRICES) <= set(values) for values in records.at("participation_ratio").values())


def test_several_param_groups_with_decay_and_without() -> None:
    """The usual recipe: no decay for vectors, and here for one of the matrices."""

    class Grouped(Pair):
        def configure_optimizers(self) -> Optimizer:
            decayed = [self.tall.weight]
            rest = [p for p in self.parameters() if p is not self.tall.weight]
            return AdamW([{"params": decayed, "weight_decay": 2.0}, {"params": rest, "weight_decay": 0.0}], lr=0.02)

    records, recorder, _ = fit(Grouped(), *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)


def test_names_are_those_of_the_partition_whatever_the_optimizer_calls_them() -> None:
    """An optimizer made from named parameters of a submodule knows other names."""

    class Renamed(Pair):
        def configure_optimizers(self) -> Optimizer:
            named = [(f"x{index}", p) for index, p in enumerate(self.parameters())]
            return AdamW(named, lr=0.02, weight_decay=DECAY)

    module = Renamed()
    matrix_names = {entry.name for entry in partition_parameters(module) if entry.group == "matrix"}
    assert matrix_names == set(PAIR_MATRICES)
    records, recorder, _ = fit(module, *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)


@pytest.mark.parametrize("rule", [Muon, NorMuon, REG], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("naming", ["unnamed", "named", "named alike"])
def test_matrix_rules_without_the_mixin_or_a_hybrid(rule: type[Optimizer], naming: str) -> None:
    """A plain LightningModule gives them its matrices; two towers may have the same names in them."""

    class Alone(Pair):
        def configure_optimizers(self) -> Optimizer:
            matrices = {
                "unnamed": [self.tall.weight, self.wide.weight],
                "named": [("tall.weight", self.tall.weight), ("wide.weight", self.wide.weight)],
                "named alike": [
                    {"params": list(layer.named_parameters())[:1], "name": name}
                    for name, layer in (("first", self.tall), ("second", self.wide))
                ],
            }
            return rule(matrices[naming], lr=0.05, weight_decay=DECAY)

    records, recorder, _ = fit(Alone(), *update_monitors(), precision="64-true")
    assert_updates(records, recorder.updates, among=PAIR_MATRICES)


def test_stable_rank_of_larger_updates_within_two_percent() -> None:
    """Updates turn faster than weights: power iteration begins anew at each, and comes within 1 % of the norm."""

    class Layers(MuonMixin, GaussianLayers):
        pass

    module = Layers(matrix_optimizer=partial(Muon, lr=0.01))
    monitor = watch(EffectiveRankMonitor, spectrum_every_n_steps=0)
    records, recorder, _ = fit(module, monitor, max_steps=20, max_epochs=-1)
    for step, logged in records.at("update_stable_rank").items():
        for name, update in recorder.observed[step].items():
            exact = quantity("stable_rank", update.double().numpy())
            assert logged[name] == pytest.approx(exact, rel=0.02), (step, name)
