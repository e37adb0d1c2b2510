"""Muon and its relatives for PyTorch Lightning: one mixin, one hybrid optimizer."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_muon.cli import MuonCLI
from lightning_muon.configure import configure_hybrid_optimizer
from lightning_muon.mixin import MuonMixin
from lightning_muon.optim import (
    NAMO,
    NAMOD,
    REG,
    SWAN,
    AdaMuon,
    Conda,
    Dion2,
    HybridOptimizer,
    MatrixOptimizer,
    MomentumOptimizer,
    Muon,
    MuonHyperball,
    MuonNSR,
    MuonVS,
    Muown,
    NorMuon,
    OrthogonalizingOptimizer,
    PolarGrad,
    SinkGD,
    SpectralSphere,
    WeightAwareOptimizer,
)
from lightning_muon.partition import MatrixLayout, ParameterRule, Partition, partition_parameters
from lightning_muon.use_muon import UseMuon

try:
    __version__ = version("lightning-muon")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "NAMO",
    "NAMOD",
    "REG",
    "SWAN",
    "AdaMuon",
    "Conda",
    "Dion2",
    "HybridOptimizer",
    "MatrixLayout",
    "MatrixOptimizer",
    "MomentumOptimizer",
    "Muon",
    "MuonCLI",
    "MuonHyperball",
    "MuonMixin",
    "MuonNSR",
    "MuonVS",
    "Muown",
    "NorMuon",
    "OrthogonalizingOptimizer",
    "ParameterRule",
    "Partition",
    "PolarGrad",
    "SinkGD",
    "SpectralSphere",
    "UseMuon",
    "WeightAwareOptimizer",
    "configure_hybrid_optimizer",
    "partition_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "SpecMuon":
        raise AttributeError(
            "lightning_muon.SpecMuon is experimental and has moved: it is lightning_muon.experimental.SpecMuon."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
