"""Splits, padding, the sources and their errors."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from examples.recsys.data import AmazonReviews2014, LeaveOneOut, SyntheticSequences, UserSequences
from examples.recsys.data.amazon2014 import PUBLISHED, read_reviews
from examples.recsys.data.protocol import collate

SHARED = Path(__file__).parents[2] / "../shared/data/amazon2014"

SEQUENCES = [[1, 2, 3, 4, 5], [6, 7, 8], [5, 4, 3, 2, 1, 6, 7]]


def samples(dataset) -> list[dict[str, list[int] | int]]:
    return [{key: value.tolist() for key, value in dataset[index].items()} for index in range(len(dataset))]


class TestLeaveOneOut:
    def test_a_user_is_one_sample_with_a_target_at_every_position(self):
        # The second user has one item left to train on, and so nothing to predict.
        assert samples(LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8)).train()) == [
            {"history": [1, 2], "targets": [2, 3], "user": 0},
            {"history": [5, 4, 3, 2], "targets": [4, 3, 2, 1], "user": 2},
        ]

    def test_a_long_history_keeps_its_latest_items(self):
        protocol = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8), max_length=2)
        assert samples(protocol.train())[1] == {"history": [3, 2], "targets": [2, 1], "user": 2}
        assert samples(protocol.test())[2] == {"history": [1, 6], "target": 7, "seen": [5, 4, 3, 2, 1, 6], "user": 2}

    def test_prefixes_are_samples_with_one_target_each(self):
        protocol = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8), max_length=3, samples="prefix")
        assert samples(protocol.train()) == [
            {"history": [1], "targets": [2], "user": 0},
            {"history": [1, 2], "targets": [0, 3], "user": 0},
            {"history": [5], "targets": [4], "user": 2},
            {"history": [5, 4], "targets": [0, 3], "user": 2},
            {"history": [5, 4, 3], "targets": [0, 0, 2], "user": 2},
            {"history": [4, 3, 2], "targets": [0, 0, 1], "user": 2},
        ]

    def test_the_validation_item_is_history_of_the_test(self):
        protocol = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8))
        assert samples(protocol.validation())[1] == {"history": [6], "target": 7, "seen": [6], "user": 1}
        assert samples(protocol.test())[1] == {"history": [6, 7], "target": 8, "seen": [6, 7], "user": 1}

    def test_prediction_has_every_user_once_with_all_that_is_known(self):
        protocol = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8), max_length=3)
        assert samples(protocol.prediction()) == [
            {"history": [3, 4, 5], "seen": [1, 2, 3, 4, 5], "user": 0},
            {"history": [6, 7, 8], "seen": [6, 7, 8], "user": 1},
            {"history": [1, 6, 7], "seen": [5, 4, 3, 2, 1, 6, 7], "user": 2},
        ]

    @pytest.mark.parametrize("kind", ["sequence", "prefix"])
    def test_training_never_holds_a_held_out_item(self, kind):
        private = [[user * 10 + position for position in range(1, 7)] for user in range(5)]
        protocol = LeaveOneOut(UserSequences.from_lists(private, 60), samples=kind)
        trained = {
            item for sample in samples(protocol.train()) for key in ("history", "targets") for item in sample[key]
        }
        held_out = {sample["target"] for split in (protocol.validation(), protocol.test()) for sample in samples(split)}
        assert len(held_out) == 10
        assert not trained & held_out

    def test_item_counts_are_those_of_the_training_part(self):
        counts = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8)).item_counts()
        trained = Counter([1, 2, 3, 6, 5, 4, 3, 2, 1])
        assert counts.tolist() == [trained[item] for item in range(1, 9)]

    def test_batches_are_padded_with_zeros_on_the_right(self):
        protocol = LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8))
        batch = collate([protocol.test()[1], protocol.test()[0]])
        assert batch["history"].tolist() == [[6, 7, 0, 0], [1, 2, 3, 4]]
        assert batch["target"].tolist() == [8, 5]
        assert (batch["user"].tolist(), batch["user"].dtype) == ([1, 0], torch.long)

    def test_short_users_get_a_sentence(self):
        with pytest.raises(ValueError, match=r"User 2 has 2 interactions, but leave-one-out needs 3.*\(1 of 2\)"):
            LeaveOneOut(UserSequences.from_lists([[1, 2, 3], [1, 2]], 3))

    @pytest.mark.parametrize(("argument", "value"), [("max_length", 0), ("samples", "window")])
    def test_bad_arguments_get_a_sentence(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .*got {value!r}"):
            LeaveOneOut(UserSequences.from_lists(SEQUENCES, 8), **{argument: value})


class TestUserSequences:
    def test_file_round_trip(self, tmp_path):
        UserSequences.from_lists(SEQUENCES, 8).write(tmp_path / "sequences.txt")
        read = UserSequences.read(tmp_path / "sequences.txt", 8)
        assert [read[user].tolist() for user in range(len(read))] == SEQUENCES
        assert [path.name for path in tmp_path.iterdir()] == ["sequences.txt"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1 1 2 3\n2 4 9 1\n", "User 2 has the item id 9, but ids must be from 1 to 5"),
            ("1 1 2 3\n2 0 1 2\n", "User 2 has the item id 0"),
            ("1 1 2 3\n2\n", "line 2: user 2 has no items"),
            ("1 1 2 3\n\n", "line 2: expected 'user item item ...' as integers, got ''"),
            ("1 1 2 3\n2 B00 4\n", "line 2: expected .* got '2 B00 4'"),
            ("", "There are no users"),
        ],
    )
    def test_bad_files_get_a_sentence(self, tmp_path, text, message):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            UserSequences.read(tmp_path / "bad.txt", num_items=5)

    def test_a_user_without_items_gets_a_sentence(self):
        with pytest.raises(ValueError, match="User 2 has no interactions"):
            UserSequences.from_lists([[1], [], [2]], 2)


class TestSynthetic:
    def test_the_seed_decides_and_the_global_one_does_not(self):
        torch.manual_seed(1)
        first = SyntheticSequences(num_users=50).load_sequences()
        torch.manual_seed(2)
        second = SyntheticSequences(num_users=50).load_sequences()
        other = SyntheticSequences(num_users=50, seed=1).load_sequences()
        assert torch.equal(first.items, second.items)
        assert not torch.equal(first.items[:100], other.items[:100])

    def test_the_last_two_items_tell_the_next_cluster(self):
        data = SyntheticSequences(num_users=300, noise=0.0)
        sequences = data.load_sequences()
        strides = set()
        for user in range(len(sequences)):
            moves = (sequences[user] - 1).remainder(data.num_clusters).diff().remainder(data.num_clusters)
            assert len(moves.unique()) == 1
            strides.add(int(moves[0]))
        assert strides == {1, 2, 3}

    def test_lengths_and_ids_cover_their_ranges(self):
        data = SyntheticSequences(min_length=4, max_sequence_length=9)
        sequences = data.load_sequences()
        assert sequences.offsets.diff().unique().tolist() == [4, 5, 6, 7, 8, 9]
        assert (len(sequences), int(sequences.items.min()), int(sequences.items.max())) == (2000, 1, data.num_items)

    @pytest.mark.parametrize(
        ("argument", "value", "message"),
        [
            ("noise", 1.5, "noise must be a probability from 0 to 1, got 1.5"),
            ("min_length", 2, "got 2 and 15"),
            ("num_strides", 50, "num_strides must be from 1 to num_clusters - 1 = 49, got 50"),
            ("num_users", 0, "num_users must be 1 or more, got 0"),
        ],
    )
    def test_bad_arguments_get_a_sentence(self, argument, value, message):
        with pytest.raises(ValueError, match=message):
            SyntheticSequences(**{argument: value})


def test_dataloaders_before_setup_get_a_sentence():
    with pytest.raises(RuntimeError, match=r"SyntheticSequences is not set up: call prepare_data\(\) and setup"):
        SyntheticSequences().train_dataloader()


class TestAmazonReviews2014:
    @pytest.mark.parametrize(
        ("category", "targets"), [("Beauty", 131_413), ("Toys_and_Games", 109_361), ("Sports_and_Outdoors", 189_543)]
    )
    def test_real_files_have_the_published_counts(self, category, targets):
        if not SHARED.exists():
            pytest.skip("no ../shared/data")
        data = AmazonReviews2014(category, data_dir=str(SHARED), samples="prefix")
        data.prepare_data()
        data.setup("fit")
        assert len(data.protocol.train()) == targets
        assert len(data.protocol.test()) == PUBLISHED[category].users

    def test_unknown_category_gets_a_sentence(self):
        with pytest.raises(ValueError, match="Unknown category 'Books': choose one of Beauty, Toys_and_Games, Sports"):
            AmazonReviews2014("Books")

    def test_missing_file_gets_a_sentence(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no Beauty.txt .*Give the folder that holds it, or leave"):
            AmazonReviews2014(data_dir=str(tmp_path)).prepare_data()

    def test_a_file_that_was_cut_short_gets_a_sentence(self, tmp_path):
        (tmp_path / "Beauty.txt").write_text("1 1 2 3\n2 4 5 6\n")
        with pytest.raises(
            ValueError, match=r"has 2 users, 6 items and 6 interactions, but the published Beauty 5-core"
        ):
            AmazonReviews2014(data_dir=str(tmp_path)).setup("fit")

    def test_reviews_are_read_as_json_or_python_and_ordered_by_day(self, tmp_path):
        reviews = [
            {"reviewerID": "B", "asin": "x", "unixReviewTime": 30},
            {"reviewerID": "A", "asin": "x", "unixReviewTime": 20},
            {"reviewerID": "B", "asin": "z", "unixReviewTime": 10},
            {"reviewerID": "B", "asin": "y", "unixReviewTime": 30},
        ]
        for number, text in enumerate((json.dumps, repr)):
            path = tmp_path / f"{number}.json.gz"
            path.write_bytes(gzip.compress("\n".join(map(text, reviews)).encode()))
            sequences, users, items = read_reviews(path)
            # B comes first in the file: z is item 1, x item 2 and y, of the same day, item 3.
            assert [sequences[user].tolist() for user in range(2)] == [[1, 2, 3], [2]]
            assert (users, items) == (["B", "A"], ["z", "x", "y"])

    @pytest.mark.parametrize("line", ['{"reviewerID": "A"}', "not a review", "__import__('os')"])
    def test_a_line_that_is_no_review_gets_a_sentence(self, tmp_path, line):
        good = '{"reviewerID": "A", "asin": "x", "unixReviewTime": 1}'
        (tmp_path / "bad.json.gz").write_bytes(gzip.compress(f"{good}\n{line}\n".encode()))
        with pytest.raises(ValueError, match="line 2: not a review with reviewerID, asin and unixReviewTime"):
            read_reviews(tmp_path / "bad.json.gz")
