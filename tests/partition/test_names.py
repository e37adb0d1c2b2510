"""Names without the prefixes of wrappers, and near names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_muon.partition import ParameterRule, partition_parameters
from lightning_muon.partition.names import near_names


class Net(nn.Module):
    """A user's module with an attribute called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 16)
        self.out = nn.Linear(16, 4)


PLAIN = ["module.weight", "module.bias", "out.weight", "out.bias"]


def names(module: nn.Module) -> list[str]:
    return [entry.name for entry in partition_parameters(module)]


def test_an_attribute_called_module_keeps_its_name():
    assert names(Net()) == PLAIN


def test_compiled_modules():
    assert names(torch.compile(Net())) == PLAIN
    net = Net()
    net.module = torch.compile(net.module)
    assert names(net) == PLAIN


def test_activation_checkpointing():
    net = Net()
    net.module = checkpoint_wrapper(net.module)
    assert names(net) == PLAIN


def test_data_parallel_wrappers():
    assert names(nn.DataParallel(Net())) == PLAIN
    assert names(AveragedModel(Net())) == PLAIN
    assert names(nn.DataParallel(torch.compile(Net()))) == PLAIN


def test_fabric():
    """Fabric registers a module twice: forward and original."""
    fabric_module = pytest.importorskip("lightning.fabric.wrappers")._FabricModule
    partition = partition_parameters(fabric_module(Net(), None))
    assert [entry.name for entry in partition] == PLAIN
    assert all(entry.aliases == () for entry in partition)


def test_lightning_module():
    pl = pytest.importorskip("lightning.pytorch")

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"num_classes": 4})
            self.net = Net()

    partition = partition_parameters(Model())
    assert [entry.name for entry in partition] == [f"net.{name}" for name in PLAIN]
    assert partition["net.out.weight"].role == "head"


def test_rules_see_clean_names():
    rule = ParameterRule(pattern="module.weight", group="other")
    assert partition_parameters(torch.compile(Net()), [rule])["module.weight"].group == "other"


def test_names_follow_the_module_order():
    net = nn.Sequential(nn.LSTM(4, 4), Net(), nn.Embedding(3, 4))
    assert names(net) == [name for name, _ in net.named_parameters()]


def test_near_names():
    names = ["encoder.weight", "encoder.bias", "decoder.weight"]
    assert near_names("encoder.wieght", names).startswith("Near names: encoder.weight")
    assert near_names("zzz", names, limit=2) == "Names: encoder.weight, encoder.bias, ..."
    assert near_names("x", []) == "There are no names to choose from."
