"""Callbacks for the Lightning Trainer."""

from lightning_muon.callbacks.create_graph import CreateGraph
from lightning_muon.callbacks.optimizer_modes import OptimizerModes
from lightning_muon.callbacks.partition_summary import PartitionSummary

__all__ = ["CreateGraph", "OptimizerModes", "PartitionSummary"]
