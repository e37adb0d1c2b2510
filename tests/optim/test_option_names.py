"""Options of param groups: a group may set what the constructor takes, and nothing else."""

from __future__ import annotations

import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from examples.custom_rule import RMNP
from lightning_muon import HybridOptimizer, ParameterRule, partition_parameters
from lightning_muon.optim import REG, Muon, SinkGD
from lightning_muon.optim.arguments import FOLLOWS_KEY, OPTIMIZER_KEY
from lightning_muon.optim.matrix import MatrixOptimizer
from tests.optim.references import REFERENCES
from tests.optim.rule_cases import rule_class


class MyMuon(Muon):
    """Hands on what it does not know."""

    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        super().__init__(params, lr, **options)


class MyREG(REG):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class Bare(MatrixOptimizer):
    """Gives its options as ``defaults``."""

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return grad


def taken_by(rule: type[Optimizer]) -> dict[str, Any]:
    """The options of a constructor and their defaults."""
    parameters = inspect.signature(rule).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "params" and p.kind is not p.VAR_KEYWORD}


RULES = [*(rule_class(name) for name in REFERENCES), RMNP]
ALL_OPTIONS = {name: default for rule in RULES for name, default in taken_by(rule).items()}
OWN = [(rule, taken_by(rule)) for rule in RULES]
INHERITED: list[tuple[type[MatrixOptimizer], dict[str, Any]]] = [(MyMuon, taken_by(Muon)), (MyREG, taken_by(REG))]
over_rules = pytest.mark.parametrize(
    ("rule", "taken"), [pytest.param(*case, id=case[0].__name__) for case in OWN + INHERITED]
)


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 5))


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def hybrid(rule: Any, options: dict[str, Any] | None = None) -> HybridOptimizer:
    rules = [ParameterRule(pattern="2.weight", options=options)] if options else []
    return HybridOptimizer.from_module(module(), matrix=rule, other=AdamW, rules=rules)


@over_rules
def test_what_the_constructor_refuses_is_refused_everywhere(rule: type[MatrixOptimizer], taken: dict[str, Any]) -> None:
    """In a group, in one added later, alone and in a hybrid, and by a rule of the partition; and nothing changes."""
    alone, both = rule([matrix()]), hybrid(rule)
    names = [group["name"] for group in both.param_groups]
    foreign = {name: value for name, value in ALL_OPTIONS.items() if name not in taken}
    assert foreign
    for name, value in foreign.items():
        option = {name: value}
        refused = pytest.raises(ValueError, match=f"{rule.__name__} has no option '{name}'")
        with refused:
            rule([{"params": [matrix()], **option}])
        with refused:
            alone.add_param_group({"params": [matrix()], **option})
        with refused:
            both.add_param_group({"params": [matrix()], "name": "matrix/new", **option})
        with refused:
            hybrid(rule, option)
    assert len(alone.param_groups) == 1
    assert [group["name"] for group in both.param_groups] == names


@over_rules
def test_what_the_constructor_takes_is_taken_everywhere(rule: type[MatrixOptimizer], taken: dict[str, Any]) -> None:
    alone = rule([{"params": [matrix()], **taken}])
    alone.add_param_group({"params": [matrix()], **taken})
    both = hybrid(rule, taken)
    both.add_param_group({"params": [matrix()], "name": "matrix/new", **taken})
    for group in (*alone.param_groups, both.param_groups[-1], both.param_groups[-2]):
        assert group.items() >= {name: value for name, value in taken.items() if name != "lr"}.items()


@pytest.mark.parametrize("rule", [rule for rule, taken in OWN + INHERITED if "lr_scale" not in taken])
def test_a_fixed_scale_stays_fixed(rule: type[MatrixOptimizer]) -> None:
    """The rules that have no shape scale were rescaled by one in a group, or ignored it."""
    for scale in ("original", "none"):
        with pytest.raises(ValueError, match="'lr_scale', which param group 0 sets"):
            rule([{"params": [matrix()], "lr_scale": scale}])


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("weigth_decay", "weight_decay"), ("lrs", "lr"), ("momentun", "momentum")]
)
def test_a_misspelt_option_gets_near_names(misspelt: str, meant: str) -> None:
    by_group = rf"'{misspelt}', which (the )?param group .* sets\. Near names: {meant}"
    by_rule = rf"'{misspelt}', which a parameter rule sets for the group '.+'\. Near names: {meant}"
    both = HybridOptimizer.from_module(module(), matrix=Muon, other=partial(SGD, lr=0.1))
    with pytest.raises(ValueError, match=by_group):
        Muon([{"params": [matrix()], misspelt: 0.5}])
    for child in ("matrix", "other"):  # of torch and of ours
        with pytest.raises(ValueError, match=by_group):
            both.add_param_group({"params": [matrix()], "name": f"{child}/new", misspelt: 0.5})
    for pattern in ("2.weight", "2.bias"):
        rule = ParameterRule(pattern=pattern, options={misspelt: 0.5})
        with pytest.raises(ValueError, match=by_rule):
            HybridOptimizer.from_module(module(), matrix=Muon, other=partial(SGD, lr=0.1), rules=[rule])


def test_an_option_far_from_all_names_gets_the_list() -> None:
    with pytest.raises(
        ValueError, match=r"'wd', which .* sets\. Options: weight_decay, lr, rms, sweeps, cautious, state"
    ):
        SinkGD([{"params": [matrix()], "wd": 0.5}])


@pytest.mark.parametrize(
    ("pattern", "kind", "first"), [("2.weight", "Muon", "weight_decay"), ("2.bias", "AdamW", "lr")]
)
def test_an_option_of_a_rule_far_from_all_names_gets_the_list(pattern: str, kind: str, first: str) -> None:
    rule = ParameterRule(pattern=pattern, options={"zzz": 0.5})
    with pytest.raises(
        ValueError, match=rf"^{kind} has no option 'zzz', which a parameter rule sets .* Options: {first}"
    ):
        HybridOptimizer.from_module(module(), rules=[rule])


def test_an_option_that_a_factory_sets_is_no_rules() -> None:
    with pytest.raises(ValueError, match=r"Muon has no option 'zzz', which the param group 'matrix' sets"):
        hybrid(lambda groups: Muon([{**group, "zzz": 1} for group in groups]))


def test_an_option_of_a_rule_is_checked_where_a_layer_joins() -> None:
    """torch keeps what it does not know."""
    net = module()
    both = HybridOptimizer.from_module(net)
    net.append(nn.LayerNorm(2))
    rule = ParameterRule(pattern="5.*", options={"weigth_decay": 0.5})
    with pytest.raises(ValueError, match=r"AdamW has no option 'weigth_decay', which a parameter rule sets"):
        both.adopt(partition_parameters(net, [rule]))
    assert all("weigth_decay" not in group for group in both.param_groups)


@pytest.mark.parametrize("key", [OPTIMIZER_KEY, FOLLOWS_KEY])
def test_what_the_package_keeps_in_groups_is_no_option(key: str) -> None:
    """It was overwritten, or kept, in silence."""
    both = hybrid(Muon)
    refused = pytest.raises(ValueError, match=rf"group .*sets '{key}' to 'x', but ")
    with refused:
        Muon([{"params": [matrix()], key: "x"}])
    with refused:
        Muon([matrix()]).add_param_group({"params": [matrix()], key: "x"})
    for child in both.optimizers:
        with refused:
            both.add_param_group({"params": [matrix()], "name": f"{child}/new", key: "x"})
    with refused:
        HybridOptimizer({"other": AdamW([{"params": [matrix()], key: "x"}])})
    with pytest.raises(ValueError, match=rf"The option '{key}' cannot be set by a parameter rule"):
        ParameterRule(pattern="*", options={key: "x"})
    assert [group["name"] for group in both.param_groups] == [group["name"] for group in hybrid(Muon).param_groups]


def test_a_rule_that_chooses_the_optimizer_by_an_option_is_told_how() -> None:
    with pytest.raises(ValueError, match="options cannot choose the optimizer: set group to 'matrix' or 'other'"):
        ParameterRule(pattern="*", options={"optimizer": "AdamW"})


def test_groups_of_an_optimizer_of_the_same_class_can_be_given_again() -> None:
    """With what the package keeps in them."""
    net = module()
    both = HybridOptimizer({"matrix": Muon([net[0].weight]), "other": AdamW([net[0].bias])}, partition_parameters(net))
    both.add_param_group({"params": [net[2].weight, net[2].bias], "lr": 0.5})  # the first follows the second
    assert any(FOLLOWS_KEY in group for group in both.param_groups)
    again = HybridOptimizer(
        {"matrix": both.optimizers["matrix"], "other": AdamW(both.optimizers["other"].param_groups)}
    )
    assert {group["name"] for group in again.param_groups} == {group["name"] for group in both.param_groups}
    copied = {**both.param_groups[0], "params": [matrix()], "param_names": ["new"]}
    both.add_param_group(copied)
    assert both.param_groups[-1]["lr"] == copied["lr"]
    alone = Muon([matrix()])
    Muon([{**alone.param_groups[0], "name": "matrix", FOLLOWS_KEY: "matrix/2"}])
    with pytest.raises(ValueError, match=r"sets 'optimizer' to 'lightning_muon\.Muon', but "):
        REG(alone.param_groups)


def test_what_adamw_sets_by_itself_is_no_option_of_a_rule() -> None:
    """AdamW is Adam with an option that its constructor does not take: it was Adam with an L2 penalty in silence."""
    rule = ParameterRule(pattern="2.bias", options={"decoupled_weight_decay": False})
    with pytest.raises(ValueError, match="AdamW has no option 'decoupled_weight_decay'"):
        HybridOptimizer.from_module(module(), rules=[rule])


def test_nothing_is_added_where_one_child_refuses() -> None:
    """Parameters of two children in one group: what the second refuses does not reach the first."""
    net = module()
    children = {"matrix": Muon([net[0].weight]), "other": AdamW([net[0].bias])}
    both = HybridOptimizer(children, partition_parameters(net))
    with pytest.raises(ValueError, match="AdamW has no option 'nesterov'"):
        both.add_param_group({"params": [net[2].weight, net[2].bias], "nesterov": False})
    assert len(both.param_groups) == 2
    assert [len(child.param_groups) for child in both.optimizers.values()] == [1, 1]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
        lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    ],
)
def test_groups_that_a_scheduler_wrote_into_can_be_given_again(schedule: Any) -> None:
    optimizer = Muon([matrix()], lr=0.01)
    schedule(optimizer)
    again = Muon(optimizer.param_groups)
    assert again.param_groups[0].keys() == optimizer.param_groups[0].keys()


def test_use_muon_of_other_packages() -> None:
    Muon([{"params": [matrix()], "use_muon": True}])
    with pytest.raises(ValueError, match=r"use_muon=False .* HybridOptimizer"):
        Muon([{"params": [matrix()], "use_muon": False}])


def test_options_given_as_defaults() -> None:
    optimizer = Bare([{"params": [matrix()], "sharpness": 2.0, "cautious": True}], {"lr": 0.1, "sharpness": 1.0})
    assert optimizer.param_groups[0]["sharpness"] == 2.0
    with pytest.raises(ValueError, match=r"Bare has no option 'sharpnes'.* Near names: sharpness"):
        optimizer.add_param_group({"params": [matrix()], "sharpnes": 2.0})


@pytest.mark.parametrize("in_hybrid", [False, True])
def test_checkpoints_with_such_options_load(in_hybrid: bool) -> None:
    """Of runs from before, by load_state_dict and by pickle."""

    def make() -> Optimizer:
        torch.manual_seed(0)
        return hybrid(REG) if in_hybrid else REG([matrix()])

    optimizer = make()
    for group in optimizer.param_groups:
        group.update(lr_scale="original", weigth_decay=0.5)
    loaded = make()
    loaded.load_state_dict(optimizer.state_dict())
    for copy in (loaded, pickle.loads(pickle.dumps(optimizer))):
        assert all(group["weigth_decay"] == 0.5 for group in copy.param_groups)
