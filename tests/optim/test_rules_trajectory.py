"""Every rule follows its float64 reference, which is written from the equations alone (references/)."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn

from lightning_muon import optim
from tests.optim.references import REFERENCES
from tests.optim.references.common import Case
from tests.optim.rule_cases import (
    RULES,
    WEIGHT_SIZE,
    all_cases,
    gradients,
    normal,
    package_state,
    rule_class,
    run_package,
    run_reference,
    state_keys,
)
from tests.optim.rule_walk import walk

# Cautious decay is the base's: one case of each rule tells whether the rule feeds it the right update.
CASES = [case for case in all_cases() if not case.values[2] or case.values[1] == 0]
over_cases = pytest.mark.parametrize(("rule", "number", "cautious"), CASES)
over_rules = pytest.mark.parametrize("rule", REFERENCES)
expected_run = functools.cache(run_reference)
our_run = functools.cache(run_package)


@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_follows_the_reference(rule: str, number: int, cautious: bool, dtype: torch.dtype) -> None:
    """Errors are measured by the distance moved, 0.02 to 0.1 an entry here: stricter than by the weights' size.

    In float32 they also hold what rounding the weights 10 times costs; in float64 only the algorithm is left.
    """
    expected = expected_run(rule, number, cautious)
    ours = our_run(rule, number, cautious, dtype)
    case = REFERENCES[rule].cases[number]
    for name, wanted in expected.end.items():
        moved = (wanted - expected.start[name]).norm()
        error = float((ours.end[name] - wanted).norm() / moved)
        tolerance = case.float64 if dtype == torch.float64 else case.low_rank if name == "low_rank" else case.float32
        assert moved > 0
        assert error <= tolerance, f"{name}: {error:.2e} of the distance moved"


@over_cases
def test_state_is_the_references(rule: str, number: int, cautious: bool) -> None:
    """Names, shapes and values, in float64: what a checkpoint holds is what the equations say."""
    expected = expected_run(rule, number, cautious)
    ours = our_run(rule, number, cautious, torch.float64)
    tolerance = REFERENCES[rule].cases[number].float64
    for name, matrices in expected.state.items():
        for matrix, state in enumerate(matrices):
            assert state_keys(ours.state[name]) == state_keys(state), name
            for key in state_keys(state):
                wanted = state[key]
                found = package_state(ours, name, key, matrix, wanted.shape).double()
                assert found.shape == wanted.shape, (name, key)
                if key not in REFERENCES[rule].uncompared:
                    error = float((found - wanted).norm())
                    assert error <= tolerance * max(float(wanted.norm()), 1e-12), (name, key, error)


@pytest.mark.parametrize("shape", [(8, 6), (4, 9)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    ("dtype", "eps", "tolerance"),
    [(torch.float64, 1e-8, 1e-7), (torch.float32, 0.1, 1e-5)],
    ids=["float64", "float32"],
)
def test_conda_with_gradients_of_rank_two(
    shape: tuple[int, int], dtype: torch.dtype, eps: float, tolerance: float
) -> None:
    """Whose null space, on the side of the basis, stays the same: nothing moves there, whatever basis it has.

    Nothing but rounding errors over eps, which is why eps is larger in float32.
    """
    start = WEIGHT_SIZE * normal(*shape, seed=1)[0]
    wide = shape[0] < shape[1]
    (span,) = normal(2, min(shape), seed=2)
    grads = [part @ span for part in normal(max(shape), 2, 6, seed=3)]
    grads = [(grad.T if wide else grad).to(dtype) for grad in grads]
    options = {"weight_decay": 0.1, "eps": eps, "scale": 1.0, "update_every": 2}
    run = walk(optim.Conda, start.to(dtype), grads, lr=0.02, **options)
    reference = REFERENCES["Conda"]()
    wanted, state = start.to(dtype).double(), {}
    first = wanted
    for grad in grads:
        every = {**reference.defaults, **options, "cautious": False}
        wanted = reference.step_matrix(wanted, grad.double(), state, 0.02, every)
    moved = (wanted - first).norm()
    assert float((run.weights[-1].double() - wanted).norm() / moved) < tolerance


@over_rules
def test_zero_gradients_from_the_start(rule: str) -> None:
    """No rule makes NaN of 0 / 0: what is left of the step is decay, or what else the equations do to the weights."""
    zeros = [{name: torch.zeros_like(grad) for name, grad in gradients(Case())[1].items() if grad is not None}]
    expected = run_reference(rule, 0, False, zeros)
    ours = run_package(rule, 0, False, torch.float64, zeros)
    for name, wanted in expected.end.items():
        torch.testing.assert_close(ours.end[name], wanted, rtol=1e-12, atol=1e-12)


@over_rules
def test_a_gradient_with_nan_spoils_only_its_own_matrix(rule: str) -> None:
    case = REFERENCES[rule].cases[0]
    clean = gradients(case)[1:3]
    spoiled = [dict(grads) for grads in clean]
    for name, position in (("wide2", (1, 2)), ("experts", (1, 0, 3))):
        grad = spoiled[0][name]
        assert grad is not None
        spoiled[0][name] = grad.clone()
        spoiled[0][name][position] = torch.nan
    wanted = run_package(rule, 0, False, torch.float64, clean)
    ours = run_package(rule, 0, False, torch.float64, spoiled)
    assert ours.end["wide2"].isnan().any()
    assert ours.end["experts"][1].isnan().any()
    for run in (wanted, ours):
        run.end.pop("wide2")
        run.end["experts"] = run.end["experts"][[0, 2]]
    for name, value in wanted.end.items():
        torch.testing.assert_close(ours.end[name], value, rtol=1e-12, atol=1e-12)


def test_every_rule_has_a_reference() -> None:
    assert set(RULES) == set(REFERENCES)


@over_rules
def test_arguments_and_defaults_are_the_references(rule: str) -> None:
    """Signature and reference were written apart: the same arguments, the same defaults."""
    shared = {"params", "lr", "cautious", "orthogonalize_dtype", "state_dtype", "nonfinite"}
    parameters = inspect.signature(rule_class(rule)).parameters
    ours = {key: parameter.default for key, parameter in parameters.items() if key not in shared}
    assert ours == REFERENCES[rule].defaults


@over_rules
def test_names_a_bad_learning_rate(rule: str) -> None:
    with pytest.raises(ValueError, match="-1"):
        rule_class(rule)([nn.Parameter(torch.randn(3, 4))], lr=-1.0)
