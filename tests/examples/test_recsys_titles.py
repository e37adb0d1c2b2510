"""Names of users and items, titles and descriptions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from examples.recsys.data import AmazonReviews2014, AmazonReviews2018, Interactions, SyntheticSequences, amazon2014
from examples.recsys.data.text import MAX_DESCRIPTION, describe, plain_text
from tests.examples.file_server import serve

SHARED = Path(__file__).parents[2] / "../shared/data"
TOYS = "Toys_and_Games"


class TestPlainText:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            ("Acme &amp; Sons", "Acme & Sons"),
            ("2&amp;quot; nails", '2" nails'),
            ("['Sticks.', \"It's strong\", '']", "Sticks. It's strong"),
            ("['', '']", ""),
            ("[unfinished", "[unfinished"),
            ("[Kit] of 3", "[Kit] of 3"),
            ("<p>Long <b>last</b>ing.</p><ul><li>red</li><li>blue</li></ul>", "Long lasting. red blue"),
            ("a<br/>b<br>c\n\n  d", "a b c d"),
            ("<script>var x = 1;</script><style>p {}</style>Glue", "Glue"),
            ("&lt;b&gt;bold&lt;/b&gt; glue", "bold glue"),
            ("below < 5 mm & above > 3", "below < 5 mm & above > 3"),
            ("glue for<br", "glue for"),
            ("", ""),
        ],
    )
    def test_brackets_and_markup_are_gone(self, raw, expected):
        assert plain_text(raw) == expected

    def test_parts_are_sentences(self):
        assert (
            describe("Acme", "", "Glue, Tape", "['Does it stick?', 'Yes!']") == "Acme. Glue, Tape. Does it stick? Yes!"
        )
        assert describe("", "") == ""

    def test_long_ones_end_after_a_word(self):
        text = describe("Acme", "word " * MAX_DESCRIPTION)
        assert MAX_DESCRIPTION - 5 < len(text) <= MAX_DESCRIPTION
        assert text.endswith(" word")


def test_items_and_users_go_by_their_numbers_where_nothing_is_known():
    data = SyntheticSequences(num_users=3, num_clusters=5, items_per_cluster=1)
    data.setup("predict")
    assert data.user_names() == ["1", "2", "3"]
    assert data.item_titles() == ["1", "2", "3", "4", "5"]
    assert data.item_descriptions() == [""] * 5


def test_users_of_a_file_keep_their_names(tmp_path):
    rows = [f"{user},{item},{item}" for user in ("Zoë", "ann") for item in range(3)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    data = Interactions(str(tmp_path / "log.csv"))
    data.setup("predict")
    assert data.user_names() == ["Zoë", "ann"]


class TestAmazon2018:
    @pytest.mark.parametrize("category", ["Industrial_and_Scientific", "Office_Products"])
    def test_real_descriptions_are_plain_text(self, category):
        if not SHARED.exists():
            pytest.skip("no ../shared/data")
        data = AmazonReviews2018(category, data_dir=str(SHARED / "amazon2018"))
        titles, descriptions = data.item_titles(), data.item_descriptions()
        assert len(titles) == len(descriptions) == data.num_items
        assert sum(bool(text) for text in descriptions) > 0.99 * data.num_items
        assert max(map(len, descriptions)) <= MAX_DESCRIPTION
        for text in (*titles, *descriptions):
            assert not text.startswith("['")
            assert not any(mark in text for mark in ("<br", "<b>", "</", "&amp;", "&quot;", "&ndash;"))

    def test_instruments_have_none(self):
        data = AmazonReviews2018("Musical_Instruments", data_dir="nowhere")
        assert set(data.item_descriptions()) == {""}

    def test_the_catalogue_is_read_once(self, tmp_path, monkeypatch):
        folder = tmp_path / "Office_Products"
        folder.mkdir()
        entry = {
            "item": 0,
            "title": "Glue &ndash; strong",
            "brand": "Acme",
            "categories": None,
            "description": "['Wet']",
        }
        path = folder / "items.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(entry).encode()))
        monkeypatch.setattr(AmazonReviews2018, "num_items", 1)
        data = AmazonReviews2018("Office_Products", data_dir=str(tmp_path))
        assert data.item_titles() == ["Glue – strong"]
        path.unlink()
        assert data.item_descriptions() == ["Acme. Wet."]


class TestAmazon2014:
    """Users 0, 1, ... begin with item i0, i1, ... and continue with the next ones."""

    @pytest.fixture
    def web(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setitem(amazon2014.PUBLISHED, TOYS, amazon2014.Counts(6, 7, 30))
        folder = tmp_path / "web"
        folder.mkdir()
        reviews = [
            {"reviewerID": f"u{user}", "asin": f"i{(user + day) % 7}", "unixReviewTime": day}
            for user in range(6)
            for day in range(5)
        ]
        self.write(folder / f"reviews_{TOYS}_5.json.gz", map(json.dumps, reviews))
        # As in the originals, each line is a Python literal, and most are of items that are not in the core.
        metadata = [
            {"asin": "other", "title": "Other"},
            {"asin": "i6", "title": "Six &amp; more", "related": {"also_viewed": ["i0"]}},
            *({"asin": f"i{item}", "title": f"Title {item}"} for item in (1, 0, 2, 3)),
            {"asin": "i4", "description": "has no title"},
        ]
        self.write(folder / f"meta_{TOYS}.json.gz", map(repr, metadata))
        return folder

    def write(self, path: Path, lines) -> None:
        path.write_bytes(gzip.compress("\n".join(lines).encode()))

    def data(self, tmp_path, url: str) -> AmazonReviews2014:
        return AmazonReviews2014(TOYS, cache_dir=str(tmp_path / "cache"), base_url=url)

    def test_titles_come_from_the_metadata_of_a_download(self, web, tmp_path):
        with serve(web) as url:
            data = self.data(tmp_path, url)
            data.prepare_data()
            assert not (tmp_path / "cache" / f"meta_{TOYS}.json.gz").exists(), "is downloaded when asked for"
            expected = ["Title 0", "Title 1", "Title 2", "Title 3", "i4", "i5", "Six & more"]
            assert data.item_titles() == expected
            assert data.item_names() == [f"i{item}" for item in range(7)]
        # Without the server: all is in the cache.
        later = self.data(tmp_path, url)
        later.prepare_data()
        later.setup("predict")
        assert later.item_titles() == expected
        assert [later.item_titles()[item - 1] for item in later.protocol.sequences[4][:3]] == ["i4", "i5", "Six & more"]

    def test_prepared_files_go_by_their_ids(self, tmp_path):
        data = AmazonReviews2014(TOYS, data_dir=str(tmp_path))
        assert data.item_titles()[:3] == data.item_names()[:3] == ["1", "2", "3"]

    def test_a_cache_of_an_older_version_says_what_to_delete(self, web, tmp_path):
        with serve(web) as url:
            data = self.data(tmp_path, url)
            data.prepare_data()
            (tmp_path / "cache" / f"{TOYS}.asins.txt").unlink()
            with pytest.raises(
                FileNotFoundError, match=rf"no {TOYS}.asins.txt, .*: delete .*{TOYS}.txt to convert the"
            ):
                data.item_titles()
            (tmp_path / "cache" / f"{TOYS}.txt").unlink()
            data.prepare_data()
            assert data.item_titles()[0] == "Title 0"

    def test_a_list_that_was_cut_short_gets_a_sentence(self, web, tmp_path):
        with serve(web) as url:
            data = self.data(tmp_path, url)
            data.prepare_data()
            (tmp_path / "cache" / f"{TOYS}.asins.txt").write_text("i0\ni1\n")
            with pytest.raises(ValueError, match=r"asins.txt has 2 lines, but there are 7 items: delete it and"):
                data.item_titles()

    @pytest.mark.parametrize("line", ["{'title': 'no asin'}", "not a dict", "{'asin': 'i0', 'title': "])
    def test_a_line_that_is_no_metadata_gets_a_sentence(self, web, tmp_path, line):
        self.write(web / f"meta_{TOYS}.json.gz", ["{'asin': 'i1'}", line])
        with serve(web) as url:
            data = self.data(tmp_path, url)
            data.prepare_data()
            with pytest.raises(ValueError, match=rf"meta_{TOYS}.json.gz, line 2: not metadata with an asin"):
                data.item_titles()
