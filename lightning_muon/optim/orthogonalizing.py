"""OrthogonalizingOptimizer: the base class of the rules that orthogonalize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muon.linalg import orthogonalize
from lightning_muon.linalg.orthogonalize import check_orthogonalization
from lightning_muon.optim.arguments import check_dtype
from lightning_muon.optim.momentum import MomentumOptimizer


class OrthogonalizingOptimizer(MomentumOptimizer):
    """Base class of Muon and its variants: rules that orthogonalize the momentum, or a function of it.

    The options of the orthogonalization are ``method``, ``steps`` and ``orthogonalize_dtype``. The defaults of a rule
    include all three, or none. Arguments and errors are those of :class:`MatrixOptimizer`.
    """

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if "method" in group:
            check_orthogonalization(group["method"], group["steps"], None)
            check_dtype(group, "orthogonalize_dtype")

    def orthogonalize(self, matrices: Tensor, group: dict[str, Any], overwrite: bool = True) -> Tensor:
        """Call :func:`~lightning_muon.linalg.orthogonalize` with the options of a group, or with its defaults.

        Args:
            matrices: (B, m, n).
            group: the options of the param group.
            overwrite: whether ``matrices`` may be overwritten.
        """
        name = group.get("orthogonalize_dtype")
        dtype = None if name is None else getattr(torch, name)
        method = group.get("method", "jordan")
        return orthogonalize(matrices, method, group.get("steps"), dtype, overwrite=overwrite)
