"""Interactions from a file of the user."""

from __future__ import annotations

import csv
import gzip
import random
import sys
import warnings
from datetime import UTC, datetime

import pytest

from examples.recsys.__main__ import main
from examples.recsys.data.interactions import Interactions
from examples.recsys.data.protocol import LeaveOneOut, TimeSplit

ROWS = """user,item,timestamp
Zoë,red pen,30
ann,blue pen,15
Zoë,"ink, black",10
Zoë,blue pen,20
ann,red pen,15
ann,red pen,16
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(ROWS)
    return path


def quiet(path, **kwargs) -> Interactions:
    """Data set up without the warning about unsorted rows."""
    data = Interactions(str(path), **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.prepare_data()
        data.setup("fit")
    return data


def sequences(data: Interactions) -> dict[object, list[object]]:
    loaded = data.protocol.sequences
    return {
        user: [data.item_ids[item - 1] for item in loaded[index].tolist()] for index, user in enumerate(data.user_ids)
    }


def table(path, header: str, rows: list[tuple[object, ...]]):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


class TestText:
    def test_ids_of_any_kind_are_numbered_and_told_back(self, path):
        data = quiet(path)
        assert data.user_ids == ["Zoë", "ann"]
        assert data.num_items == 3
        assert data.item_titles() == ["ink, black", "blue pen", "red pen"]
        assert [data.protocol.sequences[user].tolist() for user in range(2)] == [[1, 2, 3], [2, 3, 3]]
        assert data.protocol.sequences.times.tolist() == [10, 20, 30, 15, 15, 16]

    def test_rows_out_of_order_are_sorted_with_a_warning(self, path):
        with pytest.warns(UserWarning, match=r"(?s)log.csv:.*\n  Rows are not in order of time for 1 of 2 users: sor"):
            Interactions(str(path)).setup("fit")

    def test_a_file_that_leaves_nothing_to_decide_raises_no_warning(self, tmp_path):
        rows = [(user, item, day) for day, item in enumerate("xyzx") for user in "ab"]
        path = table(tmp_path / "log.csv", "user,item,timestamp", rows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = Interactions(str(path))
            data.setup("fit")
        assert data.report() == []

    def test_columns_delimiter_and_gzip(self, tmp_path):
        path = tmp_path / "log.tsv.gz"
        text = "\ufeffrating\twho\twhat\twhen\n" + "".join(f"5\tu\t{item}\t{item}\n" for item in (1, 2, 3))
        path.write_bytes(gzip.compress(text.encode()))
        data = quiet(path, user_column="who", item_column="what", time_column="when", delimiter="\t")
        assert sequences(data) == {"u": ["1", "2", "3"]}

    @pytest.mark.parametrize(
        ("times", "unit"),
        [
            (["1717113600", "1717113600.9", "1717113601"], "s"),
            (["1717113600000", "1717113600900", "1717113601000"], "ms"),
            (["2024-05-31", "2024-05-31T00:00:00.9", "2024-05-31T02:00:01+02:00"], "s"),
        ],
    )
    def test_times_are_numbers_or_dates(self, tmp_path, times, unit):
        path = table(tmp_path / "log.csv", "user,item,timestamp", [("u", "x", time) for time in times])
        assert quiet(path, time_unit=unit).protocol.sequences.times.tolist() == [
            1_717_113_600,
            1_717_113_600,
            1_717_113_601,
        ]

    def test_the_split_decides_on_protocol_and_masking(self, tmp_path):
        rows = [(user, user + step, step) for user in range(3) for step in range(5)]
        path = table(tmp_path / "log.csv", "user,item,timestamp", rows)
        by_user, by_time = quiet(path), quiet(path, split="time")
        assert isinstance(by_user.protocol, LeaveOneOut)
        assert isinstance(by_time.protocol, TimeSplit)
        assert (by_user.mask_history, by_time.mask_history) == (True, False)
        assert quiet(path, split="time", mask_history=True).mask_history
        (batch,) = by_time.test_dataloader()
        assert batch["times"].tolist() == [[0, 1, 2, 3]] * 2

    def test_k_core_drops_who_is_rare(self, tmp_path):
        rows = [(user, item, 1) for user in "ab" for item in "xyz"] + [("c", "x", 1), ("c", "w", 2), ("c", "w", 2)]
        path = table(tmp_path / "log.csv", "user,item,timestamp", [*rows, ("d", "x", 1)])
        assert sequences(quiet(path, k_core=2, split="time")) == {
            "a": ["x", "y", "z"],
            "b": ["x", "y", "z"],
            "c": ["x", "w", "w"],
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("user,item,time\na,x,1\n", r"has no column timestamp, only user, item, time: set user_column"),
            ("", "has no column user, item, timestamp, only none at all"),
            (
                "user, item, timestamp\na, x, 1\n",
                r"no column item, timestamp, .*: its names ' item', ' timestamp' begin with a space: remove the spaces "
                r"from the file, or set delimiter=', ' if",
            ),
            ("user ,item,timestamp\na ,x,1\n", "its names 'user ' begin or end with spaces: remove them"),
            (" user:token,item,timestamp\na,x,1\n", "its names ' user:token' begin with a space: "),
            ("user,item,timestamp\n", "log.csv has no interactions$"),
            ("user,item,timestamp\na,x,1\na,,2\n", "line 3 has no item: drop such rows"),
            ("user,item,timestamp\na,x,1\na,x\n", "line 3 has no timestamp: drop such rows"),
            (
                "user,item,timestamp\na,x,yesterday\n",
                "line 2: timestamp must be a number or an ISO date, as 2024-05-31T12:30:00, got 'yesterday'",
            ),
            ("user,item,timestamp\na,x,nan\n", "line 2: timestamp must be a number or an ISO date, got 'nan'"),
            (
                "user,item,timestamp\na,x,1717113600000\n",
                r"log.csv, column timestamp: 1717113600000 \(line 2\) is in the year 56383 in seconds; it looks like "
                "milliseconds: set time_unit='ms'",
            ),
            (
                ROWS + "bob,red pen,1\n",
                r"user 'bob' has 1 interaction, but split='leave_one_out' needs 3 \(1 of 3 users has",
            ),
        ],
    )
    def test_bad_files_get_a_sentence(self, path, text, message):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            quiet(path)

    def test_the_delimiter_that_is_advised_for_spaces_reads_the_file(self, path):
        spaced = "user, item, timestamp\nann, x, 1\nann, y, 2\nann, z, 3\n"
        path.write_text(spaced)
        assert sequences(quiet(path, delimiter=", ")) == {"ann": ["x", "y", "z"]}

    def test_a_core_of_nothing_gets_a_sentence(self, path):
        with pytest.raises(ValueError, match=r"has no interactions in its 4-core\."):
            quiet(path, k_core=4)

    def test_a_missing_file_gets_a_sentence(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none.csv' does not exist"):
            Interactions(str(tmp_path / "none.csv")).num_items  # noqa: B018

    @pytest.mark.parametrize(("argument", "value"), [("split", "random"), ("time_unit", "h"), ("k_core", 0)])
    def test_bad_arguments_get_a_sentence(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .*got {value!r}"):
            Interactions("log.csv", **{argument: value})


class TestParquet:
    def test_ids_keep_their_type_and_times_may_be_dates(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        moments = [datetime(2024, 5, 31, second=second, tzinfo=UTC) for second in (2, 0, 1)]
        for number, times in enumerate(
            [
                pa.array([1_717_113_602, 1_717_113_600, 1_717_113_601]),
                pa.array(moments, pa.timestamp("ns", "UTC")),
                pa.array([moment.replace(tzinfo=None) for moment in moments], pa.timestamp("ms")),
            ]
        ):
            path = tmp_path / f"{number}.parquet"
            pq.write_table(
                pa.table({"user": [7, 7, 7], "extra": [0, 0, 0], "item": [5, 6, 5], "timestamp": times}), path
            )
            data = quiet(path)
            assert sequences(data) == {7: [6, 5, 5]}
            assert data.protocol.sequences.times.tolist() == [1_717_113_600, 1_717_113_601, 1_717_113_602]
            assert data.item_titles() == ["6", "5"]

    def test_bad_tables_get_a_sentence(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "log.parquet"
        pq.write_table(pa.table({"user": [1, 1], "item": [1, None], "timestamp": [1, 2]}), path)
        with pytest.raises(ValueError, match="row 2 has no item: drop such rows"):
            quiet(path)
        with pytest.raises(ValueError, match="has no column when, only user, item, timestamp"):
            quiet(path, time_column="when")

    def test_without_pyarrow_there_is_a_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        (tmp_path / "log.parquet").touch()
        with pytest.raises(ImportError, match=r"log.parquet needs pyarrow: pip install pyarrow, or convert"):
            quiet(tmp_path / "log.parquet")


class TestTitles:
    ROWS = """user,item,timestamp,name
a,17,1,
a,4,2,"Ink, black"
a,17,3,Red pen
b,17,1,Red pen (new)
b,8,2,
b,4,3,
"""

    def test_the_first_title_of_an_item_counts_and_without_one_it_goes_by_its_id(self, tmp_path):
        (tmp_path / "log.csv").write_text(self.ROWS)
        data = quiet(tmp_path / "log.csv", title_column="name")
        assert data.item_names() == ["17", "4", "8"]
        assert data.item_titles() == ["Red pen", "Ink, black", "8"]

    def test_without_a_column_of_titles_items_go_by_their_ids(self, tmp_path):
        (tmp_path / "log.csv").write_text(self.ROWS)
        assert quiet(tmp_path / "log.csv").item_titles() == ["17", "4", "8"]

    def test_a_missing_column_gets_a_sentence(self, path):
        with pytest.raises(ValueError, match=r"has no column name, only user, item, timestamp: .* and title_column"):
            quiet(path, title_column="name")

    def test_parquet_has_titles_too(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"user": [1, 1, 1], "item": [5, 6, 5], "timestamp": [1, 2, 3], "title": [None, "Six", "Five"]}
        pq.write_table(pa.table(columns), tmp_path / "log.parquet")
        assert quiet(tmp_path / "log.parquet", title_column="title").item_titles() == ["Five", "Six"]


def test_a_recommender_is_trained_on_a_file_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])
    draw = random.Random(0)
    rows = [(f"user {user}", f"item {draw.randrange(12)}", time) for user in range(60) for time in range(8)]
    table(tmp_path / "log.csv", "user,item,timestamp", rows)
    cli = main(
        [
            "fit",
            "--model=SASRec",
            "--model.hidden_size=8",
            "--data=examples.recsys.data.interactions.Interactions",
            "--data.path=log.csv",
            "--data.split=time",
            "--data.samples=prefix",
            "--data.max_length=5",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert cli.model.num_items == 12
    assert not cli.model.mask_history
    assert 0 < cli.test_metrics["test/unmasked/recall@10"] <= 1


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (
            "u,a,1717113600000\n",
            [],
            "log.csv, column timestamp: 1717113600000 (line 2) is in the year 56383 in seconds; ",
        ),
        ("u,a,noon\n", [], "log.csv, line 2: timestamp must be a number or an ISO date, as 2024-05-31T12:30:00, got "),
        ('u,"a,1\n', [], "log.csv, line 2: a quote is not closed as in CSV"),
        ("u,a,1\n", ["--data.path=none.csv"], "path='none.csv' does not exist (looked for "),
        (
            "u,a,1\n",
            [r"--data.delimiter=\s+"],
            r"delimiter='\\s+' looks like a pattern: give the text between",
        ),
        ("u,a,1\n", ["--data.title_file=titles.csv", "--data.split=time"], "log.csv: user 'u' has 1 interaction, but"),
    ],
)
def test_the_command_line_tells_a_fault_in_a_sentence(tmp_path, monkeypatch, capsys, text, options, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + text)
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        main(["fit", "--model=SASRec", "--data=Interactions", "--data.path=log.csv", *options])
    told = " ".join(f"{error.value} {capsys.readouterr().err}".split())
    assert sentence in told


def test_a_file_without_header_and_its_titles_are_set_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])
    rows = ["1::1193::5::978300760", "1::661::3::978302109", "1::914::3::978301968", "1::3::3::978301969"]
    (tmp_path / "ratings.dat").write_text("\n".join(rows))
    (tmp_path / "movies.dat").write_text("1193::Flå::x\n661::James::y\n914::Fair::z\n3::Old::z\n", encoding="latin-1")
    cli = main(
        [
            "--model=SASRec",
            "--data=Interactions",
            "--data.path=ratings.dat",
            "--data.delimiter=::",
            "--data.columns=[user,item,rating,timestamp]",
            "--data.title_file.path=movies.dat",
            "--data.title_file.delimiter=::",
            "--data.title_file.columns=[item,title,genres]",
            "--data.title_file.encoding=latin-1",
        ],
        run=False,
    )
    assert cli.datamodule.item_titles() == ["Flå", "Fair", "Old", "James"]


@pytest.mark.parametrize("drop", [False, True])
def test_rows_that_repeat_are_counted(tmp_path, drop):
    rows = [("a", "x", "1"), ("a", "x", "1.0"), ("a", "x", 2), ("a", "y", 3), ("a", "x", "1")]
    path = table(tmp_path / "log.csv", "user,item,timestamp", rows)
    with pytest.warns(UserWarning, match="2 of 5 rows repeat user, item and time of an earlier one"):
        report = Interactions(str(path), drop_duplicates=drop).report()
    done = "dropped." if drop else "kept (drop_duplicates=True keeps the first of each)."
    assert f"2 of 5 rows repeat user, item and time of an earlier one: {done}" in report
    assert sequences(quiet(path, drop_duplicates=drop)) == {"a": ["x", "x", "y"] if drop else ["x"] * 4 + ["y"]}


def test_what_a_core_drops_is_counted(tmp_path):
    rows = [(user, item, 1 + step) for user in "ab" for step, item in enumerate("xyz")] + [("c", "x", 1), ("d", "w", 2)]
    path = table(tmp_path / "log.csv", "user,item,timestamp", rows)
    assert quiet(path, k_core=2).report() == ["k_core=2 dropped 2 of 8 rows, with them 2 users and 1 item."]
