"""Beam search over the codes of a catalogue, against the scores of all its items by plain Python."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.recsys.data import SyntheticSequences
from examples.recsys.decoding import NextLogProbs, PrefixTree, beam_search, item_scores
from examples.recsys.metrics import target_ranks
from examples.recsys.models.generative import GenerativeRecommender
from examples.recsys.semantic_ids.codes import SemanticIds
from tests.lightning_helpers import QUIET

SHARED = Path(__file__).parents[2] / "../shared/data"

CATALOGUES = {
    "three levels": [[random.Random(i).randrange(6) for i in (n, n + 1_000, n + 2_000)] for n in range(80)],
    "one level": [[code] for code in (4, 0, 2, 5)],
    "one level, shared": [[4], [0], [4], [4], [5]],
    "five levels": [[random.Random(7 * n + i).randrange(3) for i in range(5)] for n in range(60)],
    "two nodes at first": [[5 * (n % 2), 3, n % 6, n // 6] for n in range(30)],
    "a single path": [[2, 2, n] for n in range(6)],
    "two items": [[0, 1], [1, 0]],
}
CODEBOOK_SIZE = 6

Prefix = tuple[int, ...]


class Model:
    """Random log-probabilities of the next code for every user and prefix, over more tokens than codes."""

    def __init__(self, users: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.users, self.seed, self.dtype = users, seed, dtype
        self.changed: dict[tuple[int, Prefix, int], float] = {}
        self.calls: list[tuple[int, ...]] = []

    def row(self, user: int, prefix: Prefix) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, user, prefix)) % 2**60)
        row = (3 * torch.randn(CODEBOOK_SIZE + 4, generator=generator)).log_softmax(0)[:CODEBOOK_SIZE]
        for (owner, beginning, code), value in self.changed.items():
            if (owner, beginning) == (user, prefix):
                row[code] = value
        return row.to(self.dtype)

    def __call__(self, prefixes: Tensor) -> Tensor:
        assert prefixes.dtype == torch.long
        self.calls.append(tuple(prefixes.shape))
        return torch.stack(
            [torch.stack([self.row(u, tuple(beam)) for beam in beams]) for u, beams in enumerate(prefixes.tolist())]
        )

    def item_score(self, user: int, codes: list[int]) -> float:
        return math.fsum(float(self.row(user, tuple(codes[:level]))[code]) for level, code in enumerate(codes))


def plain_beam_search(model: Model, user: int, codes: list[list[int]], num_beams: int) -> list[tuple[float, Prefix]]:
    """Beam search with a list of the best prefixes; returns scores and codes, best first."""
    beams: list[tuple[float, Prefix]] = [(0.0, ())]
    for level in range(len(codes[0])):
        beginnings = {tuple(item[: level + 1]) for item in codes}
        grown = [
            (score + float(model.row(user, prefix)[code]), (*prefix, code))
            for score, prefix in beams
            for code in range(CODEBOOK_SIZE)
            if (*prefix, code) in beginnings
        ]
        beams = sorted(grown, reverse=True)[:num_beams]
    return beams


def tree_of(codes: list[list[int]]) -> PrefixTree:
    return PrefixTree(torch.tensor(codes), CODEBOOK_SIZE)


@pytest.fixture(params=CATALOGUES.values(), ids=list(CATALOGUES))
def codes(request) -> list[list[int]]:
    return request.param


class TestPrefixTree:
    def test_nodes_are_the_beginnings_in_their_order(self, codes):
        tree = tree_of(codes)
        beginnings = [sorted({tuple(item[:depth]) for item in codes}) for depth in range(len(codes[0]) + 1)]
        assert [tree.num_nodes(depth) for depth in range(len(beginnings))] == [len(nodes) for nodes in beginnings]
        for level, (nodes, following) in enumerate(pairwise(beginnings)):
            table = tree.successors(level)
            assert (table.shape, table.dtype) == ((len(nodes), CODEBOOK_SIZE), torch.long)
            places = {prefix: place for place, prefix in enumerate(following)}
            expected = [[places.get((*prefix, code), -1) for code in range(CODEBOOK_SIZE)] for prefix in nodes]
            assert table.tolist() == expected
        assert tree.leaf_of_item.tolist() == [beginnings[-1].index(tuple(item)) for item in codes]

    def test_its_tables_move_with_it_and_stay_out_of_checkpoints(self, codes):
        tree = tree_of(codes)
        assert tree.state_dict() == {}
        assert list(tree.parameters()) == []
        moved = tree.to("meta")
        assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
        assert moved.leaf_of_item.device.type == moved.successors(0).device.type == "meta"

    def test_half_precision_leaves_the_tables_whole(self, codes):
        tree = tree_of(codes)
        expected = [tree.successors(level).clone() for level in range(len(codes[0]))]
        halved = tree.to(torch.bfloat16)
        assert all(torch.equal(halved.successors(level), table) for level, table in enumerate(expected))

    def test_tables_of_beauty_are_of_some_megabytes(self):
        if not SHARED.exists():
            pytest.skip("no ../shared/data")
        ids = SemanticIds.read(SHARED / "amazon2014/Beauty.sid.rqvae_llama7b.csv.gz", 12_101)
        tree = PrefixTree(ids.codes, ids.codebook_size)
        assert tree.num_nodes(4) == 12_101
        assert sum(buffer.nbytes for buffer in tree.buffers()) < 64e6


class TestBeamSearch:
    def test_enough_beams_give_all_items_their_scores_in_order(self, codes):
        model, tree = Model(), tree_of(codes)
        leaves, scores = beam_search(model, tree, batch_size=2, num_beams=len(codes) + 5)
        assert (leaves.dtype, scores.dtype) == (torch.long, torch.float32)
        distinct = sorted(set(map(tuple, codes)))
        for user in range(2):
            exact = {place: model.item_score(user, list(item)) for place, item in enumerate(distinct)}
            found = scores[user] > -math.inf
            assert int(found.sum()) == len(distinct)
            assert leaves[user][found].tolist() == sorted(exact, key=exact.get, reverse=True)
            assert scores[user][found].tolist() == pytest.approx(sorted(exact.values(), reverse=True), abs=1e-5)
        assert (scores.diff(dim=1)[scores[:, 1:] > -math.inf] <= 0).all()

    def test_exact_top_ten_with_as_many_beams_as_leaves(self):
        """Also with more items than leaves."""
        codes = CATALOGUES["three levels"] + CATALOGUES["three levels"][:20]
        model, tree = Model(users=3), tree_of(codes)
        leaves, scores = beam_search(model, tree, 3, tree.num_nodes(3))
        best = item_scores(leaves, scores, tree).topk(10).values
        for user in range(3):
            exact = sorted((model.item_score(user, item) for item in codes), reverse=True)[:10]
            assert best[user].tolist() == pytest.approx(exact, abs=1e-5)

    @pytest.mark.parametrize("num_beams", [1, 2, 3, 7, 20])
    def test_fewer_beams_find_what_a_list_of_beams_finds(self, codes, num_beams):
        model, tree = Model(seed=2), tree_of(codes)
        leaves, scores = beam_search(model, tree, batch_size=2, num_beams=num_beams)
        distinct = sorted(set(map(tuple, codes)))
        assert leaves.shape == scores.shape
        assert leaves.shape[0] == 2
        assert leaves.shape[1] <= num_beams
        for user in range(2):
            expected = plain_beam_search(model, user, codes, num_beams)
            found = scores[user] > -math.inf
            assert [distinct[leaf] for leaf in leaves[user][found].tolist()] == [prefix for _, prefix in expected]
            assert scores[user][found].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)

    def test_few_beams_miss_what_a_likelier_beginning_hides(self):
        """So the tests above do compare with an inexact search."""
        codes, model = CATALOGUES["three levels"], Model(seed=2)
        exact = max(codes, key=lambda item: model.item_score(0, item))
        for num_beams in (1, 2, 3):
            assert plain_beam_search(model, 0, codes, num_beams)[0][1] != tuple(exact)

    def test_users_of_a_batch_do_not_meet(self, codes):
        model, tree = Model(users=2), tree_of(codes)
        both = beam_search(model, tree, 2, 4)
        alone = beam_search(model, tree, 1, 4)
        for batch, single in zip(both, alone, strict=True):
            assert torch.equal(batch[:1], single)
        assert not torch.equal(both[1][0], both[1][1])

    def test_the_model_is_asked_once_a_level_about_no_more_beams_than_there_are(self):
        codes, model = CATALOGUES["two nodes at first"], Model()
        beam_search(model, tree_of(codes), 2, 10)
        batches, beams, lengths = zip(*model.calls, strict=True)
        assert batches == (2, 2, 2, 2)
        assert lengths == (0, 1, 2, 3)
        assert beams[0] == 1
        assert max(beams) <= 10

    def test_log_probabilities_of_half_precision_are_summed_in_float32(self):
        codes = CATALOGUES["five levels"]
        model, tree = Model(dtype=torch.bfloat16), tree_of(codes)
        leaves, scores = beam_search(model, tree, 2, 60)
        distinct = sorted(set(map(tuple, codes)))
        expected = [[model.item_score(user, list(distinct[leaf])) for leaf in leaves[user]] for user in range(2)]
        assert scores.dtype == torch.float32
        for row, exact in zip(scores.tolist(), expected, strict=True):
            found = [score for score in row if score > -math.inf]
            assert found == pytest.approx(exact[: len(found)], abs=1e-5)

    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    @pytest.mark.parametrize("num_beams", [3, 100])
    def test_a_code_without_a_probability_promotes_no_item(self, value, num_beams):
        """The beams go to other items, as if no item had this prefix."""
        codes, tree = CATALOGUES["three levels"], tree_of(CATALOGUES["three levels"])
        model = Model()
        best = plain_beam_search(model, 0, codes, 1)[0][1]
        model.changed[0, best[:1], best[1]] = value
        scores = item_scores(*beam_search(model, tree, 2, num_beams), tree)
        dead = torch.tensor([tuple(item[:2]) == best[:2] for item in codes])
        assert dead.any()
        assert not (scores[0][dead] > -math.inf).any()
        left = [item for item, gone in zip(codes, dead.tolist(), strict=True) if not gone]
        expected = {prefix: score for score, prefix in plain_beam_search(model, 0, left, num_beams)}
        found = {tuple(item): score for item, score in zip(codes, scores[0].tolist(), strict=True) if score > -math.inf}
        assert found == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    def test_a_model_that_diverged_ranks_every_target_last(self, value):
        tree = tree_of(CATALOGUES["three levels"])
        leaves, scores = beam_search(lambda prefixes: torch.full((*prefixes.shape[:2], 6), value), tree, 2, 5)
        everything = item_scores(leaves, scores, tree)
        assert everything.shape == (2, 80)
        assert not (everything > -math.inf).any()
        assert target_ranks(everything, torch.tensor([3, 70])).tolist() == [80, 80]

    def test_the_loop_waits_for_nothing_from_the_device(self, codes):
        """The meta device has no values, so any code that needs one, to branch, to size or to copy, raises."""
        tree = tree_of(codes).to("meta")

        def next_log_probs(prefixes: Tensor) -> Tensor:
            assert prefixes.device.type == "meta"
            return torch.empty(*prefixes.shape[:2], CODEBOOK_SIZE, device="meta")

        leaves, scores = beam_search(next_log_probs, tree, 2, 4)
        assert item_scores(leaves, scores, tree).shape == (2, len(codes))


class TestItemScores:
    def test_items_of_a_leaf_share_its_score_and_the_unreached_have_none(self):
        tree = tree_of([[4], [0], [4], [5]])
        scores = item_scores(torch.tensor([[1, 0], [2, 1]]), torch.tensor([[-0.5, -2.0], [-1.0, -1.5]]), tree)
        assert scores.tolist() == [[-0.5, -2.0, -0.5, -math.inf], [-1.5, -math.inf, -1.5, -1.0]]

    @pytest.mark.parametrize("leaf", [0, 1, 2])
    def test_a_beam_without_a_leaf_of_its_own_takes_nothing_away(self, leaf):
        tree = tree_of([[0], [1], [2]])
        leaves, scores = torch.tensor([[leaf, leaf], [leaf, leaf]]), torch.tensor([[-1.0, -math.inf]] * 2)
        for order in ([0, 1], [1, 0]):
            expected = [[-1.0 if item == leaf else -math.inf for item in range(3)]] * 2
            assert item_scores(leaves[:, order], scores[:, order], tree).tolist() == expected


ITEM_CODES = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [0, 1]]
"""Of items 1 to 6; the second and the last share theirs."""


class Toy(GenerativeRecommender):
    """Prefers the codes in their order for every user: item 1, items 2 and 6, items 3, 4 and 5."""

    def next_code_scorer(self, batch: dict[str, Tensor]) -> NextLogProbs:
        weights = torch.tensor([0.6, 0.3, 0.1]).log()
        return lambda prefixes: weights.expand(*prefixes.shape[:2], -1)


@pytest.fixture
def path(tmp_path) -> str:
    SemanticIds(torch.tensor(ITEM_CODES)).write(tmp_path / "codes.csv")
    return str(tmp_path / "codes.csv")


class TestGenerativeRecommender:
    def test_knows_the_codes_of_its_items(self, path):
        model = Toy(6, path)
        assert model.codes.tolist() == [[0, 0], *ITEM_CODES]
        assert (model.levels, model.codebook_size) == (2, 3)
        assert "codes" in model.state_dict()
        assert not any("tree" in name for name in model.state_dict())

    def test_scores_are_sums_of_log_probabilities(self, path):
        p, q, r = (math.log(share) for share in (0.6, 0.3, 0.1))
        expected = [2 * p, p + q, q + p, 2 * q, r + p, p + q]
        history = torch.tensor([[1, 2], [3, 0]])
        for scores in (Toy(6, path)(history), Toy(6, path).score_batch({"history": history})):
            torch.testing.assert_close(scores, torch.tensor([expected, expected]))

    @pytest.mark.parametrize(
        ("target", "seen", "masked", "unmasked"),
        [
            (1, [3], 1, 1),
            (2, [1], 3, 4),  # behind item 6, which has its codes, and item 3, which has their score; and behind item 1
            (2, [1, 6], 2, 4),
            (3, [1, 2], 2, 4),
            (4, [1, 2, 3], 2, 5),
            (5, [4], 5, 6),
        ],
    )
    def test_ranks_by_hand(self, path, target, seen, masked, unmasked):
        batch = {"history": torch.tensor([seen]), "target": torch.tensor([target]), "seen": torch.tensor([seen])}
        (metrics,) = L.Trainer(**QUIET).test(Toy(6, path), DataLoader([batch], batch_size=None), verbose=False)
        for kind, rank in (("masked", masked), ("unmasked", unmasked)):
            assert metrics[f"test/{kind}/recall@5"] == float(rank <= 5)
            assert metrics[f"test/{kind}/ndcg@10"] == pytest.approx(1 / math.log2(1 + rank))

    def test_a_target_that_no_beam_reaches_ranks_last(self, path):
        scores = Toy(6, path, num_beams=1)(torch.tensor([[3]]))
        assert (scores > -math.inf).tolist() == [[True] + [False] * 5]
        assert target_ranks(scores, torch.tensor([4])).tolist() == [6]

    def test_predictions_stop_where_the_beams_do(self, path):
        batch = {"history": torch.tensor([[3]]), "seen": torch.tensor([[3]]), "user": torch.tensor([0])}
        items = Toy(6, path, num_beams=2).predict_step(batch, 0).items[0].tolist()
        assert items[0] == 1
        assert {item for item in items if item} <= {1, 2, 6}

    def test_an_empty_history_is_refused_by_its_row(self, path):
        with pytest.raises(ValueError, match="row 1 of the batch has no item"):
            Toy(6, path)(torch.tensor([[1, 2], [0, 0]]))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_beams": 0}, ValueError, "num_beams must be 1 or more, got 0"),
            ({"num_items": 5}, ValueError, r"codes.csv.*6|6.*codes.csv"),
            ({"num_items": 9}, ValueError, r"codes.csv"),
            ({"semantic_ids": "nowhere.csv"}, FileNotFoundError, r"nowhere.csv"),
        ],
    )
    def test_bad_arguments_get_a_sentence(self, path, options, error, message):
        with pytest.raises(error, match=message):
            Toy(**{"num_items": 6, "semantic_ids": path, **options})

    def test_checkpoints_fit_their_codes_alone(self, path, tmp_path):
        model = Toy(6, path)
        L.Trainer(**QUIET).strategy.connect(model)
        checkpoint = {"state_dict": model.state_dict()}
        model.on_save_checkpoint(checkpoint)
        Toy(6, path).on_load_checkpoint(checkpoint)
        for name, codes in (("order", [*ITEM_CODES[1:], ITEM_CODES[0]]), ("levels", [[*c, 0] for c in ITEM_CODES])):
            SemanticIds(torch.tensor(codes)).write(tmp_path / name)
            with pytest.raises(ValueError, match=r"codes|semantic ids"):
                Toy(6, str(tmp_path / name)).on_load_checkpoint(checkpoint)
        SemanticIds(torch.tensor([*ITEM_CODES, [2, 2]])).write(tmp_path / "more.csv")
        with pytest.raises(ValueError, match="catalogue of 6 items, but the data have 7"):
            Toy(7, str(tmp_path / "more.csv")).on_load_checkpoint(checkpoint)

    def test_synthetic_users_are_tested_from_end_to_end(self, tmp_path):
        data = SyntheticSequences(num_users=30, num_clusters=3, items_per_cluster=2, num_strides=1, max_length=5)
        SemanticIds(torch.tensor(ITEM_CODES)).write(tmp_path / "codes.csv")
        (metrics,) = L.Trainer(**QUIET).test(Toy(6, str(tmp_path / "codes.csv")), datamodule=data, verbose=False)
        assert metrics["test/unmasked/recall@10"] == 1.0
