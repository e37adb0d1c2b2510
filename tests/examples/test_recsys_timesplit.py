"""Times of interactions, and the split by time."""

from __future__ import annotations

import random

import pytest
import torch

from examples.recsys.data import LeaveOneOut, UserSequences
from examples.recsys.data.protocol import TEST, TRAIN, VALIDATION, TimeSplit, collate

ITEMS = [[1, 2, 3, 4, 5], [6, 7, 8], [5, 4, 3, 2, 1, 6, 7]]
TIMES = [[10, 20, 30, 40, 50], [35, 40, 40], [1, 1, 2, 3, 5, 40, 60]]
TIMED = UserSequences.from_lists(ITEMS, 8, TIMES)


def samples(dataset) -> list[dict[str, list[int] | int]]:
    return [{key: value.tolist() for key, value in dataset[index].items()} for index in range(len(dataset))]


def random_sequences(users: int = 40, num_items: int = 20, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Few items and few times, so items repeat and times tie, within users and between them."""
    draw = random.Random(seed)
    lengths = [draw.randint(2, 9) for _ in range(users)]
    items = [[draw.randint(1, num_items) for _ in range(length)] for length in lengths]
    return items, [sorted(draw.randint(1, 30) for _ in range(length)) for length in lengths]


class TestTimes:
    def test_samples_hold_the_times_of_their_history(self):
        protocol = LeaveOneOut(TIMED, max_length=3)
        assert samples(protocol.train())[1] == {
            "history": [4, 3, 2],
            "targets": [3, 2, 1],
            "user": 2,
            "times": [1, 2, 3],
        }
        assert samples(protocol.test())[0] == {
            "history": [2, 3, 4],
            "target": 5,
            "seen": [1, 2, 3, 4],
            "user": 0,
            "times": [20, 30, 40],
        }

    def test_prefixes_hold_the_times_of_their_history(self):
        protocol = LeaveOneOut(TIMED, max_length=3, samples="prefix")
        (*_, last) = samples(protocol.train())
        assert last == {"history": [4, 3, 2], "targets": [0, 0, 1], "user": 2, "times": [1, 2, 3]}

    def test_prediction_holds_the_times_of_the_history_up_to_now(self):
        protocol = LeaveOneOut(TIMED, max_length=3)
        last = {"history": [1, 6, 7], "seen": ITEMS[2], "user": 2, "times": [5, 40, 60]}
        assert samples(protocol.prediction())[2] == last

    def test_batches_pad_times_with_zeros_beside_the_history(self):
        protocol = LeaveOneOut(TIMED)
        batch = collate([protocol.test()[1], protocol.test()[0]])
        assert batch["times"].tolist() == [[35, 40, 0, 0], [10, 20, 30, 40]]
        assert batch["times"].shape == batch["history"].shape
        assert batch["times"].dtype == torch.long

    def test_sources_without_times_have_no_such_key(self):
        protocol = LeaveOneOut(UserSequences.from_lists(ITEMS, 8))
        assert "times" not in protocol.train()[0].keys() | protocol.validation()[0].keys()

    def test_users_with_interactions_at_the_same_time_are_counted(self):
        """A tie of a user's first interaction with the last one of the previous user does not count."""
        times = [[1, 2, 3], [3, 3, 4], [4, 5, 5], [5, 5, 5, 6, 6]]
        items = [[1] * len(clock) for clock in times]
        assert UserSequences.from_lists(items, 1, times).ties() == (3, 9)
        assert UserSequences.from_lists(items[:1], 1, times[:1]).tie_remark() is None
        ranks = [[0, 1, 2], [3, 4, 5], [6, 7, 7], [7, 8, 9, 10, 11]]
        assert UserSequences.from_lists(items, 1, times, ranks).tie_remark().startswith("1 of 4 users has rows at")

    def test_times_that_fall_within_a_user_get_a_sentence(self):
        with pytest.raises(ValueError, match="User 2 has the time 9 before 8: sort the interactions of each user by"):
            UserSequences.from_lists([[1, 2], [3, 4, 5]], 5, [[5, 6], [9, 8, 8]])

    def test_times_of_another_length_get_a_sentence(self):
        with pytest.raises(ValueError, match="as many lists as there are users, each as long as the items"):
            UserSequences.from_lists([[1, 2], [3]], 3, [[5], [6, 7]])
        with pytest.raises(ValueError, match=r"times must be \(3,\) int64, one per interaction, got \(2,\)"):
            UserSequences(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]), 3, torch.tensor([1, 2]))


class TestTimeSplit:
    def test_agrees_with_a_plain_loop(self):
        items, times = random_sequences()
        targets = sorted(
            (times[user][place], user, place) for user in range(len(items)) for place in range(1, len(items[user]))
        )
        cuts = int(0.8 * len(targets)), int(0.9 * len(targets))
        protocol = TimeSplit(UserSequences.from_lists(items, 20, times), max_length=4, samples="prefix")
        parts = targets[: cuts[0]], targets[cuts[0] : cuts[1]], targets[cuts[1] :]
        for part, dataset in zip(parts[1:], (protocol.validation(), protocol.test()), strict=True):
            assert samples(dataset) == [
                {
                    "history": items[user][max(0, place - 4) : place],
                    "target": items[user][place],
                    "seen": items[user][:place],
                    "user": user,
                    "times": times[user][max(0, place - 4) : place],
                }
                for _, user, place in sorted(part, key=lambda target: target[1:])
            ]
        assert samples(protocol.train()) == [
            {
                "history": items[user][max(0, place - 4) : place],
                "targets": [0] * (min(4, place) - 1) + [items[user][place]],
                "user": user,
                "times": times[user][max(0, place - 4) : place],
            }
            for _, user, place in sorted(parts[0], key=lambda target: target[1:])
        ]

    def test_sequences_train_on_the_same_targets_as_prefixes(self):
        items, times = random_sequences()
        sequences = UserSequences.from_lists(items, 20, times)
        whole, single = (samples(TimeSplit(sequences, samples=kind).train()) for kind in ("sequence", "prefix"))
        assert len(whole) < len(single)
        assert [item for sample in whole for item in sample["targets"]] == [sample["targets"][-1] for sample in single]

    def test_equal_times_are_cut_in_order_of_users_then_of_the_sequence(self):
        protocol = TimeSplit(UserSequences.from_lists([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], 6, [[7] * 6] * 2))
        assert [sample["target"] for sample in samples(protocol.validation())] == [5]
        assert [sample["seen"] for sample in samples(protocol.test())] == [[1, 2, 3, 4, 5]]
        assert [sample["targets"] for sample in samples(protocol.train())] == [[2, 3, 4, 5, 6], [2, 3, 4]]

    @pytest.mark.parametrize(("targets", "sizes"), [(45_324, (36_259, 4_532, 4_533)), (48_656, (38_924, 4_866, 4_866))])
    def test_sizes_are_those_that_were_published(self, targets, sizes):
        count = torch.arange(targets + 1)
        sequences = UserSequences(count.remainder(9) + 1, torch.tensor([0, targets + 1]), 9, count)
        protocol = TimeSplit(sequences, samples="prefix")
        assert (len(protocol.train()), len(protocol.validation()), len(protocol.test())) == sizes

    def test_no_training_target_is_later_than_a_held_out_one(self):
        items, times = random_sequences(seed=1)
        protocol = TimeSplit(UserSequences.from_lists(items, 20, times))
        clock = protocol.sequences.times
        train, validation, test = (clock[protocol.targets(label)] for label in (TRAIN, VALIDATION, TEST))
        assert train.max() <= validation.min()
        assert validation.max() <= test.min()

    def test_item_counts_are_those_of_users_who_train(self):
        labels = torch.tensor([2, 0, 0, 1, 2, 0, 1, 1, 0, 0, 0, 0, 0, 1, 2])
        counts = TimeSplit(TIMED, labels=labels).item_counts()
        # Users 1 and 3 train on their first three and five items; user 2 begins with a validation target.
        assert counts.tolist() == [2, 2, 2, 1, 1, 0, 0, 0]

    def test_given_labels_decide(self):
        labels = torch.tensor([2, 0, 0, 1, 2, 0, 1, 1, 0, 0, 0, 0, 0, 1, 2])
        protocol = TimeSplit(TIMED, labels=labels)
        assert [sample["targets"] for sample in samples(protocol.train())] == [[2, 3], [4, 3, 2, 1]]
        assert [sample["target"] for sample in samples(protocol.validation())] == [4, 7, 8, 6]
        assert [sample["seen"] for sample in samples(protocol.test())] == [[1, 2, 3, 4], [5, 4, 3, 2, 1, 6]]
        assert labels[0] == TEST, "the caller's labels are as they were"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {1: VALIDATION},
                "labels go back in time: a target of split 0 or before is at 30, but one of a later split is at 20",
            ),
            ({7: TRAIN}, "labels go back in the sequence of user 2, at equal times"),
            ({3: 3}, r"labels must be 0 \(train\), 1 \(validation\) or 2 \(test\), got 3"),
            ({4: VALIDATION, 14: VALIDATION}, "has 6 training, 6 validation and 0 test targets, but needs some of"),
        ],
    )
    def test_bad_labels_get_a_sentence(self, change, message):
        labels = torch.tensor([2, 0, 0, 1, 2, 0, 1, 1, 0, 0, 0, 0, 0, 1, 2])
        for position, label in change.items():
            labels[position] = label
        with pytest.raises(ValueError, match=message):
            TimeSplit(TIMED, labels=labels)

    def test_labels_of_another_length_get_a_sentence(self):
        with pytest.raises(ValueError, match=r"labels must be \(15,\) int64, one per interaction, got \(3,\)"):
            TimeSplit(TIMED, labels=torch.tensor([0, 1, 2]))

    def test_sequences_without_times_get_a_sentence(self):
        with pytest.raises(ValueError, match="needs times, but these sequences have none: use LeaveOneOut"):
            TimeSplit(UserSequences.from_lists(ITEMS, 8))

    def test_users_with_one_item_get_a_sentence(self):
        with pytest.raises(ValueError, match=r"User 2 has 1 interaction, but a split by time needs 2.*\(1 of 2\)"):
            TimeSplit(UserSequences.from_lists([[1, 2, 3], [1]], 3, [[1, 2, 3], [1]]))

    def test_too_few_targets_get_a_sentence(self):
        with pytest.raises(ValueError, match="has 1 training, 0 validation and 1 test targets, but needs some of each"):
            TimeSplit(UserSequences.from_lists([[1, 2, 3]], 3, [[1, 2, 3]]))

    @pytest.mark.parametrize(("argument", "value"), [("max_length", 0), ("samples", "window")])
    def test_bad_arguments_get_a_sentence(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .*got {value!r}"):
            TimeSplit(TIMED, **{argument: value})
