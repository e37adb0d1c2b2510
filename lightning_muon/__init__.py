"""Muon and its relatives for PyTorch Lightning: one mixin, one hybrid optimizer."""

from importlib.metadata import PackageNotFoundError, version

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
    Muon,
    MuonHyperball,
    MuonNSR,
    MuonVS,
    Muown,
    NorMuon,
    PolarGrad,
    SinkGD,
    SpecMuon,
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
    "Muon",
    "MuonCLI",
    "MuonHyperball",
    "MuonMixin",
    "MuonNSR",
    "MuonVS",
    "Muown",
    "NorMuon",
    "ParameterRule",
    "Partition",
    "PolarGrad",
    "SinkGD",
    "SpecMuon",
    "SpectralSphere",
    "UseMuon",
    "WeightAwareOptimizer",
    "configure_hybrid_optimizer",
    "partition_parameters",
]
