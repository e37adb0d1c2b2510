"""What every rule keeps, whatever it computes: checkpoints, gradients that are zero, missing or broken, dtypes, rates,
layouts, observers, options, memory.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muon import HybridOptimizer, ParameterRule
from lightning_muon.optim.matrix import MatrixOptimizer, shape_scale
from lightning_muon.partition import MatrixLayout
from tests.live_memory import LiveMemory
from tests.optim.observed import by_name
from tests.optim.rule_cases import rule_class
from tests.optim.subjects import VECTOR_SHAPES, Bag, assert_same_bits, set_grads, snapshot

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Rule:
    """A rule and what sets it apart from the others.

    Args:
        name: of the class.
        bad: options out of range, each an error at the door.
        options: that the tests run it with.
        zero_gradient: what is left of a weight at a step whose gradient and momentum are zero, from (weight, lr).
        decides: whether it decides about the weights themselves, so that they are not "decay, then subtract".
        orthogonalizes: whether it takes ``orthogonalize_dtype``.
        memory: temporary memory of a step, in stacks and a bit for what there is one of a row or column. Above 3
            where factors are kept beside the matrix.
        costliest: options with which every step is as costly as the costliest.
        asynchronous: options with which a step does not wait for the device; None if it always does.
        rounding: of the way that a run with bfloat16 state may be off.
    """

    name: str
    bad: tuple[dict[str, Any], ...]
    options: dict[str, Any] = field(default_factory=dict)
    zero_gradient: Callable[[Tensor, float], Tensor] = lambda weight, lr: weight * (1 - lr * WEIGHT_DECAY)
    decides: bool = False
    orthogonalizes: bool = True
    memory: float = 3.2
    costliest: dict[str, Any] = field(default_factory=dict)
    asynchronous: dict[str, Any] | None = field(default_factory=dict)
    rounding: float = 0.01

    def make(self, params: Any, **options: Any) -> MatrixOptimizer:
        chosen: dict[str, Any] = {"lr": 0.02, "weight_decay": WEIGHT_DECAY, **self.options}
        if self.orthogonalizes:
            chosen["orthogonalize_dtype"] = "float32"
        return rule_class(self.name)(params, **{**chosen, **options})

    def hybrid(self, bag: Bag, **options: Any) -> HybridOptimizer:
        return HybridOptimizer(
            {"other": AdamW(bag.named("v"), lr=0.02), "matrix": self.make(bag.named("w"), **options)}
        )


def _unchanged(weight: Tensor, lr: float) -> Tensor:
    return weight


def _on_the_sphere(weight: Tensor, lr: float) -> Tensor:
    m, n = weight.shape
    return weight * (shape_scale("spectral", m, n) / torch.linalg.matrix_norm(weight.double(), 2)).float()


RULES = (
    Rule("NorMuon", ({"beta2": 1.0}, {"norm": "max"}, {"axis": "column"}, {"eps": -1.0}, {"method": "qr"})),
    Rule("AdaMuon", ({"beta2": -0.1}, {"sign": 2}, {"eps": -1.0}, {"momentum": 1.0}, {"nesterov": "yes"})),
    Rule("MuonNSR", ({"gamma": -1.0}, {"momentum": 1.0}, {"eps": -1.0}, {"steps": 0})),
    Rule("MuonVS", ({"momentum": -0.1}, {"eps": "small"}, {"method": "qr"})),
    Rule(
        "REG",
        ({"p": 0.0}, {"exponent": -1.0}, {"order": "both"}, {"sweeps": 0}, {"rms": -0.2}),
        orthogonalizes=False,
    ),
    # Its whitening brings up small singular values more than any other method, and with them their rounding errors.
    Rule("SWAN", ({"steps": 0}, {"beta": -0.5}, {"rms": -0.2}), orthogonalizes=False, rounding=0.03),
    Rule("SinkGD", ({"sweeps": 0}, {"rms": "0.2"}), orthogonalizes=False),
    Rule("NAMO", ({"beta2": 1.0}, {"eps": -1.0}, {"momentum": 1.0}), zero_gradient=_unchanged),
    Rule("NAMOD", ({"clamp": 0.0}, {"clamp": 1.5}, {"beta2": 1.0}), zero_gradient=_unchanged),
    Rule(
        "PolarGrad",
        ({"order": "polar_last"}, {"momentum": 1.0}, {"method": "qr"}),
        asynchronous={"method": "jordan"},
    ),
    Rule(
        "SpectralSphere",
        (
            {"radius": 0.0},
            {"tolerance": -1.0},
            {"power_iterations": 0},
            {"search_steps": 0},
            {"lambda_search": "yes"},
        ),
        zero_gradient=_on_the_sphere,
        decides=True,
        memory=6.1,
        asynchronous={"lambda_search": False},
    ),
    Rule(
        "SpecMuon",
        ({"modes": 0}, {"relaxation": -0.5}, {"relaxation": 1.5}, {"eps": -1.0}),
        orthogonalizes=False,
        memory=5.1,
        asynchronous=None,
    ),
    Rule(
        "Conda",
        ({"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"update_every": 0}, {"scale": -1.0}, {"eps": -1.0}),
        orthogonalizes=False,
        memory=4.1,
        costliest={"update_every": 1},
        asynchronous=None,
        rounding=0.02,  # singular vectors turn by the rounding over the distance of the singular values
    ),
    Rule(
        "Muown",
        ({"magnitude_betas": (1.0, 0.9)}, {"magnitude_betas": 0.9}, {"eps": -1.0}, {"momentum": 1.0}),
        decides=True,
    ),
    Rule("MuonHyperball", ({"radius": -1.0}, {"radius": 0.0}), zero_gradient=_unchanged, decides=True),
    Rule("Dion2", ({"fraction": 0.0}, {"fraction": 1.5}, {"momentum": 1.0}), options={"fraction": 0.5}),
)

over_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
over_plain_rules = pytest.mark.parametrize(
    "rule", [rule for rule in RULES if not rule.decides], ids=lambda rule: rule.name
)
alone_and_in_a_hybrid = pytest.mark.parametrize("hybrid", [False, True], ids=["alone", "hybrid"])


def loss_of(seed: int) -> Tensor:
    """What the closure of a step returns: every rule is given one, SpecMuon needs it."""
    return torch.tensor(1.0 + 1.0 / (1 + seed))


def advance(bag: nn.Module, optimizer: Optimizer, seeds: Sequence[int] | range) -> None:
    for seed in seeds:
        set_grads(bag, seed)
        optimizer.step(lambda seed=seed: loss_of(seed))


def pair(rule: Rule, hybrid: bool = False, **options: Any) -> tuple[Bag, Optimizer]:
    bag = Bag(vectors=VECTOR_SHAPES if hybrid else ())
    return bag, rule.hybrid(bag, **options) if hybrid else rule.make(bag.named("w"), **options)


def random(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(
    rule: Rule,
    weights: Sequence[Tensor],
    series: Sequence[Sequence[Tensor | None]],
    layouts: Sequence[MatrixLayout] | None = None,
    **options: Any,
) -> tuple[list[nn.Parameter], MatrixOptimizer]:
    """Steps with given gradients."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": params} if layouts is None else {"params": params, "layouts": list(layouts)}
    optimizer = rule.make([group], **options)
    for seed, grads in enumerate(series):
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype).clone()
        optimizer.step(lambda seed=seed: loss_of(seed))
    return params, optimizer


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Relative to the largest entry."""
    assert torch.isfinite(found).all()
    scale = max(float(wanted.detach().abs().max()), 1.0)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=0, atol=tolerance * scale)


def state_of(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in optimizer.state[param].items()}


def assert_state_is(optimizer: Optimizer, param: Tensor, wanted: dict[str, Tensor]) -> None:
    assert optimizer.state[param].keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(optimizer.state[param][key], value), key


# ---- checkpoints and copies


@over_rules
@alone_and_in_a_hybrid
def test_resume_through_a_file_is_exact(rule: Rule, hybrid: bool, tmp_path: Path) -> None:
    """Also where the matrices of a stack have not taken the same number of steps."""
    bag, optimizer = pair(rule, hybrid)
    advance(bag, optimizer, range(4))
    set_grads(bag, 4)
    bag.w3.grad = None
    optimizer.step(lambda: loss_of(4))
    torch.save({"model": bag.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin, other = pair(rule, hybrid)
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(1.5)
    twin.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    advance(bag, optimizer, range(10, 14))
    advance(twin, other, range(10, 14))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_rules
def test_resume_with_groups_and_parameters_in_another_order(rule: Rule) -> None:
    """A hybrid loads by name."""

    def build(bag: Bag, reverse: bool) -> HybridOptimizer:
        w0, w1, w2, w3 = bag.named("w")
        groups = [
            {"params": [w0, w2, w3], "name": "matrix/a", "lr": 0.03},
            {"params": [w1], "name": "matrix/b", "weight_decay": 0.5},
        ]
        if reverse:
            groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
        children = {"other": AdamW(bag.named("v"), lr=0.02), "matrix": rule.make(groups)}
        return HybridOptimizer(dict(reversed(children.items())) if reverse else children)

    bag, twin = Bag(vectors=VECTOR_SHAPES), Bag(vectors=VECTOR_SHAPES)
    optimizer, other = build(bag, False), build(twin, True)
    advance(bag, optimizer, range(4))
    twin.load_state_dict(bag.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(bag, optimizer, range(10, 13))
    advance(twin, other, range(10, 13))
    for param, wanted in zip(twin.parameters(), bag.parameters(), strict=True):
        close(param, wanted)


@over_rules
@pytest.mark.parametrize(
    ("hybrid", "clone"),
    [(False, copy.deepcopy), (True, lambda x: pickle.loads(pickle.dumps(x)))],
    ids=["deepcopy-alone", "pickle-hybrid"],
)
def test_copies_go_on_alike_and_share_nothing(rule: Rule, hybrid: bool, clone: Callable[[Any], Any]) -> None:
    bag, optimizer = pair(rule, hybrid)
    advance(bag, optimizer, range(3))
    before = snapshot(bag, optimizer)
    twin, other = clone((bag, optimizer))
    advance(twin, other, range(5, 8))
    assert_same_bits(before, snapshot(bag, optimizer))
    advance(bag, optimizer, range(5, 8))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_rules
def test_two_runs_give_the_same_bits(rule: Rule) -> None:
    first, second = pair(rule), pair(rule)
    advance(*first, range(4))
    torch.randn(7)  # no rule draws random numbers
    advance(*second, range(4))
    assert_same_bits(snapshot(*first), snapshot(*second))


# ---- gradients: what they do, and what they must not


@over_rules
def test_first_step_goes_downhill(rule: Rule) -> None:
    """Where the rule leaves the weights without a gradient is where the step starts from."""
    for shape in ((6, 4), (4, 6), (5, 5)):
        (weight,), (grad,) = random([shape], 0), random([shape], 1)
        (moved,), _ = run(rule, [weight], [[grad]], weight_decay=0.0, lr=0.001)
        (still,), _ = run(rule, [weight], [[torch.zeros_like(grad)]], weight_decay=0.0, lr=0.001)
        assert float(((moved - still).detach() * grad).sum()) < 0


@over_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_not_modified(rule: Rule, dtype: torch.dtype) -> None:
    bag = Bag(dtype=dtype)
    for options in ({}, {"state_dtype": None}):
        optimizer = rule.make(bag.named("w"), **options)
        for seed in range(3):
            set_grads(bag, seed)
            before = [(param.grad, param.grad.clone()) for param in bag.parameters()]
            optimizer.step(lambda: loss_of(0))
            for param, (grad, value) in zip(bag.parameters(), before, strict=True):
                assert param.grad is grad
                assert torch.equal(grad, value)


@over_rules
def test_zero_gradient_and_zero_state(rule: Rule) -> None:
    """Only the decay acts, or the rule's own hold on the norm."""
    shapes = [(6, 4), (4, 6), (5, 5)]
    weights = random(shapes, 0)
    params, _ = run(rule, weights, [[torch.zeros(shape) for shape in shapes]] * 2, lr=0.5)
    for param, weight in zip(params, weights, strict=True):
        close(param, rule.zero_gradient(rule.zero_gradient(weight, 0.5), 0.5))


@over_rules
def test_zero_gradient_in_a_stack_leaves_the_others_alone(rule: Rule) -> None:
    weights, series = random([(6, 4)] * 3, 0), [random([(6, 4)] * 3, seed) for seed in range(1, 4)]
    zeroed = [[one, torch.zeros_like(two), three] for one, two, three in series]
    params, _ = run(rule, weights, zeroed)
    wanted, _ = run(rule, weights, series)
    close(params[0], wanted[0])
    close(params[2], wanted[2])
    assert torch.isfinite(params[1]).all()


@over_rules
def test_gradients_that_stay_zero_after_a_history(rule: Rule) -> None:
    weights, series = random([(6, 4), (4, 6)], 0), [random([(6, 4), (4, 6)], seed) for seed in range(1, 4)]
    zeros = [[torch.zeros(6, 4), torch.zeros(4, 6)]] * 40
    params, optimizer = run(rule, weights, [*series, *zeros])
    for param in params:
        assert torch.isfinite(param).all()
        assert all(torch.isfinite(value).all() for value in optimizer.state[param].values())


@over_rules
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_of_any_size(rule: Rule, size: float) -> None:
    weights, series = random([(6, 4), (4, 6)], 0), [random([(6, 4), (4, 6)], seed) for seed in range(1, 4)]
    lr = 0.02 / size if rule.name == "PolarGrad" else 0.02  # its step is as large as the gradient
    params, _ = run(rule, weights, [[grad * size for grad in grads] for grads in series], lr=lr, weight_decay=0.0)
    for param in params:
        assert torch.isfinite(param).all()


@over_rules
def test_missing_gradient(rule: Rule) -> None:
    """The parameter and its state stay as they are, and the others of its stack go where they would have gone."""
    shapes = [(6, 4)] * 3
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)]
    wanted, _ = run(rule, weights, series)
    params, optimizer = run(rule, weights, series[:2])
    for grads in series[2:]:
        before, state = params[1].detach().clone(), state_of(optimizer, params[1])
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        params[1].grad = None
        seed = 2 if grads is series[2] else 3
        optimizer.step(lambda seed=seed: loss_of(seed))
        assert torch.equal(params[1], before)
        assert_state_is(optimizer, params[1], state)
    close(params[0], wanted[0])
    close(params[2], wanted[2])


@over_rules
@alone_and_in_a_hybrid
def test_no_gradients_at_all(rule: Rule, hybrid: bool) -> None:
    bag, optimizer = pair(rule, hybrid)
    optimizer.step(lambda: loss_of(0))
    advance(bag, optimizer, range(2))
    before = snapshot(bag, optimizer)
    optimizer.zero_grad()
    optimizer.step(lambda: loss_of(0))
    assert_same_bits(before, snapshot(bag, optimizer))


@over_rules
@pytest.mark.parametrize(
    ("policy", "broken"), [("propagate", float("inf")), ("skip", float("nan")), ("raise", float("inf"))]
)
def test_nonfinite_gradient_in_a_stack(rule: Rule, policy: str, broken: float) -> None:
    shapes = [(6, 4)] * 3
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)]
    wanted, _ = run(rule, weights, series)
    params, optimizer = run(rule, weights, series[:2], nonfinite=policy)
    for param, grad in zip(params, series[2], strict=True):
        param.grad = grad.clone()
    params[1].grad[2, 1] = broken
    before = [param.detach().clone() for param in params]
    states = [state_of(optimizer, param) for param in params]
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"group\[1\]"):
            optimizer.step(lambda: loss_of(2))
        for param, value, state in zip(params, before, states, strict=True):
            assert torch.equal(param, value)
            assert_state_is(optimizer, param, state)
        return
    optimizer.step(lambda: loss_of(2))
    if policy == "skip":
        assert torch.equal(params[1], before[1])
        assert_state_is(optimizer, params[1], states[1])
    else:
        assert not torch.isfinite(params[1]).all(), "a broken gradient must be seen, not swallowed"
    for param, grad in zip(params, series[3], strict=True):
        param.grad = grad.clone()
    optimizer.step(lambda: loss_of(3))
    close(params[0], wanted[0])
    close(params[2], wanted[2])


# ---- dtypes


@over_rules
def test_bfloat16_parameters(rule: Rule) -> None:
    """They keep their dtype, their state is float32, and they go the way of float32 parameters."""
    shapes = [(6, 4), (4, 6), (8, 8)]
    weights = [weight.bfloat16() for weight in random(shapes, 0)]
    series = [[grad.bfloat16() for grad in random(shapes, seed)] for seed in range(1, 6)]
    params, optimizer = run(rule, weights, series, lr=0.2)
    exact, _ = run(rule, [weight.float() for weight in weights], series, lr=0.2)
    for param, wanted, weight in zip(params, exact, weights, strict=True):
        assert param.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in optimizer.state[param].values())
        moved = (wanted.detach() - weight.float()).norm()
        assert float((param.detach().float() - wanted.detach()).norm() / moved) < 0.05


@over_rules
def test_bfloat16_state(rule: Rule) -> None:
    """Elementwise state is bfloat16 as asked, what there is one of a row or matrix is not; steps are counted beyond
    256.
    """
    shapes = [(6, 4), (4, 6)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)]
    params, optimizer = run(rule, weights, series, state_dtype="bfloat16")
    for param in params:
        state = optimizer.state[param]
        for key, value in state.items():
            assert value.dtype == (torch.bfloat16 if value.shape == param.shape else torch.float32), key
        if "step" in state:
            state["step"].fill_(300.0)
    for _ in range(5):
        optimizer.step(lambda: loss_of(0))
    for param in params:
        assert torch.isfinite(param).all()
        if "step" in optimizer.state[param]:
            assert float(optimizer.state[param]["step"]) == 305.0


@over_rules
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_state_in_half_precision_goes_the_same_way(rule: Rule, dtype: str) -> None:
    """Of float32 weights, with small steps. Errors are relative to the way from where decay alone, and what the rule
    does besides, would have led. No gradient of these seeds is nearly singular, which would enlarge its rounding.
    """
    shapes = [(6, 4), (4, 6), (8, 8)]
    weights = random(shapes, 900)
    series = [[0.1 * grad for grad in random(shapes, 900 + seed)] for seed in range(1, 6)]
    zeros = [[torch.zeros(shape) for shape in shapes]] * len(series)
    still, _ = run(rule, weights, zeros, lr=1e-3)
    exact, _ = run(rule, weights, series, lr=1e-3)
    params, _ = run(rule, weights, series, lr=1e-3, state_dtype=dtype)
    tolerance = rule.rounding if dtype == "bfloat16" else rule.rounding / 4  # three more bits
    for param, wanted, start in zip(params, exact, still, strict=True):
        error = float((param - wanted).detach().norm() / (wanted - start).detach().norm())
        assert error < tolerance, f"{error:.1e} of the way"


@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, marks=[pytest.mark.slow] if rule.name == "SpectralSphere" else []) for rule in RULES],
    ids=lambda rule: rule.name,
)
def test_bfloat16_state_for_100_steps(rule: Rule) -> None:
    """Long enough for averages that bfloat16 would no longer move."""
    shapes = [(3, 4)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)] * 25
    options = {"lr": 1e-3}
    (param,), optimizer = run(rule, weights, series, state_dtype="bfloat16", **options)
    (wanted,), _ = run(rule, weights, series, **options)
    if "step" in optimizer.state[param]:
        assert float(optimizer.state[param]["step"]) == 100.0
    moved = (wanted.detach() - weights[0]).norm()
    assert float((param.detach() - wanted.detach()).norm() / moved) < 0.2


# ---- learning rate and weight decay


@over_rules
@pytest.mark.parametrize(
    ("dtype", "lr", "cautious"),
    [(torch.float32, 0.0, False), (torch.bfloat16, torch.tensor(0.0), True)],
    ids=["float32-number-plain", "bfloat16-tensor-cautious"],
)
def test_learning_rate_0_leaves_every_bit(rule: Rule, dtype: torch.dtype, lr: float | Tensor, cautious: bool) -> None:
    shapes = [(6, 4), (4, 6), (5, 5)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 4)]
    weights = [weight.to(dtype) for weight in weights]
    params, _ = run(rule, weights, series, lr=lr, cautious=cautious)
    for param, weight in zip(params, weights, strict=True):
        assert torch.equal(param, weight)


@over_rules
def test_learning_rate_as_a_tensor(rule: Rule) -> None:
    shapes = [(6, 4), (4, 6)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 4)]
    wanted, _ = run(rule, weights, series)
    params, _ = run(rule, weights, series, lr=torch.tensor(0.02))
    for param, other in zip(params, wanted, strict=True):
        close(param, other)


@over_plain_rules
@pytest.mark.parametrize("cautious", [False, True])
def test_observers_see_what_moved(rule: Rule, cautious: bool) -> None:
    """old - new - decay is the learning rate times what the observer got; a cautious decay spares the entries that
    the update makes larger.
    """
    lr, decay = 0.02, 3.0
    bag = Bag()
    optimizer = rule.make(bag.named("w"), lr=lr, weight_decay=decay, cautious=cautious)
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    for seed in range(3):
        before = bag.values()
        advance(bag, optimizer, [seed])
        assert seen.keys() == {"w0", "w1", "w2", "w3"}
        for old, (name, param) in zip(before, bag.named_parameters(), strict=True):
            factor: Tensor | float = 1.0
            if rule.name in ("NAMO", "NAMOD"):
                factor = optimizer.state[param]["adaptation"].clamp(max=1 / lr)
            amount = lr * decay * factor * torch.ones_like(old)
            if cautious:
                spared = old * seen[name] < 0
                assert spared.any()
                assert not spared.all()
                amount = amount.masked_fill(spared, 0.0)
            close(param, old * (1 - amount) - lr * seen[name])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.decides], ids=lambda rule: rule.name)
def test_observers_see_what_moved_beside_a_rescaling(rule: Rule) -> None:
    """Each row, where the step did not take it, is a positive multiple of what it was."""
    lr = 0.02
    bag = Bag()
    optimizer = rule.make(bag.named("w"), lr=lr)
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    for seed in range(3):
        before = bag.values()
        advance(bag, optimizer, [seed])
        for old, (name, param) in zip(before, bag.named_parameters(), strict=True):
            base = param.detach() + lr * seen[name]
            factor = (base * old).sum(dim=1, keepdim=True) / old.square().sum(dim=1, keepdim=True)
            assert (factor > 0.1).all()
            close(base, factor * old, 5e-6)
            assert float(seen[name].norm()) > 0


# ---- how matrices are grouped and read


@over_rules
def test_stacked_or_alone(rule: Rule) -> None:
    shapes = [(6, 4)] * 3 + [(4, 6)] * 2
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)]
    together, _ = run(rule, weights, series)
    for index, param in enumerate(together):
        (alone,), _ = run(rule, weights[index : index + 1], [grads[index : index + 1] for grads in series])
        close(param, alone)


@over_rules
@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 4, 2)], ids=str)
def test_split_parameter_is_separate_parameters(rule: Rule, sizes: tuple[int, ...]) -> None:
    weights, series = random([(12, 5)], 0), [random([(12, 5)], seed) for seed in range(1, 5)]
    (fused,), optimizer = run(rule, weights, series, [MatrixLayout(split=sizes)])
    parts, separate = run(rule, weights[0].split(sizes), [grads[0].split(sizes) for grads in series])
    close(fused, torch.cat(list(parts)))
    keys = {key.split(".")[0] for key in optimizer.state[fused]}
    assert keys == separate.state[parts[0]].keys()


@over_rules
def test_experts_are_separate_parameters(rule: Rule) -> None:
    weights, series = random([(3, 4, 5)], 0), [random([(3, 4, 5)], seed) for seed in range(1, 5)]
    (stacked,), _ = run(rule, weights, series, [MatrixLayout(batch_dims=1)])
    parts, _ = run(rule, weights[0].unbind(), [grads[0].unbind() for grads in series])
    close(stacked, torch.stack(list(parts)))


@over_rules
def test_transposed_and_convolution_layouts(rule: Rule) -> None:
    weights, series = random([(6, 4), (6, 2, 2, 2)], 0), [random([(6, 4), (6, 2, 2, 2)], s) for s in range(1, 5)]
    layouts = [MatrixLayout(transposed=True), MatrixLayout()]
    params, _ = run(rule, weights, series, layouts)
    flat, _ = run(
        rule,
        [weights[0].T.contiguous(), weights[1].flatten(1)],
        [[grads[0].T.contiguous(), grads[1].flatten(1)] for grads in series],
    )
    close(params[0], flat[0].T)
    close(params[1], flat[1].view(6, 2, 2, 2))


@over_rules
def test_vectors_written_as_matrices(rule: Rule) -> None:
    shapes = [(1, 7), (7, 1), (1, 1), (2, 1), (1, 2)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 4)]
    params, optimizer = run(rule, weights, [*series, [torch.zeros(shape) for shape in shapes]])
    for param in params:
        assert torch.isfinite(param).all()
        assert all(torch.isfinite(value).all() for value in optimizer.state[param].values())


@over_rules
def test_empty_parameters(rule: Rule) -> None:
    weights, series = random([(4, 5)], 0), [random([(4, 5)], seed) for seed in range(1, 3)]
    empty = [torch.zeros(0, 5), torch.zeros(5, 0)]
    params, _ = run(rule, [*empty, *weights], [[*empty, *grads] for grads in series])
    wanted, _ = run(rule, weights, series)
    close(params[2], wanted[0])


# ---- options


@pytest.mark.parametrize(
    ("rule", "option"),
    [pytest.param(rule, option, id=f"{rule.name}-{option}") for rule in RULES for option in rule.bad],
)
def test_options_out_of_range(rule: Rule, option: dict[str, Any]) -> None:
    """As an argument, in a group, in a group added later, and by a rule of the partition: the message names them."""
    (name,) = option
    param, later = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5))
    with pytest.raises(ValueError, match=name):
        rule.make([param], **option)
    with pytest.raises(ValueError, match=name):
        rule.make([{"params": [param], **option}])
    optimizer = rule.make([param])
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [later], **option})
    assert len(optimizer.param_groups) == 1
    factory = partial(rule_class(rule.name), **rule.options)
    module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=name):
        HybridOptimizer.from_module(module, matrix=factory, rules=[ParameterRule(pattern="2.weight", options=option)])


OVERRIDES: dict[str, dict[str, Any]] = {
    "NorMuon": {"norm": "preserve"},
    "AdaMuon": {"sign": False},
    "MuonNSR": {"gamma": 0.0},
    "MuonVS": {"momentum": 0.5},
    "REG": {"order": "simultaneous"},
    "SWAN": {"rms": 0.1},
    "SinkGD": {"sweeps": 1},
    "NAMO": {"beta2": 0.5},
    "NAMOD": {"clamp": 1.0},
    "PolarGrad": {"order": "polar_first"},
    "SpectralSphere": {"radius": 2.0},
    "SpecMuon": {"modes": 2},
    "Conda": {"betas": [0.5, 0.9]},  # a list, as YAML has it
    "Muown": {"magnitude_betas": [0.5, 0.9]},
    "MuonHyperball": {"radius": 2.0},
    "Dion2": {"fraction": 1.0},
}


@over_rules
def test_options_of_a_group(rule: Rule, tmp_path: Path) -> None:
    """An option of a group acts on that group alone, as it would as an argument, and survives a checkpoint."""
    shapes = [(6, 4), (6, 4)]
    weights, series = random(shapes, 0), [random(shapes, seed) for seed in range(1, 5)]
    override = OVERRIDES[rule.name]
    plain, _ = run(rule, weights, series)
    changed, _ = run(rule, weights, series, **override)
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = rule.make([{"params": params[:1]}, {"params": params[1:], **override}])
    for seed, grads in enumerate(series):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step(lambda seed=seed: loss_of(seed))
        if seed == 1:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            optimizer = rule.make([{"params": params[:1]}, {"params": params[1:]}])
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    close(params[0], plain[0])
    close(params[1], changed[1])
    assert float((plain[1] - changed[1]).detach().abs().max()) > 1e-4


# ---- memory and waiting


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.asynchronous is not None], ids=lambda rule: rule.name)
@pytest.mark.parametrize("options", [{}, {"cautious": True, "lr": torch.tensor(0.1)}], ids=["plain", "cautious-lr"])
def test_a_step_does_not_wait_for_the_device(rule: Rule, options: dict[str, Any]) -> None:
    """On the meta device, whose tensors have no values, whatever asks for one raises."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(6, 4), (6, 4), (4, 6)]]
    optimizer = rule.make(params, **{**(rule.asynchronous or {}), **options})
    for step in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        if step == 2:
            params[0].grad = None
        optimizer.step(lambda: 1.0)


def temporary_memory(rule: Rule, shape: tuple[int, int], dtype: str) -> float:
    """Of the second step, in stacks of float32."""
    bag = Bag(matrices=[shape] * 4)
    options = {**rule.costliest, **({"orthogonalize_dtype": dtype} if rule.orthogonalizes else {})}
    optimizer = rule.make(bag.named("w"), **options)
    advance(bag, optimizer, [0])
    set_grads(bag, 1)
    with LiveMemory() as live:
        optimizer.step(lambda: loss_of(1))
    return live.peak / (4 * 4 * shape[0] * shape[1])


@over_rules
@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 64), "float32"), ((32, 128), "bfloat16"), ((128, 32), "float32")], ids=str
)
def test_temporary_memory_of_a_step(rule: Rule, shape: tuple[int, int], dtype: str) -> None:
    used = temporary_memory(rule, shape, dtype)
    print(f"{rule.name} {shape} {dtype}: {used:.2f} stacks")
    assert used > 0.9, "the gradients alone are one stack"
    assert used <= rule.memory, f"{used:.2f} stacks"
