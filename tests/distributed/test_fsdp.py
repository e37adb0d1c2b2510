"""Parameters sharded by FSDP2: matrix optimizers need whole matrices and refuse shards before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from lightning_muon.optim import HybridOptimizer, Muon
from tests.distributed import processes

pytestmark = pytest.mark.distributed


def sharded() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return net


def message(make: Any) -> str:
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank: int) -> list[str]:
    net = sharded()
    return [
        message(lambda: Muon(net.named_parameters())),
        message(lambda: HybridOptimizer.from_module(net)),
        message(lambda: HybridOptimizer({"matrix": AdamW(net.parameters())}) and None),
    ]


def elementwise(rank: int) -> list[torch.Tensor]:
    net = sharded()
    optimizer = HybridOptimizer({"other": AdamW(net.named_parameters(), lr=0.01)})
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [param.full_tensor().detach() for param in net.parameters()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return processes.run({"errors": errors, "elementwise": elementwise}, tmp_path_factory.mktemp("fsdp"))


def test_sharded_matrices_are_refused_with_the_mend(ranks: Any) -> None:
    for muon, hybrid, other in ranks["errors"]:
        for text in (muon, hybrid):
            assert text.startswith(("TypeError", "ValueError"))
            assert "DTensor" in text
            assert "0.weight" in text
            assert "DDP" in text
        assert other == "no error"


def test_hybrid_of_elementwise_optimizers_takes_shards(ranks: Any) -> None:
    first, second = ranks["elementwise"]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    optimizer = AdamW(net.parameters(), lr=0.01)
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for one, two, alone in zip(first, second, net.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, alone.detach(), rtol=0, atol=1e-5)
