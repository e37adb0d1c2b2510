"""Pure, batched functions of matrices (..., m, n)."""

from lightning_muon.linalg.orthogonalize import ORTHOGONALIZATION_METHODS, OrthogonalizationMethod, orthogonalize

__all__ = ["ORTHOGONALIZATION_METHODS", "OrthogonalizationMethod", "orthogonalize"]
