"""Callbacks for the Lightning Trainer."""

from lightning_muon.callbacks.create_graph import CreateGraph
from lightning_muon.callbacks.effective_rank import EffectiveRankMonitor
from lightning_muon.callbacks.optimizer_modes import OptimizerModes
from lightning_muon.callbacks.partition_summary import PartitionSummary
from lightning_muon.callbacks.spectral_norm import SpectralNormMonitor
from lightning_muon.callbacks.update_orthogonality import UpdateOrthogonalityMonitor

__all__ = [
    "CreateGraph",
    "EffectiveRankMonitor",
    "OptimizerModes",
    "PartitionSummary",
    "SpectralNormMonitor",
    "UpdateOrthogonalityMonitor",
]
