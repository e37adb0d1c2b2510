"""Tensors that a layer's weight is made of: matrices where that is a scale, a sum or a mask; else other, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_muon.partition import partition_parameters


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Skew(nn.Module):
    def forward(self, x):
        return x.triu(1) - x.triu(1).mT


class LoRAParametrization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 16)), nn.Parameter(torch.zeros(16, 2))

    def forward(self, x):
        return x + self.lora_B @ self.lora_A


class PruningMask(nn.Module):
    def forward(self, x):
        return x * (x.abs() > 0.1)


def with_parametrization(recipe: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", recipe)


def quiet(hook: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def hooked(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return hook(layer)

    return hooked


SAFE = {
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "weight norm by hooks": (quiet(nn.utils.weight_norm), "weight_v"),
    "spectral norm by hooks": (quiet(nn.utils.spectral_norm), "weight_orig"),
    "LoRA": (with_parametrization(LoRAParametrization()), "parametrizations.weight.original"),
    "a mask": (with_parametrization(PruningMask()), "parametrizations.weight.original"),
    "pruning by hooks": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_orig"),
}
OTHERS = {
    "orthogonal": (parametrizations.orthogonal, "_Orthogonal"),
    "symmetric": (with_parametrization(Symmetric()), f"{__name__}.Symmetric"),
    "skew-symmetric": (with_parametrization(Skew()), f"{__name__}.Skew"),
    "one of several": (
        lambda layer: with_parametrization(Skew())(parametrizations.spectral_norm(layer)),
        f"{__name__}.Skew",
    ),
}


def model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 3))


@pytest.mark.parametrize(("parametrized", "name"), SAFE.values(), ids=SAFE)
def test_matrices(parametrized, name):
    entry = partition_parameters(model(parametrized(nn.Linear(16, 16))))[f"1.{name}"]
    assert (entry.role, entry.group) == ("hidden", "matrix")
    assert "Weight of Linear" in entry.reason


@pytest.mark.parametrize(("parametrized", "path"), OTHERS.values(), ids=OTHERS)
def test_other_tensors(parametrized, path):
    entry = partition_parameters(model(parametrized(nn.Linear(16, 16))))["1.parametrizations.weight.original"]
    assert (entry.role, entry.group) == ("other", "other")
    assert entry.reason.startswith(
        f"{path} computes the weight of Linear from this tensor, so a step on the tensor is not a step on the weight."
    )


SAFE_NAMES = [
    "Mask",
    "MaskedWeight",
    "CausalMask",
    "CONVMask",
    "pruning_mask",
    "Pruned",
    "MagnitudePruner",
    "SparseMask",
    "FakeSparsity",
    "TopKSparsify",
    "FakeStructuredSparsity",
    "LoRA",
    "QLoRA",
    "LoraLayer",
    "LORA",
    "lora_parametrization",
    "WeightNorm",
    "WeightNorm2d",
    "weight_norm",
    "MyWeightNormalization",
    "SpectralNorm",
    "SpectralNormed",
]
UNSAFE_NAMES = [
    "Sparsemax",
    "SparseMax",
    "SparseCode",
    "MaskedSoftmax",
    "MaskedSoftMax",
    "MyMaskedSymmetric",
    "SymmetricLoRA",
    "Exploration",
    "Explorable",
    "Pruner2Simplex",
    "MaskedOrthogonal",
    "OrthonormalMask",
    "SkewMask",
    "MaskedCayley",
    "HouseHolderMask",
    "MaskedHouseholder",
    "PrunedExp",
    "MaskedMatrixExp",
    "Normalization",
    "Flora",
    "MaskSPD",
]


def recipe(name: str) -> nn.Module:
    return type(name, (nn.Module,), {"forward": lambda self, x: x})()


@pytest.mark.parametrize(("name", "role"), [(n, "hidden") for n in SAFE_NAMES] + [(n, "other") for n in UNSAFE_NAMES])
def test_words_of_the_class_tell_what_is_safe(name, role):
    module = model(with_parametrization(recipe(name))(nn.Linear(16, 16)))
    assert partition_parameters(module)["1.parametrizations.weight.original"].role == role


def test_words_of_a_base_count_for_and_against():
    class Masked(PruningMask):
        pass

    class Mine(Masked):
        pass

    class SymmetricOne(Symmetric):
        pass

    class MaskedTwice(SymmetricOne):
        pass

    for made, role in ((Mine, "hidden"), (MaskedTwice, "other")):
        module = model(with_parametrization(made())(nn.Linear(16, 16)))
        assert partition_parameters(module)["1.parametrizations.weight.original"].role == role


def test_sparsifiers_of_torch_mask():
    module = model(with_parametrization(FakeSparsity(torch.ones(16, 16)))(nn.Linear(16, 16)))
    assert partition_parameters(module)["1.parametrizations.weight.original"].group == "matrix"


def test_factors_of_lora_are_matrices():
    partition = partition_parameters(model(with_parametrization(LoRAParametrization())(nn.Linear(16, 16))))
    factors = [partition[f"1.parametrizations.weight.0.lora_{factor}"] for factor in "AB"]
    assert [entry.role for entry in factors] == ["hidden", "hidden"]


@pytest.mark.parametrize("layer", [nn.Embedding(9, 16), nn.Linear(16, 3)], ids=["embedding", "head"])
def test_parametrized_embeddings_and_heads_keep_their_roles(layer):
    module = nn.Sequential(nn.Linear(16, 16), parametrizations.orthogonal(layer))
    role = partition_parameters(module)["1.parametrizations.weight.original"].role
    assert role == ("embedding" if isinstance(layer, nn.Embedding) else "head")
