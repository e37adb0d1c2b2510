"""Both forms of SASRec against their equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from examples.recsys.models import PaperSASRec, SASRec

NUM_ITEMS = 30
HISTORIES = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 30], [7], [8, 2, 8, 1], [11, 12]]
HISTORY = nn.utils.rnn.pad_sequence([torch.tensor(items) for items in HISTORIES], batch_first=True)

Weights = dict[str, Tensor]
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture
def randomise(generator) -> Callable[[nn.Module], nn.Module]:
    """Moves all weights, biases and gains far from their initial values, so that zeros, ones and rounding hide none."""

    def moved(model: nn.Module) -> nn.Module:
        model = model.double().eval()
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm.weight" in name else 0.0
            parameter.data = mean + 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    return moved


def detached(model: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def normalise(weights: Weights, name: str, x: Tensor) -> Tensor:
    deviation = x - x.mean()
    unit = deviation / torch.sqrt((deviation**2).mean() + 1e-5)
    return weights[f"{name}.weight"] * unit + weights[f"{name}.bias"]


def embed(weights: Weights, items: list[int]) -> list[Tensor]:
    embedding, positions = weights["embedding.items.weight"], weights["embedding.positions.weight"]
    return [embedding[item] + positions[place] for place, item in enumerate(items)]


def attend(weights: Weights, queries: list[Tensor], inputs: list[Tensor], num_heads: int) -> list[Tensor]:
    """For each position the mean of the values up to it, weighted by softmax(q k / sqrt(width of a head))."""
    width, attended = len(queries[0]) // num_heads, []
    for place, query in enumerate(queries):
        heads = []
        for head in range(num_heads):
            own = slice(head * width, (head + 1) * width)
            q = linear(weights, "query", query)[own]
            total, mean = 0.0, torch.zeros(width, dtype=torch.float64)
            for x in inputs[: place + 1]:
                weight = math.exp(float(q @ linear(weights, "key", x)[own]) / math.sqrt(width))
                total += weight
                mean += weight * linear(weights, "value", x)[own]
            heads.append(mean / total)
        attended.append(torch.cat(heads))
    return attended


def gelu(x: Tensor) -> Tensor:
    return torch.tensor([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x.tolist()], dtype=torch.float64)


def reference_states(model: SASRec, items: list[int], num_blocks: int, num_heads: int) -> Tensor:
    """``x += attention(LN(x))`` and ``x += ffn(LN(x))`` in each block, and a final LN."""
    weights = detached(model)
    states = embed(weights, items)
    for number in range(num_blocks):
        own = below(weights, f"blocks.{number}.")
        inputs = [normalise(own, "attention_norm", x) for x in states]
        attended = attend(below(own, "attention."), inputs, inputs, num_heads)
        states = [x + linear(own, "attention.output", more) for x, more in zip(states, attended, strict=True)]
        inputs = [normalise(own, "ffn_norm", x) for x in states]
        states = [x + linear(own, "ffn.2", gelu(linear(own, "ffn.0", y))) for x, y in zip(states, inputs, strict=True)]
    return torch.stack([normalise(weights, "norm", x) for x in states])


def reference_paper_states(model: PaperSASRec, items: list[int]) -> Tensor:
    """q from LN(x), k and v from x; each half adds to its normalized input; LN twice at the end."""
    weights = detached(model)
    inputs = embed(weights, items)
    queries = [normalise(weights, "attention_norm", x) for x in inputs]
    states = []
    for query, more in zip(queries, attend(below(weights, "attention."), queries, inputs, num_heads=1), strict=True):
        x = normalise(weights, "ffn_norm", query + more)
        hidden = linear(weights, "ffn.0", x).clamp(min=0)
        x = normalise(weights, "block_norm", x + linear(weights, "ffn.2", hidden))
        states.append(normalise(weights, "norm", x))
    return torch.stack(states)


class TestEquations:
    """For the states at every position, and the scores after the last one."""

    @pytest.mark.parametrize(("num_blocks", "num_heads"), [(2, 2), (1, 1), (3, 4)])
    def test_of_the_modern_form(self, randomise, num_blocks, num_heads):
        sizes = {"hidden_size": 8, "num_blocks": num_blocks, "num_heads": num_heads, "ffn_size": 12}
        model = randomise(SASRec(NUM_ITEMS, max_length=12, **sizes))
        states = [reference_states(model, items, num_blocks, num_heads) for items in HISTORIES]
        assert_close(model.encode(HISTORY), torch.cat(states))
        items = detached(model)["embedding.items.weight"][1:]
        assert_close(model(HISTORY), torch.stack([items @ own[-1] for own in states]))

    def test_of_the_form_of_the_study(self, randomise):
        model = randomise(PaperSASRec(NUM_ITEMS, hidden_size=8))
        states = [reference_paper_states(model, items) for items in HISTORIES]
        assert_close(model.encode(HISTORY), torch.cat(states))
        assert_close(model(HISTORY), torch.stack([linear(detached(model), "head", own[-1]) for own in states]))
