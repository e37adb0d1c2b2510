"""Two ways to make equal codes unique: one more code, or another last code."""

from __future__ import annotations

import torch
from torch import Tensor


def add_collision_digit(codes: Tensor) -> Tensor:
    """Add a level that numbers items with the same codes, in the order of the items (arXiv 2305.05065).

    (N, levels) -> (N, levels + 1), all rows different. The digit is 0 for the first item with its codes. The largest
    digit is one less than the number of items with the same codes, which may be more than a level has codes. Then a
    recommender's vocabulary has that many codes at every level.

    Example::

        >>> add_collision_digit(torch.tensor([[3, 1], [0, 2], [3, 1]])).tolist()
        [[3, 1, 0], [0, 2, 0], [3, 1, 1]]
    """
    _, group, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    digits = torch.empty_like(group)
    digits[order] = torch.arange(len(codes), device=codes.device) - starts
    return torch.cat([codes, digits[:, None]], dim=1)


def balance_last_level(
    codes: Tensor, distances: Tensor, temperature: float = 0.05, max_iterations: int = 200
) -> Tensor:
    """Give items that share all codes another last code by optimal transport (after LC-Rec, arXiv 2311.09049).

    If items collide, all items with the same codes before the last get new last codes. Each item sends a mass of 1 to
    the codes, and no code receives more than 1. :func:`transport_plan` gives the plan of least cost with an entropic
    term. Then pairs of item and code are chosen in descending order of mass, each item and each code once. LC-Rec
    requires the same mass in every code instead, which also moves items that do not collide.

    Args:
        codes: (N, levels).
        distances: (N, K) cost of each code of the last level for each item.
        temperature: weight of the entropic term, in units of the mean distance in a group. A smaller one is closer to
            the plan of least cost, and takes more iterations.
        max_iterations: iterations of Sinkhorn's algorithm.

    Returns:
        Codes (N, levels), all rows different.

    Raises:
        ValueError: if the shapes do not match, or more items have the same codes before the last than the last level
            has codes.

    Example::

        >>> balance_last_level(torch.tensor([[7, 0], [7, 0]]), torch.tensor([[0.1, 0.3], [0.1, 2.0]])).tolist()
        [[7, 1], [7, 0]]
    """
    if len(distances) != len(codes) or distances.ndim != 2 or codes.ndim != 2:
        raise ValueError(
            f"codes must be (N, levels) and distances (N, K), got {tuple(codes.shape)} and {tuple(distances.shape)}."
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    balanced = codes.clone()
    for items in _groups_that_collide(codes):
        if len(items) > distances.shape[1]:
            prefix = ", ".join(map(str, codes[items[0], :-1].tolist()))
            raise ValueError(
                f"{len(items)} items have ({prefix}) as codes before the last, but the last level has only "
                f"{distances.shape[1]} codes to tell them apart: add a collision digit instead, or use more codes or "
                "levels."
            )
        plan = transport_plan(distances[items], temperature, max_iterations)
        balanced[items, -1] = _one_to_one(plan).to(codes)
    return balanced


def transport_plan(distances: Tensor, temperature: float, max_iterations: int = 200) -> Tensor:
    """The plan ``P`` of least ``sum P * distances - t * entropy(P)`` whose rows sum to 1 and columns to 1 at most.

    With costs divided by their mean, ``P = diag(u) exp(-distances / temperature) diag(v)``. In turn ``u`` makes the
    rows sum to 1 and ``v <= 1`` scales down the columns that sum to more, in logarithms.

    (n, K) with n <= K -> (n, K) float64. Rows sum to 1 exactly, columns up to the error after ``max_iterations``.
    """
    costs = distances.double()
    kernel = -costs / (temperature * costs.mean().clamp(min=torch.finfo(torch.float64).tiny))
    log_v = kernel.new_zeros(kernel.shape[1])
    for _ in range(max_iterations):
        log_u = -(kernel + log_v).logsumexp(1)
        before = log_v
        log_v = -(kernel + log_u[:, None]).logsumexp(0).clamp(min=0.0)
        if torch.allclose(log_v, before, rtol=0.0, atol=1e-6):
            break
    log_u = -(kernel + log_v).logsumexp(1)
    return (kernel + log_u[:, None] + log_v).exp()


def _groups_that_collide(codes: Tensor) -> list[Tensor]:
    """The items of each group with equal codes before the last in which two items also have the same last code."""
    _, twins, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    prefixes = codes.clone()
    prefixes[:, -1] = 0
    _, group = prefixes.unique(dim=0, return_inverse=True)
    collide = torch.zeros(int(group.max()) + 1, dtype=torch.bool, device=codes.device)
    collide[group[counts[twins] > 1]] = True
    order = group.argsort(stable=True)
    parts = order.split(group.bincount().tolist())
    return [part for part, wanted in zip(parts, collide.tolist(), strict=True) if wanted]


def _one_to_one(plan: Tensor) -> Tensor:
    """Choose a different code for each row, pairs of largest mass first: (n, K) -> (n,)."""
    plan = plan.clone()
    chosen = torch.empty(len(plan), dtype=torch.long, device=plan.device)
    for _ in range(len(plan)):
        row, code = divmod(int(plan.argmax()), plan.shape[1])
        chosen[row] = code
        plan[row] = plan[:, code] = -1.0
    return chosen
