"""A state that is refused changes nothing: no rate, no option, no tensor, no link, nothing that only a child knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_muon.optim import HybridOptimizer, Muon, NorMuon, PolarGrad
from lightning_muon.partition import ParameterRule
from tests.optim.nets import Net, assert_linked, build, names_of, train
from tests.optim.rule_cases import RULES
from tests.optim.subjects import Bag, advance, assert_same_bits, reload, set_grads, snapshot


class Counts(SGD):
    """Of another package: counts in an attribute and in a list, and loads them in place before it refuses."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.count = 0
        self.history = [0]
        self.buffer = torch.zeros(2)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        self.history.append(self.count)
        self.buffer += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count, "history": self.history, "buffer": self.buffer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.history.clear()
        self.buffer.zero_()
        for group in self.param_groups:
            group["lr"] = 7.0
        super().load_state_dict(state_dict)
        self.history += state_dict["history"]
        self.buffer += state_dict["buffer"]
        if state_dict["count"] == 13:
            raise RuntimeError("thirteen")


def of(package: str, name: str) -> Callable[..., Optimizer]:
    def make(groups: Any) -> Optimizer:
        return getattr(pytest.importorskip(package), name)(groups, lr=0.01)

    return make


PAIRS: dict[str, dict[str, Callable[..., Optimizer]]] = {
    "Muon": {"matrix": partial(Muon, lr=0.01), "other": partial(AdamW, lr=0.01)},
    "NorMuon": {"matrix": partial(NorMuon, lr=0.01), "other": partial(SGD, lr=0.01, momentum=0.9)},
    "AdamW": {"matrix": partial(AdamW, lr=0.01), "other": of("schedulefree", "AdamWScheduleFree")},
    "schedulefree": {"matrix": of("schedulefree", "AdamWScheduleFree"), "other": partial(AdamW, lr=0.01)},
    "pytorch_optimizer": {"matrix": of("pytorch_optimizer", "AdaBelief"), "other": of("pytorch_optimizer", "Lion")},
    "Counts": {"matrix": Counts, "other": Counts},
}


def first_tensor(saved: dict[str, Any], role: str) -> tuple[Any, str]:
    """(id, key) of an elementwise state entry of a parameter of a role."""
    for group in saved["param_groups"]:
        if group["name"].startswith(role):
            for saved_id in group["params"]:
                for key, value in saved["state"][saved_id].items():
                    if isinstance(value, Tensor) and value.numel() > 1:
                        return saved_id, key
    raise AssertionError(role)


def wrong_shape(saved: dict[str, Any], role: str) -> None:
    saved_id, key = first_tensor(saved, role)
    saved["state"][saved_id][key] = torch.zeros(3, 2)


def missing_parameter(saved: dict[str, Any], role: str) -> None:
    group = next(
        group for group in saved["param_groups"] if group["name"].startswith(role) and len(group["params"]) > 1
    )
    group["params"].pop()
    group["param_names"].pop()


def unknown_parameter(saved: dict[str, Any], role: str) -> None:
    group = next(group for group in saved["param_groups"] if group["name"].startswith(role))
    group["param_names"][0] = "elsewhere.weight"


def other_child(saved: dict[str, Any], role: str) -> None:
    groups = {
        name: next(g for g in saved["param_groups"] if g["name"].startswith(name)) for name in ("matrix", "other")
    }
    source, target = groups[role], groups["other" if role == "matrix" else "matrix"]
    for key in ("params", "param_names"):
        target[key].append(source[key].pop())


def garbage_in_a_group(saved: dict[str, Any], role: str) -> None:
    group = next(group for group in saved["param_groups"] if group["name"].startswith(role))
    group["params"] = None


def garbage_in_the_state(saved: dict[str, Any], role: str) -> None:
    saved["state"][first_tensor(saved, role)[0]] = 3


def other_class(saved: dict[str, Any], role: str) -> None:
    for group in saved["param_groups"]:
        if group["name"].startswith(role):
            group["optimizer"] = "elsewhere.Sgdw"


WAYS = [wrong_shape, missing_parameter, unknown_parameter, other_child, garbage_in_a_group, garbage_in_the_state]
WAYS += [other_class]


@pytest.mark.parametrize("role", ["matrix", "other"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("spoil", WAYS, ids=lambda way: way.__name__)
def test_a_refused_state_changes_nothing(pair: str, spoil: Callable[..., None], role: str) -> None:
    child = PAIRS[pair][role]
    if spoil is wrong_shape and pair in ("pytorch_optimizer", "Counts"):
        pytest.skip("not every state of these has the shape of its parameter")
    net, optimizer = trained(pair)
    _, other = trained(pair, steps=2)
    saved = reload(other.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.5
    spoil(saved, role)
    before = remembered(optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(saved)
    assert_as_before(optimizer, before)
    assert child is PAIRS[pair][role]
    goes_on_like_an_untouched_one(net, optimizer, pair)


@pytest.mark.parametrize("garbage", [None, 3, [], {}, {"state": {}}, {"state": [], "param_groups": []}])
@pytest.mark.parametrize("alone", [False, True], ids=["hybrid", "alone"])
def test_what_is_no_state_is_refused_as_such(garbage: Any, alone: bool) -> None:
    optimizer: Optimizer = trained("Muon")[1]
    if alone:
        bag = Bag()
        optimizer = Muon(bag.named("w"))
        advance(bag, optimizer, range(1))
    before = remembered(optimizer)
    with pytest.raises((ValueError, TypeError), match=r"state_dict\(\) returned, a dict of 'state' and 'param_groups'"):
        optimizer.load_state_dict(garbage)
    assert_as_before(optimizer, before)


@pytest.mark.parametrize("role", ["matrix", "other"])
def test_the_error_of_a_child_of_another_package_changes_nothing(role: str) -> None:
    """Though the child had changed itself already, and the other child has loaded."""
    net, optimizer = trained("Counts")
    saved = reload(optimizer.state_dict())
    saved["children"][role]["count"] = 13
    before = remembered(optimizer)
    with pytest.raises(RuntimeError, match="thirteen"):
        optimizer.load_state_dict(saved)
    assert_as_before(optimizer, before)
    goes_on_like_an_untouched_one(net, optimizer, "Counts")


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_a_matrix_optimizer_alone_changes_nothing(rule: type[Any]) -> None:
    bag, twin = Bag(), Bag()
    optimizer, other = rule(bag.named("w"), lr=0.01), rule(twin.named("w"), lr=0.01)
    advance(bag, optimizer, range(2))
    advance(twin, other, range(2))
    saved = reload(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][1]["momentum_buffer"] = torch.zeros(3, 2)
    before = remembered(optimizer)
    with pytest.raises(ValueError, match=r"momentum_buffer.*\(3, 2\)"):
        optimizer.load_state_dict(saved)
    assert_as_before(optimizer, before)
    advance(bag, optimizer, range(5, 8))
    advance(twin, other, range(5, 8))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


def test_the_state_of_a_frozen_parameter_is_checked_too() -> None:
    net, optimizer = trained("Muon")
    saved = reload(optimizer.state_dict())
    net.body.requires_grad_(False)
    net.zero_grad()
    index = next(
        i
        for g in saved["param_groups"]
        for n, i in zip(g["param_names"], g["params"], strict=True)
        if n == "body.0.weight"
    )
    saved["state"][index]["momentum_buffer"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"'body.0.weight'.*\(3, 2\)"):
        optimizer.load_state_dict(saved)


CLASSES: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "Adam": Adam,
    "SGD": partial(SGD, lr=0.01),
    "RMSprop": RMSprop,
    "Lion": of("pytorch_optimizer", "Lion"),
    "AdamWScheduleFree": of("schedulefree", "AdamWScheduleFree"),
    "Muon": Muon,
    "NorMuon": NorMuon,
    "PolarGrad": PolarGrad,
}


@pytest.mark.parametrize("through", ["state_dict", "dcp", "dcp flattened"])
@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("AdamW", "SGD"), ("AdamW", "Lion"), ("AdamW", "Adam"), ("SGD", "RMSprop"), ("Muon", "NorMuon"),
        ("NorMuon", "Muon"), ("Muon", "PolarGrad"), ("Muon", "AdamW"), ("AdamW", "Muon"), ("Lion", "AdamWScheduleFree"),
    ],
)  # fmt: skip
def test_another_class_is_refused_by_name(saving: str, loading: str, through: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net, twin = Net(), Net()
    optimizer, other = (build(one, matrix=CLASSES[kind]) for one, kind in ((net, saving), (twin, loading)))
    for one in (optimizer, other):
        one.train()
    train(net, optimizer, 2)
    message = rf"(?s){saving}.*{loading}|{loading}.*{saving}"
    if through == "state_dict":
        saved = reload(optimizer.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            other.load_state_dict(saved)
        assert "load the weights alone" in str(error.value)
        return
    options = StateDictOptions(flatten_optimizer_state_dict=through == "dcp flattened")
    saved = reload(get_optimizer_state_dict(net, optimizer, options=options))
    # Flattened, torch itself misses the options that the other class has.
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        set_optimizer_state_dict(twin, other, saved, options=options)


def test_a_class_of_the_same_name_with_other_options_is_another() -> None:
    net, twin = Net(), Net()
    optimizer = build(
        net, matrix=partial(torch.optim.Muon, lr=0.01), rules=[ParameterRule(pattern="conv.*", group="other")]
    )
    train(net, optimizer, 1)
    other = build(twin, rules=[ParameterRule(pattern="conv.*", group="other")])
    with pytest.raises(ValueError, match=r"saved by torch\.Muon, and lightning_muon\.Muon cannot"):
        other.load_state_dict(reload(optimizer.state_dict()))


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_rule_loads_the_state_of_another(name: str) -> None:
    loading = NorMuon if name == "Muon" else Muon
    bag, twin = Bag(), Bag()
    optimizer, other = RULES[name](bag.named("w"), lr=0.01), loading(twin.named("w"), lr=0.01)
    for one, module in ((optimizer, bag), (other, twin)):
        set_grads(module, 0)
        one.step(lambda: 1.0)
    before = remembered(other)
    with pytest.raises(ValueError, match=rf"(?s)({name}.*{loading.__name__}|{loading.__name__}.*{name})"):
        other.load_state_dict(reload(optimizer.state_dict()))
    assert_as_before(other, before)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_state_that_does_not_say_its_class_loads(pair: str) -> None:
    """As older versions saved it."""
    net, optimizer = trained(pair)
    saved = reload(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["optimizer"]
    twin, other = trained(pair, steps=1)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(saved)
    other.train()
    assert train(net, optimizer, 2) == train(twin, other, 2)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


# Names


def layers(seed: int = 0) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(4, 4, bias=False) for _ in range(4)]


def named(*modules: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [pair for module in modules for pair in module.named_parameters()]


REPEATS: dict[str, Callable[[list[nn.Linear]], HybridOptimizer]] = {
    "within a group": lambda m: HybridOptimizer({"other": AdamW(named(*m))}),
    "across groups": lambda m: HybridOptimizer(
        {
            "other": AdamW(
                [
                    {"params": named(*m[:1])},
                    {"params": named(*m[1:2])},
                    {"params": [("own", m[2].weight), *named(m[3])]},
                ]
            )
        }
    ),
    "across children": lambda m: HybridOptimizer({"other": AdamW(named(*m[:2])), "matrix": Muon(named(*m[2:]))}),
}


def step_layers(modules: list[nn.Linear], optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        for module in modules:
            module.weight.grad = torch.randn(4, 4)
        optimizer.step()


@pytest.mark.parametrize("where", REPEATS)
def test_names_that_repeat_are_matched_by_their_places(where: str) -> None:
    first, second = layers(), layers(1)
    optimizer, other = REPEATS[where](first), REPEATS[where](second)
    step_layers(first, optimizer, 3)
    for one, two in zip(first, second, strict=True):
        two.load_state_dict(one.state_dict())
    other.load_state_dict(reload(optimizer.state_dict()))
    step_layers(first, optimizer, 2)
    step_layers(second, other, 2)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.weight, two.weight)
        assert optimizer.state[one.weight].keys() == other.state[two.weight].keys() != set()


@pytest.mark.parametrize("change", ["shorter", "renamed", "reordered groups"])
def test_names_that_repeat_in_other_places_are_refused(change: str) -> None:
    modules = layers()
    optimizer = REPEATS["across groups"](modules)
    step_layers(modules, optimizer, 1)
    saved = reload(optimizer.state_dict())
    if change == "shorter":
        saved["param_groups"][2]["params"].pop()
        saved["param_groups"][2]["param_names"].pop()
    elif change == "renamed":
        saved["param_groups"][0]["param_names"] = ["first"]
    else:
        saved["param_groups"][2]["param_names"].reverse()
    before = remembered(optimizer)
    with pytest.raises(ValueError, match=r"Several parameters are called 'weight'.*named_parameters\(\)"):
        optimizer.load_state_dict(saved)
    assert_as_before(optimizer, before)


def test_a_parameter_in_another_group_of_its_child_takes_that_groups_options() -> None:
    rules = [ParameterRule(pattern="body.*.weight", options={"lr": 0.5})]
    net, optimizer = Net(), build(Net())
    optimizer = build(net, rules=rules)
    train(net, optimizer, 2)
    twin = Net(seed=1)
    twin.load_state_dict(net.state_dict())
    other = build(twin)
    other.load_state_dict(reload(optimizer.state_dict()))
    assert names_of(other) == names_of(optimizer)
    assert {g["name"]: g["lr"] for g in other.param_groups} == {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert_linked(other)
    assert train(net, optimizer, 2) == train(twin, other, 2)


def trained(pair: str, steps: int = 3) -> tuple[Net, HybridOptimizer]:
    net = Net()
    optimizer = HybridOptimizer.from_module(net, **PAIRS[pair])
    optimizer.train()
    train(net, optimizer, steps)
    return net, optimizer


def remembered(optimizer: Optimizer) -> dict[str, Any]:
    """Everything about an optimizer and its children: identities, and copies of what they hold."""
    children = getattr(optimizer, "optimizers", {}).values()
    tensors = {
        (id(parameter), key): (value, value.detach().clone())
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    return {
        "groups": [
            (id(group), {**group, "params": [id(p) for p in group["params"]]}) for group in optimizer.param_groups
        ],
        "tensors": tensors,
        "state": (
            id(optimizer.state),
            {id(p): {k: v for k, v in s.items() if not isinstance(v, Tensor)} for p, s in optimizer.state.items()},
        ),
        "children": [
            (id(c), id(c.state), [id(g) for g in c.param_groups], reload(foreign_attributes(c))) for c in children
        ],
        "layouts": [dict(child.layouts) for child in (optimizer, *children) if hasattr(child, "layouts")],
    }


def foreign_attributes(child: Optimizer) -> dict[str, Any]:
    return {key: getattr(child, key) for key in ("count", "history") if hasattr(child, key)} | (
        {"buffer": child.buffer.tolist()} if hasattr(child, "buffer") else {}
    )


def assert_as_before(optimizer: Optimizer, before: dict[str, Any]) -> None:
    now = remembered(optimizer)
    for key in ("groups", "state", "children", "layouts"):
        assert now[key] == before[key], key
    assert now["tensors"].keys() == before["tensors"].keys()
    for key, (tensor, value) in before["tensors"].items():
        assert now["tensors"][key][0] is tensor
        assert torch.equal(tensor, value)
    if isinstance(optimizer, HybridOptimizer):
        assert_linked(optimizer)


def goes_on_like_an_untouched_one(net: Net, optimizer: HybridOptimizer, pair: str) -> None:
    """Views of stacks are still those that the steps write to."""
    twin, other = trained(pair)
    assert train(net, optimizer, 2) == train(twin, other, 2)
    assert_same_bits(snapshot(net, optimizer), snapshot(twin, other))
    assert isinstance(optimizer.state, defaultdict)
