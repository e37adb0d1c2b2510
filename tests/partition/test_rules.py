"""ParameterRule: what it selects, what it changes, in which order, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.partition import MatrixLayout, ParameterRule, Partition, partition_parameters
from tests.partition.modules import Block, Parts


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(100, 16)
        self.positions = nn.Embedding(10, 16)
        self.fused = nn.Linear(16, 48, bias=False)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(4, 16, 8))


def partition(*rules: ParameterRule) -> Partition:
    return partition_parameters(Recommender(), rules)


def group_names(parts: Partition) -> dict[str, str]:
    return {entry.name: entry.group_name for entry in parts}


# What a rule selects


def test_pattern_is_a_glob_over_whole_names():
    parts = partition(ParameterRule(pattern="blocks.*.linear1.weight", group="other"))
    moved = [entry.name for entry in parts if entry.reason.startswith("Sent to other by a rule.")]
    assert moved == ["blocks.0.linear1.weight", "blocks.1.linear1.weight"]
    assert parts["blocks.0.linear1.weight"].layout is None
    assert parts["blocks.0.linear1.weight"].group_name == "other/hidden"


def test_pattern_matches_any_name_of_a_shared_parameter():
    module = nn.Module()
    module.first = module.second = nn.Linear(8, 8)
    parts = partition_parameters(module, [ParameterRule(pattern="second.weight", group="other")])
    assert parts["first.weight"].group == "other"


@pytest.mark.parametrize(
    "module_type", ["Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear", nn.Linear, "TransformerEncoderLayer"]
)
def test_module_type_selects_by_name_path_or_class_subclasses_included(module_type):
    """out_proj belongs to a subclass of Linear; TransformerEncoderLayer owns no parameter itself."""
    rule = ParameterRule(module_type=module_type, pattern="*weight", group="other")
    if module_type == "TransformerEncoderLayer":
        with pytest.raises(ValueError, match="matches no parameter"):
            partition(rule)
        return
    parts = partition(rule)
    moved = {entry.name for entry in parts if entry.reason.startswith("Sent to other")}
    assert "fused.weight" in moved
    assert "blocks.0.self_attn.out_proj.weight" in moved
    assert "blocks.0.self_attn.in_proj_weight" not in moved


def test_module_type_of_another_package_does_not_match():
    with pytest.raises(ValueError, match="matches no parameter"):
        partition(ParameterRule(module_type="other.Linear", group="other"))


def test_all_selectors_must_match():
    parts = partition(ParameterRule(role="embedding", pattern="pos*", options={"lr": 1.0}))
    assert [entry.name for entry in parts if entry.options] == ["positions.weight"]


# What a rule changes


def test_later_rules_win_field_by_field_and_options_merge():
    parts = partition(
        ParameterRule(pattern="fused.weight", split=3, options={"lr": 1.0, "weight_decay": 0.0}),
        ParameterRule(role="hidden", options={"lr": 2.0}),
        ParameterRule(pattern="fused.*", split=[32, 16]),
    )
    assert dict(parts["fused.weight"].options) == {"lr": 2.0, "weight_decay": 0.0}
    assert parts["fused.weight"].layout == MatrixLayout(split=(32, 16))
    assert dict(parts["blocks.0.linear1.weight"].options) == {"lr": 2.0}


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"split": 3}, MatrixLayout(split=(16, 16, 16))),
        ({"split": [16, 32]}, MatrixLayout(split=(16, 32))),
        ({"split": 3, "repeats": 2}, MatrixLayout(split=(8, 8, 8), repeats=2)),
        ({"split": 1}, MatrixLayout()),
        ({"transposed": True, "split": 2}, MatrixLayout(transposed=True, split=(8, 8))),
    ],
)
def test_layouts(fields, layout):
    entry = partition(ParameterRule(pattern="fused.weight", **fields))["fused.weight"]
    assert entry.layout == layout
    assert ("Layout set by a rule." in entry.reason) == (layout != MatrixLayout())


def test_split_of_one_joins_what_the_partition_split():
    parts = partition(ParameterRule(pattern="*.in_proj_weight", split=1))
    assert parts["blocks.0.self_attn.in_proj_weight"].layout == MatrixLayout()


def test_split_starts_from_no_repeats_again():
    parts = partition(
        ParameterRule(pattern="fused.weight", split=3, repeats=2), ParameterRule(pattern="fused.weight", split=3)
    )
    assert parts["fused.weight"].layout == MatrixLayout(split=(16, 16, 16))


def test_raw_parameter_sent_to_matrix():
    entry = partition(ParameterRule(pattern="gate", group="matrix", batch_dims=1, transposed=True))["gate"]
    assert (entry.role, entry.group_name) == ("other", "matrix/other")
    assert entry.layout is not None
    assert entry.layout.matrix_shapes((4, 16, 8)) == [(4, 8, 16)]


# Names of param groups


def test_group_names_without_rules():
    names = group_names(partition())
    assert set(names.values()) == {"matrix", "other/embedding", "other/vector", "other/other"}


def test_options_for_a_whole_role_keep_its_name():
    names = group_names(partition(ParameterRule(role="embedding", options={"lr": 1.0})))
    assert names["items.weight"] == names["positions.weight"] == "other/embedding"


def test_options_for_some_get_a_name_of_their_own():
    names = group_names(
        partition(
            ParameterRule(pattern="pos*", role="embedding", options={"lr": 1.0}),
            ParameterRule(pattern="*.linear1.weight", options={"lr": 1.0}),
            ParameterRule(pattern="*.linear2.weight", options={"lr": 2.0}),
        )
    )
    assert names["items.weight"] == "other/embedding"
    assert names["positions.weight"] == "other/embedding/pos"
    assert names["fused.weight"] == "matrix"
    assert names["blocks.1.linear1.weight"] == "matrix/linear1.weight"
    assert names["blocks.1.linear2.weight"] == "matrix/linear2.weight"


def test_name_joins_roles_of_one_group_and_options_divide_it():
    parts = partition(
        ParameterRule(pattern="blocks.*", name="slow", options={"lr": 0.1}),
        ParameterRule(pattern="blocks.0.norm1.weight", options={"weight_decay": 0.0}),
    )
    names = group_names(parts)
    assert names["blocks.1.linear1.weight"] == "matrix/slow"
    assert names["blocks.1.linear1.bias"] == names["blocks.1.norm1.weight"] == "other/slow"
    groups = [*parts.param_groups("other"), *parts.param_groups("matrix")]
    assert len({group["name"] for group in groups}) == len(groups)
    divided = next(group for group in groups if "weight_decay" in group)
    assert divided["param_names"] == ["blocks.0.norm1.weight"]
    assert divided["lr"] == 0.1


def test_name_is_used_as_given_where_it_is_unique():
    assert group_names(partition(ParameterRule(pattern="fused.weight", name="fused")))["fused.weight"] == "fused"


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": "other"}, "selects nothing: give it a pattern, a role or a module_type"),
        ({"pattern": "*"}, "changes nothing"),
        ({"role": "hiden", "group": "other"}, "Unknown role 'hiden'.*hidden, embedding, head"),
        ({"pattern": "*", "group": "muon"}, "Unknown group 'muon'.*matrix, other"),
        ({"pattern": "*", "split": []}, "split must be"),
        ({"pattern": "*", "split": 0}, "split must be"),
        ({"pattern": "*", "split": [3, -1]}, "split must be"),
        ({"pattern": "*", "repeats": 0}, "repeats must be"),
        ({"pattern": "*", "batch_dims": -1}, "batch_dims must be"),
        ({"pattern": "*", "options": {"name": "slow"}}, "'name' cannot be set.*field `name`"),
        ({"pattern": "*", "options": {"params": []}}, "'params' cannot be set"),
    ],
)
def test_rule_without_sense(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ParameterRule(**fields)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ParameterRule(pattern="itms.weight", group="other"), "Near names: items.weight"),
        (ParameterRule(pattern="*.linear1.wieght", group="other"), r"Near names: .*blocks\.0\.linear1\.weight"),
        (ParameterRule(role="head", group="other"), "Roles in this module: embedding, hidden, other, vector"),
        (ParameterRule(module_type="Linaer", group="other"), "Modules with parameters: Near names: Linear"),
        (ParameterRule(module_type=nn.GRU, group="other"), "module_type='GRU'"),
        (ParameterRule(role="embedding", pattern="fused*", group="other"), "no parameter matches all of them"),
        (ParameterRule(pattern="fused.weight", split=5), "'fused.weight' of shape .48, 16.*5 equal blocks.*48"),
        (ParameterRule(pattern="fused.weight", split=[16, 16]), "covers 32 rows, but the fan-out .*48"),
        (ParameterRule(pattern="fused.weight", batch_dims=1), "no matrices after 1 batch dimensions"),
        (ParameterRule(pattern="fused.weight", repeats=2), "repeats=2 needs split"),
        (ParameterRule(pattern="*.bias", group="matrix"), "fewer than two dimensions larger than 1"),
        (ParameterRule(role="embedding", split=2), "goes to the group 'other'.*items.weight.*group='matrix'"),
    ],
)
def test_rule_that_does_not_fit_the_module(rule: ParameterRule, message: str):
    with pytest.raises(ValueError, match=message):
        partition(rule)


def test_rules_must_be_rules():
    with pytest.raises(TypeError, match=r"ParameterRule, got .*of type dict"):
        partition_parameters(nn.Linear(2, 2), [{"pattern": "*"}])  # type: ignore[list-item]


def test_rule_in_words():
    rule = ParameterRule(module_type=nn.Linear, options={"lr": 0.1})
    assert str(rule) == "ParameterRule(module_type='Linear', options={'lr': 0.1})"


def test_rules_parse_from_yaml():
    """As jsonargparse builds them for the command line."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--rules", type=list[ParameterRule])
    text = "[{pattern: '*.qkv', split: [1, 2]}, {role: head, split: 3}, {module_type: torch.nn.Linear, group: other}]"
    parsed = parser.parse_args(["--rules", text])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # named so before 4.49
    rules = instantiate(parsed).rules
    assert rules == [
        ParameterRule(pattern="*.qkv", split=[1, 2]),
        ParameterRule(role="head", split=3),
        ParameterRule(module_type="torch.nn.Linear", group="other"),
    ]
    with pytest.raises(SystemExit):
        parser.parse_args(["--rules", "[{role: hiden, group: other}]"])


def test_unknown_name_lists_near_ones():
    with pytest.raises(KeyError, match=r"fused\.weight"):
        partition()["fused.wieght"]


def test_a_later_rule_may_send_to_other_what_an_earlier_one_gave_a_layout() -> None:
    """A user's rule over that of a model, which says how its fused parameter is read."""
    module = nn.Module()
    module.fused = nn.Parameter(torch.randn(4, 8))
    own = ParameterRule(pattern="fused", group="matrix", split=2, transposed=True)
    assert partition_parameters(module, [own])["fused"].layout is not None
    assert partition_parameters(module, [own, ParameterRule(pattern="fused", group="other")])["fused"].group == "other"
    with pytest.raises(ValueError, match="sets a layout, but what it matches goes to the group 'other'"):
        partition_parameters(module, [ParameterRule(pattern="fused", group="other", split=2)])


@pytest.mark.parametrize(
    ("pattern", "first", "absent"),
    [
        ("*.atention.in_proj_weight", "blocks.0.attention.in_proj_weight", "bias"),
        ("embedding.weight", "embed.weight", "bias"),
        ("*.wieght", "embed.weight", "norm"),
        ("*.norms.weight", "blocks.0.norm.weight", "embed"),
        ("*.down.bais", "blocks.0.down.weight", "lm_head.bias"),
        ("*.nrom.bias", "blocks.0.norm.bias", "weight"),
        ("head", "lm_head.weight", "bias"),
        ("something.else", "embed.weight", "bias"),
    ],
)
def test_near_names_are_what_a_user_can_mean(pattern, first, absent):
    """Weights before norms and biases, unless the pattern says one of these; one name for the like layers of blocks."""
    model = Parts(embed=nn.Embedding(30, 16), blocks=nn.Sequential(Block(16), Block(16)), lm_head=nn.Linear(16, 30))
    with pytest.raises(ValueError, match="matches no parameter") as error:
        partition_parameters(model, [ParameterRule(pattern=pattern, group="other")])
    listed = str(error.value).partition("ames: ")[2]
    assert listed.startswith(first)
    assert absent not in listed
    assert "blocks.1" not in listed


def test_near_classes_are_owners_of_weights_first():
    model = Parts(norm=nn.LayerNorm(16), body=nn.Linear(16, 16), embed=nn.Embedding(9, 16))
    with pytest.raises(ValueError, match=r"Modules with parameters: Names: Linear, Embedding, LayerNorm\."):
        partition_parameters(model, [ParameterRule(module_type="Conv2d", group="other")])
