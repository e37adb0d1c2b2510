"""Ranks and metrics against torchmetrics.retrieval, which stores and sorts all scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG, RetrievalRecall

from examples.recsys.metrics import NDCG, Recall, ndcg_at_k, recall_at_k, target_ranks
from tests.distributed import processes

USERS, ITEMS = 40, 30


@pytest.fixture
def scores(generator: torch.Generator) -> Tensor:
    return torch.randn(USERS, ITEMS, generator=generator)


@pytest.fixture
def targets(generator: torch.Generator) -> Tensor:
    return torch.randint(ITEMS, (USERS,), generator=generator)


def retrieval(metric: type, k: int, scores: Tensor, targets: Tensor, kept: Tensor | None = None) -> float:
    """The value of torchmetrics over the columns ``kept`` (B, N)."""
    kept = torch.ones_like(scores, dtype=torch.bool) if kept is None else kept
    relevant = torch.nn.functional.one_hot(targets, scores.shape[1]).bool()
    users = torch.arange(len(scores))[:, None].expand_as(scores)
    # RetrievalRecall takes a score of zero or less for "not retrieved".
    return float(metric(top_k=k)(scores.sigmoid()[kept], relevant[kept], indexes=users[kept]))


def ours(metric: type, k: int, ranks: Tensor) -> float:
    accumulated = metric(k)
    for part in ranks.split(7):
        accumulated.update(part)
    return float(accumulated.compute())


PAIRS = [(NDCG, RetrievalNormalizedDCG), (Recall, RetrievalRecall), (Recall, RetrievalHitRate)]


@pytest.mark.parametrize("k", [1, 5, 10, ITEMS])
@pytest.mark.parametrize(("metric", "oracle"), PAIRS)
def test_equals_torchmetrics(metric, oracle, k, scores, targets):
    assert ours(metric, k, target_ranks(scores, targets)) == pytest.approx(retrieval(oracle, k, scores, targets))


@pytest.mark.parametrize(("metric", "oracle"), PAIRS)
def test_masked_history_equals_a_catalogue_without_it(metric, oracle, scores, targets, generator):
    lengths = torch.randint(0, 12, (USERS, 1), generator=generator)
    seen = torch.rand(USERS, ITEMS, generator=generator).argsort(1)[:, :12]
    seen = seen.masked_fill((torch.arange(12) >= lengths) | (seen == targets[:, None]), -1)
    kept = torch.ones(USERS, ITEMS + 1, dtype=torch.bool).scatter_(1, seen.where(seen >= 0, ITEMS), False)[:, :ITEMS]
    value = ours(metric, 5, target_ranks(scores, targets, exclude=seen))
    assert value == pytest.approx(retrieval(oracle, 5, scores, targets, kept))
    assert value > ours(metric, 5, target_ranks(scores, targets))


@pytest.mark.parametrize(("metric", "oracle"), PAIRS)
def test_ties_count_against_the_model(metric, oracle, scores, targets):
    tied = (scores * 2).round()
    lowered = tied.scatter_add(1, targets[:, None], torch.full((USERS, 1), -0.25))
    assert ours(metric, 5, target_ranks(tied, targets)) == pytest.approx(retrieval(oracle, 5, lowered, targets))
    constant = target_ranks(torch.zeros(USERS, ITEMS), targets)
    assert constant.unique().tolist() == [ITEMS]


def test_nan_scores_count_against_the_model():
    scores = torch.tensor([[torch.nan, 1.0, 0.0], [torch.nan, 1.0, 0.0]])
    assert target_ranks(scores, torch.tensor([0, 1])).tolist() == [3, 2]


def test_a_target_in_the_history_is_still_ranked():
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    assert target_ranks(scores, torch.tensor([1]), exclude=torch.tensor([[0, 1]])).tolist() == [1]


def test_values_by_hand():
    ranks = torch.tensor([1, 3, 11])
    assert recall_at_k(ranks, 10).tolist() == [1.0, 1.0, 0.0]
    assert ndcg_at_k(ranks, 10).tolist() == [1.0, 0.5, 0.0]


def test_mean_weighs_samples_not_batches():
    metric = Recall(1)
    metric.update(torch.tensor([1]))
    metric.update(torch.tensor([2, 2, 2]))
    assert metric.compute() == 0.25
    metric.reset()
    metric.update(torch.tensor([2]))
    assert metric.compute() == 0.0


@pytest.mark.parametrize(
    ("scores", "targets", "exclude", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), None, r"targets \(B,\), got \(2, 3\) and \(3,\)"),
        (
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            None,
            "targets must hold columns from 0 to 2, got values from 0 to 3",
        ),
        (torch.zeros(2, 3), torch.tensor([0, -1]), None, "targets must hold columns from 0 to 2, got values from -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([[5], [0]]), "exclude must hold columns from -1 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([[1]]), r"exclude must be \(2, S\)"),
    ],
)
def test_bad_input_gets_a_sentence(scores, targets, exclude, message):
    with pytest.raises(ValueError, match=message):
        target_ranks(scores, targets, exclude)


def test_k_below_one_gets_a_sentence():
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        NDCG(0)


@pytest.mark.distributed
def test_two_processes_with_uneven_shares_give_the_value_of_one(tmp_path: Path):
    ranks = torch.tensor([1, 2, 30, 4, 11])
    values = processes.run({"shared": share_ranks}, tmp_path, args=(ranks,))["shared"]
    expected = [ours(NDCG, 10, ranks), ours(Recall, 10, ranks)]
    assert values[0] == pytest.approx(expected)
    assert values[1] == pytest.approx(expected)


def share_ranks(rank: int, ranks: Tensor) -> list[float]:
    """Run one of two processes, with 4 ranks in the first and 1 in the second."""
    metrics = [NDCG(10), Recall(10)]
    for metric in metrics:
        metric.update(ranks[:4] if rank == 0 else ranks[4:])
    return [float(metric.compute()) for metric in metrics]
