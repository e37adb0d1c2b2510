"""Muon and its relatives for PyTorch Lightning: one mixin, one hybrid optimizer.

Names are imported on first use, so that ``lightning_muon.optim`` works without Lightning and does not import it.
"""

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NEED_LIGHTNING = {
    "MuonCLI": "cli",
    "MuonMixin": "mixin",
    "UseMuon": "use_muon",
    "configure_hybrid_optimizer": "configure",
}
_FOR_PARTITIONS = {"MatrixLayout", "ParameterRule", "Partition", "partition_parameters"}
_PACKAGES = {"callbacks", "diagnostics", "experimental", "linalg", "optim", "partition", "schedules"}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"lightning_muon.{name}")
    if name == "SpecMuon":
        warnings.warn(
            "lightning_muon.SpecMuon is experimental: import it as lightning_muon.experimental.SpecMuon. The old name, "
            "also in a class_path, will be removed.",
            FutureWarning,
            stacklevel=2,
        )
        return import_module("lightning_muon.experimental").SpecMuon
    if name not in __all__:
        raise AttributeError(f"module 'lightning_muon' has no attribute {name!r}")
    home = _NEED_LIGHTNING.get(name, "partition" if name in _FOR_PARTITIONS else "optim")
    value = getattr(import_module(f"lightning_muon.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES, *(name for name in globals() if name.startswith("__"))})
