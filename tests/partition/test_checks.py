"""Modules that no partition can serve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_muon.partition import ParameterRule, partition_parameters


def sparse_model() -> nn.Module:
    return nn.ModuleDict({"films": nn.Embedding(100, 8, sparse=True), "out": nn.Linear(8, 3)})


def test_sparse_embedding():
    with pytest.raises(ValueError, match=r"'films.weight' has sparse=True.*sparse=False.*pattern: 'films.weight'"):
        partition_parameters(sparse_model())


def test_sparse_embedding_confirmed_by_a_rule():
    partition = partition_parameters(sparse_model(), [ParameterRule(role="embedding", group="other")])
    assert partition["films.weight"].group == "other"


def test_frozen_sparse_embedding():
    model = sparse_model()
    model["films"].requires_grad_(False)
    assert partition_parameters(model)["films.weight"].frozen


def test_sparse_bag():
    with pytest.raises(ValueError, match="sparse=True"):
        partition_parameters(nn.EmbeddingBag(10, 4, sparse=True))


def test_complex_parameters():
    layer = nn.Linear(8, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'weight' is complex.*view_as_real.*group: other"):
        partition_parameters(layer)
    partition = partition_parameters(layer, [ParameterRule(pattern="*", group="other")])
    assert partition["weight"].group == "other"
    with pytest.raises(ValueError, match="complex"):
        partition_parameters(layer, [ParameterRule(pattern="weight", group="matrix")])


def test_lazy_parameters():
    with pytest.raises(ValueError, match=r"'weight' of a lazy module has no shape yet. Run one forward pass"):
        partition_parameters(nn.LazyLinear(4))


def test_fsdp1_by_its_type():
    """A stand-in of the same name: building the real one needs a process group."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = inner

    with pytest.raises(ValueError, match=r"FSDP1.*'encoder'.*strategy='ddp'"):
        partition_parameters(nn.ModuleDict({"encoder": FullyShardedDataParallel(nn.Linear(16, 4))}))


def test_fsdp1_flat_parameter():
    net = nn.ModuleDict({"out": nn.Linear(16, 4)})
    net["out"].weight._is_flat_param = True
    with pytest.raises(ValueError, match=r"'out.weight' is a flat shard.*strategy='ddp'"):
        partition_parameters(net)


def test_zero_3():
    net = nn.ModuleDict({"out": nn.Linear(16, 4)})
    net["out"].weight.ds_id = 3
    with pytest.raises(ValueError, match=r"ZeRO-3.*'out.weight'.*strategy='ddp'"):
        partition_parameters(net)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got list"):
        partition_parameters([nn.Parameter(torch.zeros(2, 2))])  # type: ignore[arg-type]
