"""Amazon 2018: the prepared folders, and the data sets made from reviews and metadata."""

from __future__ import annotations

import csv
import gzip
import html
import json
import warnings
from pathlib import Path

import pytest
import torch

from examples.recsys.data import amazon2018
from examples.recsys.data.amazon2018 import PUBLISHED, AmazonReviews2018, Counts
from examples.recsys.data.amazon2018_raw import months, preprocess, read_metadata
from examples.recsys.data.events import Event, k_core
from examples.recsys.data.protocol import TEST, TRAIN, VALIDATION
from tests.examples.file_server import serve

SHARED = Path(__file__).parents[2] / "../shared/data/amazon2018"
INDUSTRIAL, OFFICE, INSTRUMENTS = PUBLISHED

DAY = 86_400
START = 1_475_280_000  # 2016-10-01


def review(user: str, item: str, day: int) -> dict[str, object]:
    return {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": START + day * DAY}


# Ann and Bob review glue and tape five times in all each, and so they are the core.
CORE = [
    *[review("bob", "GLUE", day) for day in (2, 9)],
    *[review("ann", "GLUE", day) for day in (1, 1, 4)],
    *[review("bob", "TAPE", day) for day in (2, 5, 7)],
    *[review("ann", "TAPE", day) for day in (3, 4)],
]
REVIEWS = [
    review("cat", "GLUE", 0),  # a user of one review
    *CORE,
    review("ann", "NAIL", 3),  # an item that loses a review with dan
    *[review("bob", "NAIL", day) for day in (1, 2, 3)],
    review("dan", "NAIL", 3),
    *[review("dan", "TAPE", day) for day in (3, 3, 3)],  # four reviews
    review("ann", "TAPE", -1),  # out of the window
    review("ann", "GLUE", 800),
    *[review("ann", item, 2) for item in ("LONG", "WEB", "BARE", "NONE") for _ in range(5)],
]
METADATA = [
    {"asin": "GLUE", "title": '"Glue &amp; &quot;Co&quot; "', "brand": "Acme", "category": ["Office", "Glue"]},
    {"asin": "TAPE", "title": "Tape", "description": ["Sticks.", "Well."]},
    {"asin": "NAIL", "title": "Nail"},
    {"asin": "OTHER", "title": "Never reviewed"},
    {"asin": "LONG", "title": " ".join(["word"] * 21)},
    {"asin": "WEB", "title": 'x <span id="title">'},
    {"asin": "BARE", "title": ""},
    {"asin": "TAPE", "title": "Tape, " + " ".join(["word"] * 19)},
    {"asin": "GLUE", "title": ""},
]
WINDOW = months((2016, 10), (2018, 11))


def write_lines(path: Path, entries: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    return path


def write_csv(folder: Path, text: str, name: str = "interactions.csv.gz") -> AmazonReviews2018:
    (folder / OFFICE).mkdir(parents=True, exist_ok=True)
    (folder / OFFICE / name).write_bytes(gzip.compress(text.encode()))
    return AmazonReviews2018(OFFICE, data_dir=str(folder))


@pytest.fixture
def small(monkeypatch):
    """Replaces the published counts by those of the small set."""
    monkeypatch.setitem(PUBLISHED, OFFICE, Counts(2, 2, 6, 1, 1))


class TestSharedFolders:
    @pytest.fixture(autouse=True)
    def there(self):
        if not SHARED.exists():
            pytest.skip("no ../shared/data")

    @pytest.mark.parametrize(
        ("category", "users", "items", "interactions", "train", "share", "first_times"),
        [
            (INDUSTRIAL, 3_285, 3_541, 22_743, 10_393, "28.7%", (1_495_152_000, 1_511_049_600, 1_538_092_800)),
            (OFFICE, 3_231, 3_317, 22_447, 9_484, "24.4%", (1_517_616_000, 1_522_627_200, 1_538_438_400)),
        ],
    )
    def test_partial_files_are_what_they_say(self, category, users, items, interactions, train, share, first_times):
        data = AmazonReviews2018(category, data_dir=str(SHARED))
        data.prepare_data()
        with pytest.warns(UserWarning, match=rf"is partial: training has {train} of \d+ targets \({share}\)"):
            data.setup("fit")
        sequences, published = data.protocol.sequences, PUBLISHED[category]
        assert (len(sequences), len(sequences.items.unique()), len(sequences.items)) == (users, items, interactions)
        assert len(data.protocol.train()) == train
        assert len(data.protocol.validation()) == published.validation
        assert len(data.protocol.test()) == published.test
        held_out = [sequences.times[data.protocol.targets(label)] for label in (VALIDATION, TEST)]
        assert (int(held_out[0].min()), int(held_out[1].min()), int(sequences.times.max())) == first_times
        assert data.num_items == len(data.item_titles()) == published.items
        assert max(len(sample["history"]) for sample in data.protocol.test()) == 10

    @pytest.mark.parametrize("category", [INDUSTRIAL, OFFICE])
    def test_published_splits_are_a_cut_of_targets_in_our_order(self, category):
        """This includes the ties at the borders between splits."""
        data = AmazonReviews2018(category, data_dir=str(SHARED))
        sequences = data.load_sequences()
        first = torch.zeros(len(sequences.items), dtype=torch.bool)
        first[sequences.offsets[:-1]] = True
        targets = (~first).nonzero().flatten()
        labels = data.labels[targets[sequences.times[targets].argsort(stable=True)]]
        assert labels.diff().min() == 0
        assert labels.bincount().tolist()[1:] == list(PUBLISHED[category][3:])

    def test_instruments_are_complete_and_leave_one_out(self):
        data = AmazonReviews2018(INSTRUMENTS, data_dir=str(SHARED))
        data.prepare_data()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data.setup("fit")
        assert (len(data.protocol.sequences), len(data.protocol.sequences.items)) == (24_772, 206_153)
        assert len(data.protocol.train()) == 131_837
        assert len(data.protocol.sequences.items.unique()) == data.num_items == 9_922
        assert data.item_titles()[:2] == data.item_names()[:2] == data.user_names()[:2] == ["1", "2"]

    def test_names_are_those_of_the_files(self):
        """The files count items from 0 and lack rows of some users."""
        data = AmazonReviews2018(INDUSTRIAL, data_dir=str(SHARED))
        data.setup("predict")
        with gzip.open(data.path, "rt") as file:
            users = list(dict.fromkeys(row["user"] for row in csv.DictReader(file)))
        assert data.user_names() == users != [str(user) for user in range(1, len(users) + 1)]
        with gzip.open(data.path.parent / "items.jsonl.gz", "rt") as lines:
            titles = {str(entry["item"]): html.unescape(entry["title"]) for entry in map(json.loads, lines)}
        assert dict(zip(data.item_names(), data.item_titles(), strict=True)) == titles

    def test_titles_are_those_of_the_catalogue(self):
        titles = AmazonReviews2018(INDUSTRIAL, data_dir=str(SHARED)).item_titles()
        assert titles[1].startswith("Stanley TRA708T Sharpshooter")


class TestFromRawFiles:
    def preprocess(self, tmp_path, reviews=REVIEWS, metadata=METADATA):
        return preprocess(
            write_lines(tmp_path / "reviews.json.gz", reviews), write_lines(tmp_path / "meta.json.gz", metadata), WINDOW
        )

    def test_the_core_by_hand(self, tmp_path):
        sequences, catalogue = self.preprocess(tmp_path)
        # Bob comes first in the file; his two reviews of day 2 are in its order, so glue is item 1.
        assert [sequences[user].tolist() for user in range(2)] == [[1, 2, 2, 2, 1], [1, 1, 2, 1, 2]]
        days = (sequences.times - START) // DAY
        assert days.tolist() == [2, 2, 5, 7, 9, 1, 1, 3, 4, 4]
        assert [entry["asin"] for entry in catalogue] == ["GLUE", "TAPE"]

    def test_what_is_kept_of_an_item(self, tmp_path):
        _, (glue, tape) = self.preprocess(tmp_path)
        assert glue == {
            "asin": "GLUE",
            "title": 'Glue & "Co" ',
            "brand": "Acme",
            "categories": "Office, Glue",
            "description": "",
        }
        # Twenty words are not too many, and the last entry with a usable title counts.
        assert tape["title"].startswith("Tape, word")

    def test_only_reviewed_items_are_held_in_memory(self, tmp_path):
        path = write_lines(tmp_path / "meta.json.gz", METADATA)
        assert read_metadata(path, {"GLUE", "NONE", "LONG"}).keys() == {"GLUE"}

    def test_the_window_is_from_month_to_month(self):
        assert START in WINDOW
        assert START - 1 not in WINDOW
        assert 1_541_030_400 in WINDOW
        assert 1_541_030_401 not in WINDOW

    def test_k_core_needs_several_rounds(self):
        chain = [Event(user, item, 0) for user, item in ("aX", "aY", "bX", "bY", "cY", "cZ", "dZ")]
        assert k_core(chain, 2) == chain[:4]
        assert k_core(chain, 1) == chain

    def test_files_of_two_categories_get_a_sentence(self, tmp_path):
        with pytest.raises(ValueError, match="leave no 5-core of titled items: check that they are complete"):
            self.preprocess(tmp_path, metadata=[{"asin": "OTHER", "title": "Other"}])

    @pytest.mark.parametrize("line", ['{"title": "no asin"}', "not json"])
    def test_a_line_that_is_no_metadata_gets_a_sentence(self, tmp_path, line):
        path = tmp_path / "meta.json.gz"
        path.write_bytes(gzip.compress(f'{{"asin": "A"}}\n{line}\n'.encode()))
        with pytest.raises(ValueError, match=r"meta.json.gz, line 2: not metadata with an asin"):
            read_metadata(path, {"A"})


class TestDownload:
    def test_downloads_once_and_reads_what_it_made(self, tmp_path, small):
        served = tmp_path / "web"
        write_lines(served / f"categoryFilesSmall/{OFFICE}_5.json.gz", REVIEWS)
        write_lines(served / f"metaFiles2/meta_{OFFICE}.json.gz", METADATA)
        cache = tmp_path / "cache"
        with serve(served) as url:
            AmazonReviews2018(OFFICE, cache_dir=str(cache), base_url=url).prepare_data()
        data = AmazonReviews2018(OFFICE, cache_dir=str(cache), base_url=url, batch_size=2)
        data.prepare_data()
        data.setup("fit")
        assert sorted(path.name for path in (cache / OFFICE).iterdir()) == ["interactions.csv.gz", "items.jsonl.gz"]
        assert data.item_titles()[0] == 'Glue & "Co" '
        (validation,), (test,) = data.val_dataloader(), data.test_dataloader()
        # Of the days 2, 5, 7, 9 and 1, 3, 4, 4 the latest two are Bob's.
        assert (validation["history"].tolist(), validation["target"].tolist()) == ([[1, 2, 2]], [2])
        assert ((validation["times"] - START) // DAY).tolist() == [[2, 2, 5]]
        assert (test["history"].tolist(), test["target"].tolist()) == ([[1, 2, 2, 2]], [1])
        assert next(iter(data.train_dataloader())).keys() == {"history", "targets", "user", "times"}
        AmazonReviews2018(OFFICE, data_dir=str(cache)).setup("fit")

    def test_another_set_than_the_published_one_gets_a_sentence(self, tmp_path):
        served = tmp_path / "web"
        write_lines(served / f"categoryFilesSmall/{OFFICE}_5.json.gz", REVIEWS)
        write_lines(served / f"metaFiles2/meta_{OFFICE}.json.gz", METADATA)
        with serve(served) as url:
            data = AmazonReviews2018(OFFICE, cache_dir=str(tmp_path / "cache"), base_url=url)
            with pytest.raises(
                ValueError, match=r"gives 2 users, 2 items and 6 / 1 / 1 targets, but the published Off"
            ):
                data.prepare_data()
        assert not (tmp_path / "cache" / OFFICE).exists()


HEADER = "user,item,timestamp,split\n"
GOOD = "0,0,1,train\n0,1,2,train\n0,1,3,train\n0,1,3,valid\n1,0,3,train\n1,1,4,test\n"


class TestPreparedFiles:
    def test_given_splits_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setitem(PUBLISHED, OFFICE, Counts(2, 2, 2, 1, 1))
        data = write_csv(tmp_path, HEADER + GOOD)
        data.setup("fit")
        assert [len(data.protocol.targets(label)) for label in (TRAIN, VALIDATION, TEST)] == [2, 1, 1]

    def test_a_complete_file_goes_before_a_partial_one(self, tmp_path):
        write_csv(tmp_path, HEADER, "interactions.partial.csv.gz")
        assert write_csv(tmp_path, HEADER).path.name == "interactions.csv.gz"

    @pytest.mark.parametrize(
        ("published", "fits"),
        [
            (Counts(9, 2, 100, 1, 1), True),  # users and training targets are missing
            (Counts(9, 2, 100, 2, 1), False),  # so is a validation target
            (Counts(1, 2, 100, 1, 1), False),  # there is a user too many
        ],
    )
    def test_a_partial_file_lacks_nothing_but_training(self, tmp_path, monkeypatch, published, fits):
        monkeypatch.setitem(PUBLISHED, OFFICE, published)
        data = write_csv(tmp_path, HEADER + GOOD, "interactions.partial.csv.gz")
        if fits:
            with pytest.warns(UserWarning, match=r"training has 2 of 100 targets \(2.0%\) and 2 of 9 users"):
                data.setup("fit")
        else:
            with pytest.raises(ValueError, match="the file is truncated, altered or of another category"):
                data.setup("fit")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("user,item,split\n0,0,train\n", "has no column timestamp, only user, item, split"),
            ("", "has no column user, item, timestamp, only none at all"),
            (HEADER, "There are no users"),
            (HEADER + "0,0,1,train\n0,2,2,train\n", r"line 3: item 2 is outside of 0..1: the file is damaged or of an"),
            (
                HEADER + "0,0,1,train\n1,1,2,train\n0,1,2,test\n",
                "line 4: user 0 has earlier rows: sort the rows by user",
            ),
            (HEADER + "0,0,2,train\n0,1,1,train\n", "interactions.csv.gz: User 1 has the time 2 before 1"),
            (HEADER + "0,0,1,train\n0,1,2,dev\n", "line 3: expected integers .* one of train, valid, test"),
            (HEADER + "0,0,1,train\n0,x,2,train\n", "line 3: expected integers for item and timestamp"),
            (HEADER + "0,0,1,train\n0,1\n", "line 3: expected integers for item and timestamp"),
            (HEADER + GOOD + "2,1,5,train\n", "User 3 has 1 interaction, but a split by time needs 2"),
            (HEADER + GOOD, "gives 2 users, 2 items and 2 / 1 / 1 targets, but the published Office_Products has"),
        ],
    )
    def test_bad_files_get_a_sentence(self, tmp_path, small, text, message):
        with pytest.raises(ValueError, match=message):
            write_csv(tmp_path, text).setup("fit")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (['{"item": 0, "title": "a"}'], "has 1 items, but the set has 0..1: it is of another set"),
            (['{"item": 0, "title": "a"}', '{"item": 1}'], "line 2: no item and title in"),
        ],
    )
    def test_bad_catalogues_get_a_sentence(self, tmp_path, small, lines, message):
        data = write_csv(tmp_path, HEADER + GOOD)
        with pytest.raises(FileNotFoundError, match=r"has no items\.jsonl\.gz, which names the items"):
            data.item_titles()
        (tmp_path / OFFICE / "items.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        with pytest.raises(ValueError, match=message):
            data.item_titles()

    def test_a_missing_file_gets_a_sentence(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no interactions of Office_Products .* or leave data_dir out to d"
        ):
            AmazonReviews2018(OFFICE, data_dir=str(tmp_path)).prepare_data()


def test_unknown_category_gets_a_sentence():
    with pytest.raises(ValueError, match="Unknown category 'Beauty': choose one of Industrial_and_Scientific, Office"):
        AmazonReviews2018("Beauty")


def test_instruments_need_a_folder():
    with pytest.raises(ValueError, match="Musical_Instruments cannot be made from the raw reviews: give the data_dir"):
        AmazonReviews2018(INSTRUMENTS)


def test_defaults_are_those_of_the_study():
    data = AmazonReviews2018()
    assert (data.category, data.max_length, data.mask_history, data.samples) == (INDUSTRIAL, 10, False, "prefix")
    assert amazon2018.WINDOWS[INDUSTRIAL].start == 844_128_000  # 1996-10-01
