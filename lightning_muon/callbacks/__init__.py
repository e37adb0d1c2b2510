"""Callbacks that show what the optimizer does to the matrices of a module."""

from lightning_muon.callbacks.partition_summary import PartitionSummary

__all__ = ["PartitionSummary"]
