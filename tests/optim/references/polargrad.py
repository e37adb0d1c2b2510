"""PolarGrad (arXiv 2505.21799)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tests.optim.references.common import Case, Reference, momentum, orthogonalize


class PolarGrad(Reference):
    """D = <M, U> U of U = polar(M); polar_first: D = <G, U> M of U = polar(G), M <- mu M + (1 - mu) U."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.0,
        "momentum": 0.95,
        "order": "momentum_first",
        "method": "qdwh",
        "steps": None,
    }
    cases = (
        # All but the SVD enlarge the rounding errors of low_rank.
        Case(float32=1e-4),
        Case({"order": "polar_first", "momentum": 0.8}, float32=2e-4),
        Case({"method": "svd"}),
        Case({"method": "jordan", "momentum": 0.9}, float32=5e-5),
        Case({"order": "polar_first", "method": "polar_express", "steps": 8}, float32=1e-3),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        if options["order"] == "momentum_first":
            averaged = momentum(grad, state, options)
            polar = orthogonalize(averaged, options)
            return (averaged * polar).sum() * polar
        polar = orthogonalize(grad, options)
        return (grad * polar).sum() * momentum(polar, state, options)
