"""RQ-k-means: semantic ids by k-means on features, then on what it left, and so on; nothing is trained by gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.recsys.semantic_ids.quantization import CHUNK


def residual_kmeans(
    features: Tensor, levels: int, codebook_size: int, max_iterations: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantize rows by a sum of ``levels`` centroids.

    With ``r_1 = x``, level l runs k-means on all ``r_l``, gives each row the number ``c_l`` of its nearest centroid
    ``e_l`` and hands ``r_{l+1} = r_l - e_l[c_l]`` on.

    Args:
        features: (N, D), one row an item; N of ``codebook_size`` or more.
        levels: how many codes a row gets.
        codebook_size: centroids a level. Where a level has fewer distinct rows, some are never used.
        max_iterations: of Lloyd's algorithm a level; it stops earlier where nothing changes any more.
        seed: decides the first centroids, whatever the global seed is.

    Returns:
        Codes (N, levels), int64, and centroids (levels, codebook_size, D), float32.

    Raises:
        ValueError: if a size is below 1, there are fewer rows than centroids, or a feature is not finite.
    """
    for name, value in (("levels", levels), ("codebook_size", codebook_size), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    if features.dim() != 2 or len(features) < codebook_size:
        raise ValueError(
            f"features must be (items, width) with at least codebook_size={codebook_size} items, got "
            f"{tuple(features.shape)}: choose a smaller codebook."
        )
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"The features of item {row + 1} are not finite: mend the file that they come from.")
    generator = torch.Generator().manual_seed(seed)
    residual = features.float()
    codes, codebooks = [], []
    for _ in range(levels):
        start = spread_centroids(residual, codebook_size, generator)
        centroids, nearest = lloyd(residual, start, max_iterations)
        residual = residual - centroids[nearest]
        codes.append(nearest)
        codebooks.append(centroids)
    return torch.stack(codes, dim=1), torch.stack(codebooks)


def spread_centroids(points: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """First centroids by k-means++: each is a row drawn by its squared distance to the nearest one so far.

    (N, D) -> (num_centroids, D). Where all rows are centroids already, the rest repeats some.
    """
    distances = torch.full((len(points),), torch.inf, device=points.device)
    weights = torch.ones(len(points))
    chosen = []
    for _ in range(num_centroids):
        row = int(torch.multinomial(weights, 1, generator=generator))
        chosen.append(row)
        distances = torch.minimum(distances, (points - points[row]).square().sum(1))
        weights = distances.cpu() if bool(distances.any()) else torch.ones(len(points))
    return points[chosen]


def lloyd(points: Tensor, centroids: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
    """Move each centroid to the mean of the rows nearest to it, until no row changes its centroid.

    A centroid without rows moves to the row that is farthest from its own.

    Args:
        points: (N, D).
        centroids: (K, D), where they start.
        max_iterations: how often they move at most.

    Returns:
        Centroids (K, D), and the nearest one of each row, (N,) int64.
    """
    nearest, distances = assign(points, centroids)
    for _ in range(max_iterations):
        counts = torch.bincount(nearest, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        centroids[empty] = points[distances.topk(len(empty)).indices]
        before = nearest
        nearest, distances = assign(points, centroids)
        if torch.equal(nearest, before):
            break
    return centroids, nearest


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centroid and the squared distance to it: (N, D), (K, D) -> (N,) int64, (N,)."""
    norms = centroids.square().sum(1)
    nearest = torch.cat([(norms - 2 * (chunk @ centroids.T)).argmin(1) for chunk in points.split(CHUNK)])
    return nearest, (points - centroids[nearest]).square().sum(1)
