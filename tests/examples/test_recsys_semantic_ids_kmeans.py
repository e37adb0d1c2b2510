"""RQ-k-means against slow loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.recsys.semantic_ids.kmeans import assign, lloyd, residual_kmeans, spread_centroids


def blobs(num_centers: int = 5, per_center: int = 12, width: int = 3, spread: float = 0.3) -> Tensor:
    centers = 4 * torch.randn(num_centers, width)
    return (centers[:, None] + spread * torch.randn(num_centers, per_center, width)).flatten(0, 1)


def nearest(point: list[float], centroids: list[list[float]]) -> int:
    distances = [sum((a - b) ** 2 for a, b in zip(point, centroid, strict=True)) for centroid in centroids]
    return distances.index(min(distances))


def reference_lloyd(points: Tensor, centroids: Tensor) -> tuple[list[list[float]], list[int]]:
    """Lloyd's algorithm, one point and one coordinate at a time; every centroid must keep points."""
    rows, means = points.double().tolist(), centroids.double().tolist()
    chosen = [nearest(row, means) for row in rows]
    while True:
        for number in range(len(means)):
            members = [row for row, choice in zip(rows, chosen, strict=True) if choice == number]
            assert members
            means[number] = [sum(column) / len(members) for column in zip(*members, strict=True)]
        before, chosen = chosen, [nearest(row, means) for row in rows]
        if chosen == before:
            return means, chosen


def test_lloyd_is_that_of_the_loops():
    points = blobs(spread=2.0)
    centroids, codes = lloyd(points, points[::15], max_iterations=100)
    expected_centroids, expected_codes = reference_lloyd(points, points[::15])
    assert codes.tolist() == expected_codes
    torch.testing.assert_close(centroids.double(), torch.tensor(expected_centroids, dtype=torch.float64))


def test_lloyd_stops_after_the_iterations_it_is_given():
    points = blobs(spread=2.0)
    start = points[:4]
    once, _ = lloyd(points, start, max_iterations=1)
    first, _ = assign(points, start)
    torch.testing.assert_close(once, torch.stack([points[first == number].mean(0) for number in range(4)]))


def test_a_centroid_that_runs_empty_takes_the_row_that_is_worst_off():
    points = torch.tensor([[0.0], [1.0], [2.0], [30.0]])
    centroids, codes = lloyd(points, torch.tensor([[1.0], [500.0]]), max_iterations=20)
    assert centroids.flatten().tolist() == [1.0, 30.0]
    assert codes.tolist() == [0, 0, 0, 1]


def test_first_centroids_are_rows_far_apart():
    """One row of each blob; uniformly drawn rows would almost never be."""
    points = blobs(num_centers=8, spread=0.01)
    hits = [
        len(
            {
                row // 12
                for row in assign(spread_centroids(points, 8, torch.Generator().manual_seed(s)), points)[0].tolist()
            }
        )
        for s in range(10)
    ]
    assert min(hits) >= 7
    assert sum(hits) >= 78


def test_levels_quantize_what_the_one_before_left():
    points = blobs(num_centers=6, per_center=20, spread=1.0)
    codes, codebooks = residual_kmeans(points, levels=3, codebook_size=4)
    assert (codes.dtype, codes.shape, codebooks.shape) == (torch.long, (120, 3), (3, 4, 3))
    left = points.double()
    for level in range(3):
        book = codebooks[level].double().tolist()
        assert codes[:, level].tolist() == [nearest(row, book) for row in left.tolist()]
        for number in range(4):
            members = left[codes[:, level] == number]
            torch.testing.assert_close(codebooks[level, number].double(), members.mean(0), atol=1e-5, rtol=1e-5)
        left = left - codebooks[level].double()[codes[:, level]]
    assert left.square().sum() < 0.2 * (points - points.mean(0)).square().sum()


def test_the_seed_decides_and_the_global_one_does_not():
    points = blobs(spread=2.0)
    torch.manual_seed(1)
    first, _ = residual_kmeans(points, 2, 8)
    torch.manual_seed(2)
    second, _ = residual_kmeans(points, 2, 8)
    other, _ = residual_kmeans(points, 2, 8, seed=3)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_fewer_distinct_rows_than_codes_leave_codes_unused():
    points = torch.tensor([[0.0, 1.0], [5.0, 1.0]]).repeat(6, 1)
    codes, codebooks = residual_kmeans(points, 2, 4)
    restored = sum(codebooks[level][codes[:, level]] for level in range(2))
    torch.testing.assert_close(restored, points)
    assert len(codes.unique(dim=0)) == 2


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (torch.zeros(5, 2), {"codebook_size": 6}, r"at least codebook_size=6 items, got \(5, 2\)"),
        (torch.zeros(5), {}, r"must be \(items, width\).*got \(5,\)"),
        (torch.zeros(5, 2), {"levels": 0}, "levels must be 1 or more, got 0"),
        (torch.tensor([[1.0], [2.0], [float("nan")]]), {}, "features of item 3 are not finite"),
    ],
)
def test_bad_input_gets_a_sentence(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        residual_kmeans(features, **{"levels": 2, "codebook_size": 2, **arguments})
