"""Pure, batched functions of matrices (..., m, n)."""

from lightning_muon.linalg.balance import BalanceOrder, balance
from lightning_muon.linalg.orthogonalize import ORTHOGONALIZATION_METHODS, OrthogonalizationMethod, orthogonalize
from lightning_muon.linalg.spectral import (
    Spectra,
    condition_number,
    effective_rank,
    estimate_spectra,
    exact_spectra,
    lanczos,
    orthogonality_error,
    participation_ratio,
    singular_values,
    spectral_norm,
    stable_rank,
)
from lightning_muon.linalg.whitening import whiten

__all__ = [
    "ORTHOGONALIZATION_METHODS",
    "BalanceOrder",
    "OrthogonalizationMethod",
    "Spectra",
    "balance",
    "condition_number",
    "effective_rank",
    "estimate_spectra",
    "exact_spectra",
    "lanczos",
    "orthogonality_error",
    "orthogonalize",
    "participation_ratio",
    "singular_values",
    "spectral_norm",
    "stable_rank",
    "whiten",
]
