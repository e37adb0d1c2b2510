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
        # QDWH brings singular values to 1 from wherever they are: what rounding leaves in a null space goes up too.
        Case(low_rank=5e-5),
        Case({"order": "polar_first", "momentum": 0.8}, low_rank=1.5e-4),
        Case({"method": "svd"}),
        Case({"method": "jordan", "momentum": 0.9}),
        Case({"order": "polar_first", "method": "polar_express", "steps": 8}, low_rank=5e-4),  # more than 5 steps
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        if options["order"] == "momentum_first":
            averaged = momentum(grad, state, options)
            polar = orthogonalize(averaged, options)
            return (averaged * polar).sum() * polar
        polar = orthogonalize(grad, options)
        return (grad * polar).sum() * momentum(polar, state, options)
