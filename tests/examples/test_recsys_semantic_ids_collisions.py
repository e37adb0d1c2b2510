"""Making equal codes unique."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from examples.recsys.semantic_ids.collisions import add_collision_digit, balance_last_level, transport_plan


def test_the_digit_counts_equal_tuples_in_the_order_of_the_items():
    codes = torch.randint(3, (200, 3))
    digits = add_collision_digit(codes)
    seen: dict[tuple[int, ...], int] = {}
    for row, extended in zip(codes.tolist(), digits.tolist(), strict=True):
        count = seen.get(tuple(row), 0)
        assert extended == [*row, count]
        seen[tuple(row)] = count + 1
    assert len(digits.unique(dim=0)) == 200


def test_the_digit_is_zero_where_codes_are_unique():
    assert add_collision_digit(torch.tensor([[2, 1], [1, 2], [0, 0]])).tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]


class TestBalance:
    @pytest.mark.parametrize("seed", range(8))
    def test_the_cost_is_near_the_least_of_all_assignments(self, seed):
        torch.manual_seed(seed)
        distances = torch.rand(5, 6)
        balanced = balance_last_level(torch.zeros(5, 2, dtype=torch.long), distances, temperature=0.01)
        cost = sum(float(distances[item, code]) for item, code in enumerate(balanced[:, 1].tolist()))
        least = min(sum(float(distances[i, c]) for i, c in enumerate(p)) for p in permutations(range(6), 5))
        assert len(set(balanced[:, 1].tolist())) == 5
        assert cost <= 1.05 * least

    def test_only_groups_that_collide_change(self):
        codes = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 1], [1, 0], [2, 2]])
        distances = torch.rand(6, 3)
        balanced = balance_last_level(codes, distances)
        assert balanced[3:].tolist() == codes[3:].tolist()
        assert balanced[:, 0].tolist() == codes[:, 0].tolist()
        assert sorted(balanced[:3, 1].tolist()) == [0, 1, 2]

    def test_as_many_equal_items_as_codes_share_them_all(self):
        codes = torch.full((16, 1), 3)
        distances = torch.rand(16).expand(16, 16)
        assert sorted(balance_last_level(codes, distances).flatten().tolist()) == list(range(16))

    def test_items_at_their_code_cost_nothing(self):
        distances = torch.zeros(3, 4)
        assert len(balance_last_level(torch.tensor([[1, 2]] * 3), distances).unique(dim=0)) == 3

    def test_more_equal_items_than_codes_get_a_sentence(self):
        codes = torch.tensor([[5, 0, 1]] * 4 + [[5, 1, 1]])
        with pytest.raises(ValueError, match=r"4 items have \(5, 0\) as codes before the last.*only 3 codes.*digit"):
            balance_last_level(codes, torch.rand(5, 3))

    @pytest.mark.parametrize(
        ("distances", "arguments", "message"),
        [
            (torch.rand(2, 3), {}, r"got \(3, 2\) and \(2, 3\)"),
            (torch.rand(3, 3), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ],
    )
    def test_bad_input_gets_a_sentence(self, distances, arguments, message):
        with pytest.raises(ValueError, match=message):
            balance_last_level(torch.tensor([[1, 2]] * 3), distances, **arguments)


def reference_plan(distances: list[list[float]], temperature: float) -> torch.Tensor:
    """Sinkhorn's algorithm in plain Python: rows to 1, then columns down to 1, many times."""
    mean = sum(map(sum, distances)) / sum(map(len, distances))
    plan = torch.tensor([[-d / (temperature * mean) for d in row] for row in distances], dtype=torch.float64).exp()
    v = torch.ones(plan.shape[1], dtype=torch.float64)
    for _ in range(5000):
        u = [1 / sum(float(k * w) for k, w in zip(row, v, strict=True)) for row in plan]
        columns = [sum(a * float(row[j]) for a, row in zip(u, plan, strict=True)) for j in range(len(v))]
        v = torch.tensor([min(1.0, 1 / column) for column in columns], dtype=torch.float64)
    return torch.tensor(u, dtype=torch.float64)[:, None] * plan * v


def test_the_plan_is_that_of_the_loops_and_meets_its_constraints():
    distances = torch.rand(3, 4)
    distances[:, 1] *= 0.1  # all want the same code
    plan = transport_plan(distances, temperature=0.3, max_iterations=5000)
    torch.testing.assert_close(plan, reference_plan(distances.tolist(), 0.3), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.ones(3, dtype=torch.float64))
    assert plan.sum(0).max() < 1 + 1e-4
    assert plan[:, 1].sum() > 0.99
