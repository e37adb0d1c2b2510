"""Optimizers of other packages as children of a hybrid: stepped as if alone, saved, loaded, refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from lightning_muon import HybridOptimizer, Muon, ParameterRule, partition_parameters
from tests.optim.subjects import Bag


class Net(nn.Module):
    """Three hidden matrices, a table, biases and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def loss(self, step: int) -> Tensor:
        items = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        hidden = self.embed(items)
        return nn.functional.cross_entropy(self.head(self.down(self.up(hidden).tanh())), (items * 3 + 1) % 11)


def train(net: Net, optimizer: Any, steps: Iterable[int], create_graph: bool = False) -> None:
    for step in steps:
        torch.manual_seed(step)  # some draw random numbers
        optimizer.zero_grad()
        net.loss(step).backward(create_graph=create_graph)
        optimizer.step()


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def of(package: str, name: str) -> Callable[..., Optimizer]:
    """A class of a package that may be missing, e.g. ``of("pytorch_optimizer", "Lion")``."""
    return getattr(pytest.importorskip(package), name)


def beside_sgd(role: str, factory: Callable[..., Optimizer], net: Net) -> HybridOptimizer:
    """The hybrid of ``factory`` for a role and SGD for the other."""
    return HybridOptimizer.from_module(
        net, **{"matrix": partial(SGD, lr=0.1), "other": partial(SGD, lr=0.1), role: factory}
    )


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """Through a file that holds no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


PACKAGED = [
    ("pytorch_optimizer", name)
    for name in (
        "Lion", "AdaBelief", "EXAdam", "DualAdam", "APOLLO", "SOAP", "AdEMAMix", "Adan", "ADOPT", "Prodigy",
        "AdaFactor", "Lamb", "MARS", "Grams", "DASH", "StableSPAM", "FlashAdamW", "ScheduleFreeAdamW", "MADGRAD",
    )
]  # fmt: skip
PACKAGED += [
    ("schedulefree", "AdamWScheduleFree"),
    ("schedulefree", "SGDScheduleFree"),
    ("bitsandbytes.optim", "Lion8bit"),
]


@pytest.mark.parametrize("role", ["matrix", "other"])
@pytest.mark.parametrize(("package", "name"), PACKAGED, ids=[name for _, name in PACKAGED])
def test_children_step_and_resume_as_if_each_were_alone(package, name, role) -> None:
    """Whatever the hybrid adds to the param groups, two optimizers on the same parameters reach the same weights."""
    factory = of(package, name)
    net, alone, again = Net(), Net(), Net()
    hybrid = beside_sgd(role, factory, net)
    hybrid.train()
    train(net, hybrid, range(3))
    middle, state = values(net), saved(hybrid)
    train(net, hybrid, range(3, 6))

    partition = partition_parameters(alone)
    groups = {
        key: [{"params": group["params"]} for group in partition.param_groups(key)] for key in ("matrix", "other")
    }
    rest = SGD(groups["other" if role == "matrix" else "matrix"], lr=0.1)
    itself = factory(groups[role])
    if hasattr(itself, "train"):
        itself.train()
    for step in range(6):
        torch.manual_seed(step)
        alone.zero_grad()
        alone.loss(step).backward()
        itself.step()
        rest.step()
    assert_same(values(net), values(alone))

    again.load_state_dict(middle)
    resumed = beside_sgd(role, factory, again)
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6))
    assert_same(values(again), values(net))


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "AdaMuon"])
def test_groups_say_which_are_matrices_to_a_muon_that_asks(name) -> None:
    net = Net()
    hybrid = HybridOptimizer.from_module(net, of("pytorch_optimizer", name), of("pytorch_optimizer", name))
    flags = {owner: {group["use_muon"] for group in child.param_groups} for owner, child in hybrid.optimizers.items()}
    assert flags == {"matrix": {True}, "other": {False}}
    before = values(net)
    train(net, hybrid, range(2))
    assert all(not torch.equal(value, before[name]) for name, value in values(net).items())
    again = HybridOptimizer.from_module(Net(), of("pytorch_optimizer", name), of("pytorch_optimizer", name))
    again.load_state_dict(saved(hybrid))


class Plain(SGD):
    """An optimizer to derive peculiar ones from."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)


class OwnMomentum(Optimizer):
    """Has ``momentum`` and ``betas``, which are two things."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.25, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None: ...


def test_momentum_beside_betas_is_left_alone() -> None:
    net = Net()
    hybrid = beside_sgd("matrix", OwnMomentum, net)
    train(net, hybrid, range(2))
    (group,) = hybrid.optimizers["matrix"].param_groups
    assert (group["momentum"], group["betas"]) == (0.25, (0.9, 0.99))
    group["momentum"] = 0.5
    train(net, hybrid, range(1))
    assert (group["momentum"], group["betas"]) == (0.5, (0.9, 0.99))


class Counts(Plain):
    """Keeps integers and text in its state and a counter outside of it, and knows how to load them."""

    count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] |= {"codes": torch.tensor([250, 3], dtype=torch.uint8), "kind": "ab,bc->ac"}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]
        self.param_groups[0]["loaded"] = True
        ids = (saved_id for group in state_dict["param_groups"] for saved_id in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = dict(state_dict["state"][next(ids)])


@pytest.mark.parametrize("role", ["matrix", "other"])
def test_a_child_saves_and_loads_what_only_it_knows(role) -> None:
    net = Net()
    hybrid = beside_sgd(role, Counts, net)
    train(net, hybrid, range(3))
    again = beside_sgd(role, Counts, Net())
    again.load_state_dict(saved(hybrid))
    child = again.optimizers[role]
    assert child.count == 3
    assert child.param_groups[0]["loaded"]
    own = {id(group) for group in child.param_groups}
    assert own <= {id(group) for group in again.param_groups}
    assert child.state is again.state
    for group in child.param_groups:
        for parameter in group["params"]:
            assert again.state[parameter]["kind"] == "ab,bc->ac"
            assert again.state[parameter]["codes"].tolist() == [250, 3]
            assert again.state[parameter]["codes"].dtype == torch.uint8
    assert "children" not in beside_sgd(role, SGD, Net()).state_dict()


def test_a_checkpoint_of_ordinary_children_has_the_ordinary_keys() -> None:
    hybrid = HybridOptimizer.from_module(Net(), Muon, AdamW)
    assert hybrid.state_dict().keys() == {"state", "param_groups"}


# Modes


def test_train_and_eval_reach_the_children_that_have_them() -> None:
    net = Net()
    hybrid = beside_sgd("other", of("schedulefree", "AdamWScheduleFree"), net)
    hybrid.train()
    train(net, hybrid, range(3))
    trained = values(net)
    hybrid.eval()
    evaluated = values(net)
    matrices = {entry.name for entry in partition_parameters(net) if entry.group == "matrix"}
    changed = {name for name in trained if not torch.equal(trained[name], evaluated[name])}
    assert changed
    assert changed.isdisjoint(matrices)
    hybrid.eval()
    assert_same(values(net), evaluated)
    hybrid.train()
    for name, value in values(net).items():
        torch.testing.assert_close(value, trained[name])


def test_a_hybrid_without_such_children_ignores_the_modes() -> None:
    net = Net()
    hybrid = HybridOptimizer.from_module(net)
    train(net, hybrid, range(1))
    before = values(net)
    hybrid.eval()
    hybrid.train()
    assert_same(values(net), before)


# Second derivatives


class SecondOrder(Plain):
    """Divides by the diagonal of the Hessian, as far as rank one goes: needs ``backward(create_graph=True)``."""

    def step(self, closure: Any = None, hessian: list[Tensor] | None = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        curvature = torch.autograd.grad(gradients, parameters, [torch.ones_like(p) for p in parameters])
        with torch.no_grad():
            for parameter, value in zip(parameters, curvature, strict=True):
                parameter.sub_(0.1 * value)


@pytest.mark.parametrize("role", ["matrix", "other"])
def test_who_differentiates_the_gradients_does_so_before_any_weight_moves(role) -> None:
    net = Net()
    train(net, beside_sgd(role, SecondOrder, net), range(2), create_graph=True)


def test_two_who_differentiate_the_gradients_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"'other' and 'matrix' both differentiate.*SecondOrder, SecondOrder.*pattern='\*'"
    ):
        HybridOptimizer.from_module(Net(), SecondOrder, SecondOrder)
    rules = [ParameterRule(pattern="*", group="other")]
    with pytest.warns(UserWarning, match="no trainable hidden matrix"):
        HybridOptimizer.from_module(Net(), SecondOrder, SecondOrder, rules=rules)


# What is refused


class Wrapper(Plain):
    """Hands its steps on to another optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.inner = AdamW(self.param_groups)


class OneEach(Plain):
    """Has an optimizer for each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.inner = {parameter: AdamW([parameter]) for group in self.param_groups for parameter in group["params"]}


class Several(Plain):
    """Has a list of optimizers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.inner = [AdamW(group["params"]) for group in self.param_groups]


class Evaluates(Plain):
    """Cannot step without a closure."""

    def step(self, closure: Callable[[], float]) -> float:
        return closure()


class TakesModel(Plain):
    """Wants the names of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([parameter for _, parameter in model.named_parameters()])


class ElsewhereOnly(Plain):
    """For hardware that is not here."""

    def __init__(self, params: Any) -> None:
        raise AssertionError("Needs a CUDA device.")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Wrapper, r"'other' is Wrapper, a wrapper of AdamW.*Give AdamW itself"),
        (OneEach, r"'other' is OneEach, a wrapper of AdamW"),
        (Several, r"'other' is Several, a wrapper of AdamW"),
        (Evaluates, r"'other' is Evaluates, whose step must evaluate the model.*goes by the gradients alone"),
        (TakesModel, r"TakesModel cannot be the optimizer of 'other'.*takes the model"),
        (partial(TakesModel), r"TakesModel cannot be the optimizer of 'other'"),
        (ElsewhereOnly, r"ElsewhereOnly cannot be the optimizer of 'other'.*other hardware"),
        (LBFGS, r"LBFGS"),
    ],
)
def test_refusals_name_optimizer_cause_and_mend(factory, message) -> None:
    with pytest.raises(Exception, match=message):
        HybridOptimizer.from_module(Net(), other=factory)


def test_a_muon_that_asks_again_is_not_asked_forever() -> None:
    def asks(groups: Any) -> Optimizer:
        raise ValueError("`use_muon` must be set.")

    with pytest.raises(ValueError, match=r"use_muon"):
        HybridOptimizer.from_module(Net(), matrix=asks)


@pytest.mark.parametrize("child", [Wrapper, OneEach, Several, Evaluates, LBFGS])
def test_ready_made_children_are_refused_too(child) -> None:
    bag = Bag(vectors=())
    with pytest.raises(TypeError, match=child.__name__):
        HybridOptimizer({"other": child(list(bag.parameters()))})


@pytest.mark.parametrize("name", ["AliG", "BSAM"])
def test_closures_that_are_missed_only_in_the_step_are_missed_at_construction(name) -> None:
    factory = of("pytorch_optimizer", name)
    more = {"num_data": 8} if name == "BSAM" else {}
    with pytest.raises(TypeError, match=f"{name}, whose step must evaluate the model"):
        HybridOptimizer.from_module(Net(), other=partial(factory, **more))


def test_errors_of_this_package_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"lr") as error:
        HybridOptimizer.from_module(Net(), matrix=partial(Muon, lr=-1.0))
    assert not getattr(error.value, "__notes__", [])
