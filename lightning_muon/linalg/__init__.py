"""Pure, batched functions of matrices (..., m, n)."""

from lightning_muon.linalg.balance import BalanceOrder, balance
from lightning_muon.linalg.orthogonalize import ORTHOGONALIZATION_METHODS, OrthogonalizationMethod, orthogonalize
from lightning_muon.linalg.whitening import whiten

__all__ = [
    "ORTHOGONALIZATION_METHODS",
    "BalanceOrder",
    "OrthogonalizationMethod",
    "balance",
    "orthogonalize",
    "whiten",
]
