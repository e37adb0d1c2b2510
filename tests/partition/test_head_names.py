"""Heads of forecasting libraries by their standard names, in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from torch import nn

from tests.partition.modules import Parts, mlp, roles


def heads(module: nn.Module) -> set[str]:
    return {name.removesuffix(".weight") for name, role in roles(module).items() if role == "head"}


DISTRIBUTIONS = [
    "args_proj",  # gluonts
    "param_proj",
    "parameter_projection",  # transformers
    "distribution_projector",  # pytorch-forecasting
    "distr_output",  # neuralforecast
    "quantile_proj",
    "quantile_head",
    "likelihood_layer",
]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("first", [True, False])
def test_distribution_heads_wherever_they_are_registered(name, first):
    """One projection, one an argument of the distribution, or an MLP; registered before or behind the rest."""
    for part, ends in (
        (nn.Linear(32, 6), {name}),
        (Parts(proj=nn.ModuleList(nn.Linear(32, 4) for _ in range(3))), {f"{name}.proj.{i}" for i in range(3)}),
        (mlp(32, 16, 6), {f"{name}.2"}),
    ):
        body = {"rnn": nn.GRU(5, 32), "mix": nn.Linear(32, 32)}
        parts = {name: part, **body} if first else {**body, name: part}
        assert heads(Parts(**parts)) == ends


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_layer_with_such_a_name_that_another_follows_is_hidden(name):
    module = Parts(body=mlp(10, 32), **{name: nn.Linear(32, 16)}, rest=mlp(16, 24, 3))
    assert heads(module) == {"rest.2"}


def trend_block(**ends: nn.Module) -> nn.Module:
    return Parts(fc=mlp(24, 64, 64), **ends)


class TrendBasis(nn.Module):
    """A fixed basis, as in neuralforecast."""


BLOCKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "pytorch-forecasting, fixed bases": (
        lambda: trend_block(theta_b_fc=nn.Linear(64, 3), theta_f_fc=nn.Linear(64, 3)),
        {"theta_b_fc", "theta_f_fc"},
    ),
    "pytorch-forecasting, learned bases": (
        lambda: trend_block(theta_b_fc=nn.Linear(64, 3), backcast_fc=nn.Linear(3, 24), forecast_fc=nn.Linear(3, 6)),
        {"theta_b_fc", "backcast_fc", "forecast_fc"},
    ),
    "darts": (
        lambda: trend_block(
            backcast_linear_layer=nn.Linear(64, 5),
            forecast_linear_layer=nn.Linear(64, 5),
            backcast_g=nn.Linear(5, 24),
            forecast_g=nn.Linear(5, 6),
        ),
        {"backcast_linear_layer", "forecast_linear_layer", "backcast_g", "forecast_g"},
    ),
    "backcast_linear": (
        lambda: trend_block(backcast_linear=nn.Linear(64, 24), forecast_linear=nn.Linear(64, 6)),
        {"backcast_linear", "forecast_linear"},
    ),
    "theta_layer": (
        lambda: trend_block(basis_function=nn.Identity(), theta_layer=nn.Linear(64, 30)),
        {"theta_layer"},
    ),
    "basis_parameters": (
        lambda: trend_block(basis_parameters=nn.Linear(64, 30), basis=nn.Identity()),
        {"basis_parameters"},
    ),
    "neuralforecast, a basis behind the layers": (
        lambda: Parts(layers=mlp(24, 64, 64, 30), basis=nn.Identity()),
        {"layers.4"},
    ),
    "a basis by its class": (lambda: Parts(expand=TrendBasis(), layers=mlp(24, 64, 30)), {"layers.2"}),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("build", "ends"), BLOCKS.values(), ids=BLOCKS)
def test_basis_heads_of_every_block(build, ends, count):
    module = Parts(stacks=nn.ModuleList(nn.ModuleList([build()]) for _ in range(count)))
    assert heads(module) == {f"stacks.{block}.0.{end}" for block, end in itertools.product(range(count), ends)}


@pytest.mark.parametrize(
    "module",
    [
        Parts(theta_layer=nn.Linear(1, 32), phi_layer=nn.Linear(1, 32), body=mlp(64, 24), norm=nn.LayerNorm(24)),
        Parts(theta=nn.Linear(16, 8), phi=nn.Linear(16, 8), g=nn.Linear(16, 8), back=nn.Linear(8, 16)),
        Parts(basis=nn.Linear(16, 32), body=mlp(32, 16), norm=nn.LayerNorm(16)),
        Parts(forecast=nn.Linear(16, 16), norm=nn.LayerNorm(16)),
    ],
    ids=["angles", "non-local block", "features", "square"],
)
def test_such_names_elsewhere(module):
    """Angles as inputs, the embedded Gaussian of a non-local block, basis functions as features."""
    assert {"theta_layer", "theta", "phi", "g", "basis", "forecast"}.isdisjoint(heads(module))


def test_basis_heads_of_blocks_do_not_hide_the_head_of_the_model():
    module = Parts(blocks=nn.ModuleList(trend_block(backcast=nn.Linear(64, 24)) for _ in range(2)), fc=mlp(64, 48, 7))
    assert heads(module) == {"blocks.0.backcast", "blocks.1.backcast", "fc.2"}


def residual(fan_in: int, hidden: int, fan_out: int, norm: bool) -> nn.Module:
    """The residual block of TiDE: an MLP, a skip connection around it, perhaps a norm behind both."""
    parts = {"dense": mlp(fan_in, hidden, fan_out), "skip": nn.Linear(fan_in, fan_out)}
    return Parts(**parts, **({"layer_norm": nn.LayerNorm(fan_out)} if norm else {}))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("skip", ["lookback_skip", "global_skip"])
@pytest.mark.parametrize("width", [6, 18], ids=["as wide as an embedding", "wide"])
def test_both_paths_to_the_forecast_of_tide(norm, skip, width):
    """The temporal decoder with its skip connection, and the map of the lookback window; all else is hidden."""
    module = Parts(
        month=nn.Embedding(12, 6),
        encoders=nn.ModuleList([residual(30, 64, 64, norm)]),
        decoders=nn.ModuleList([residual(64, 64, 96, norm)]),
        temporal_decoder=residual(22, 32, 3, norm),
        **{skip: nn.Linear(24, width)},
    )
    assert heads(module) == {"temporal_decoder.dense.2", "temporal_decoder.skip", skip}
