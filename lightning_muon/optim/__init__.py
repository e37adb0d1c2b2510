"""Optimizers for matrices, and the hybrid that puts them beside any other."""

from lightning_muon.optim.hybrid import HybridOptimizer
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.muon import Muon

__all__ = ["HybridOptimizer", "MatrixOptimizer", "Muon"]
