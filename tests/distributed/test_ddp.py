"""Two processes under DistributedDataParallel: ranks stay equal, and equal to one process on the joint batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lightning_muon.experimental import SpecMuon
from lightning_muon.optim import Conda, HybridOptimizer, MatrixOptimizer, Muon, Muown, NorMuon
from tests.distributed import processes

pytestmark = pytest.mark.distributed

STEPS = 8
RULES: dict[str, Callable[..., MatrixOptimizer]] = {
    "NorMuon": partial(NorMuon, lr=0.02, orthogonalize_dtype="float32"),
    "Muown": partial(Muown, lr=0.02, orthogonalize_dtype="float32"),
    "Conda": partial(Conda, lr=0.02, update_every=2),
}
MUON = partial(Muon, lr=0.02, orthogonalize_dtype="float32")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.LayerNorm(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.body(x + self.attention(x, x, x, need_weights=False)[0]))


def build(net: nn.Module, matrix: Callable[..., MatrixOptimizer] = MUON) -> HybridOptimizer:
    return HybridOptimizer.from_module(net, matrix=matrix, other=partial(AdamW, lr=0.003, eps=1e-4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(13, (8, 7), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(net: nn.Module, optimizer: HybridOptimizer, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        tokens, targets = (tensor[part] for tensor in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


def collect(net: nn.Module, optimizer: HybridOptimizer) -> dict[str, Any]:
    return {
        "names": [name for group in optimizer.param_groups for name in group["param_names"]],
        "weights": {name: param.detach().clone() for name, param in net.named_parameters()},
        "state": optimizer.state_dict(),
    }


def trained(rank: int, checkpoint: str) -> dict[str, Any]:
    net = Net()
    wrapped = DistributedDataParallel(net)
    optimizer = build(wrapped)
    train(wrapped, optimizer, range(STEPS), slice(rank * 4, rank * 4 + 4))
    return collect(net, optimizer)


def state_tensors(result: dict[str, Any]) -> list[Tensor]:
    return [
        value for entry in result["state"]["state"].values() for value in entry.values() if isinstance(value, Tensor)
    ]


def unequal(rank: int, checkpoint: str) -> dict[str, Any]:
    """A part of the net that no rank uses, and a matrix that is frozen."""
    net = Net()
    net.register_module("unused", nn.Linear(8, 8))
    net.attention.out_proj.weight.requires_grad_(False)
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = build(wrapped)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    train(wrapped, optimizer, range(3), slice(rank * 4, rank * 4 + 4))
    still = [name for name, param in net.named_parameters() if torch.equal(param, before[name])]
    return {**collect(net, optimizer), "still": still}


def resumed(rank: int, checkpoint: str) -> dict[str, Any]:
    loaded = torch.load(checkpoint, weights_only=True)
    net = Net()
    net.load_state_dict(loaded["weights"])
    wrapped = DistributedDataParallel(net)
    optimizer = build(wrapped)
    optimizer.load_state_dict(loaded["state"])
    train(wrapped, optimizer, range(STEPS, STEPS + 3), slice(rank * 4, rank * 4 + 4))
    return collect(net, optimizer)


def other_rules(rank: int, checkpoint: str) -> dict[str, Any]:
    results = {}
    for name, rule in RULES.items():
        net = Net()
        wrapped = DistributedDataParallel(net)
        optimizer = build(wrapped, rule)
        train(wrapped, optimizer, range(3), slice(rank * 4, rank * 4 + 4))
        results[name] = collect(net, optimizer)
    return results


def refused(rank: int, checkpoint: str) -> dict[str, Any]:
    """A rule that needs the loss, of which each rank has another."""
    net = Net()
    wrapped = DistributedDataParallel(net)
    optimizer = build(wrapped, partial(SpecMuon, lr=0.02))
    before = collect(net, optimizer)["weights"]
    tokens, targets = (tensor[rank * 4 : rank * 4 + 4] for tensor in batch(0))
    loss = nn.functional.cross_entropy(wrapped(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    try:
        optimizer.step(lambda: loss.detach())
    except RuntimeError as error:
        return {"message": str(error), "before": before, **collect(net, optimizer)}
    return {"message": "", "before": before, **collect(net, optimizer)}


@pytest.fixture(scope="module")
def alone() -> tuple[Net, HybridOptimizer, dict[str, Any]]:
    """One process on the whole batches."""
    net = Net()
    optimizer = build(net)
    train(net, optimizer, range(STEPS))
    return net, optimizer, copy.deepcopy(collect(net, optimizer))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, alone: Any) -> dict[str, list[dict[str, Any]]]:
    """All runs of two processes; processes are slow to start, so all in one."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.save({"weights": alone[0].state_dict(), "state": alone[2]["state"]}, folder / "checkpoint.pt")
    workers = {
        "trained": trained,
        "unequal": unequal,
        "resumed": resumed,
        "other_rules": other_rules,
        "refused": refused,
    }
    return processes.run(workers, folder, args=(str(folder / "checkpoint.pt"),))


def test_ddp_ranks_are_equal_and_equal_to_one_process(ranks: Any, alone: Any) -> None:
    """Fault 13."""
    first, second = ranks["trained"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for one, two in zip(state_tensors(first), state_tensors(second), strict=True):
        assert torch.equal(one, two)
    _, _, single = alone
    assert first["names"] == single["names"]
    start = dict(Net().named_parameters())
    for name, weight in single["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-4)
        assert not torch.equal(start[name], weight), name


@pytest.mark.parametrize("rule", RULES)
def test_other_rules_keep_ranks_equal(ranks: Any, rule: str) -> None:
    first, second = (result[rule] for result in ranks["other_rules"])
    start = dict(Net().named_parameters())
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        assert not torch.equal(start[name], weight), name
    assert len(state_tensors(first)) > len(start)
    for one, two in zip(state_tensors(first), state_tensors(second), strict=True):
        assert torch.equal(one, two)


def test_a_rule_that_needs_the_loss_is_refused(ranks: Any) -> None:
    """On every rank and before anything moves: with a loss of their own the ranks would drift apart unseen."""
    for result in ranks["refused"]:
        assert "2 processes" in result["message"]
        assert "Muon" in result["message"]
        for name, weight in result["before"].items():
            assert torch.equal(weight, result["weights"][name]), name


def test_ddp_with_missing_gradients_does_not_hang(ranks: Any) -> None:
    """Faults 10 and 11: a parameter without gradient neither moves nor blocks the others."""
    first, second = ranks["unequal"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert set(first["still"]) == {"unused.weight", "unused.bias", "attention.out_proj.weight"}


def test_checkpoint_of_one_process_resumes_under_ddp(ranks: Any, alone: Any) -> None:
    """The state is whole on every rank, so a checkpoint of any rank or world size fits any other."""
    net, optimizer = copy.deepcopy(alone[:2])
    train(net, optimizer, range(STEPS, STEPS + 3))
    first, second = ranks["resumed"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        torch.testing.assert_close(weight, net.get_parameter(name).detach(), rtol=0, atol=2e-4)
