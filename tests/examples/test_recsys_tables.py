"""Real-world text files: delimiters, quotes, headers, encodings, separate title files."""

from __future__ import annotations

import gzip

import pytest

from examples.recsys.data import Interactions, TitleFile
from examples.recsys.data.lines import read_lines

HEADER = ("user", "item", "timestamp", "title")


def write(tmp_path, rows, delimiter: str, name: str = "log.txt", encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows), encoding=encoding, newline="")
    return path


def rows_of_titles(*titles: str) -> list[tuple[object, ...]]:
    return [("u", f"i{number}", number, title) for number, title in enumerate(titles)]


class TestDelimiter:
    @pytest.mark.parametrize(
        ("delimiter", "given"),
        [
            (",", ","),
            (";", ";"),
            ("|", "|"),
            (" ", " "),
            ("\t", "\t"),
            ("\t", r"\t"),
            ("\x01", r"\x01"),
            ("\u00a6", r"\u00a6"),
            ("::", "::"),
            ("\t\t", r"\t\t"),
            (" | ", " | "),
            ("||", "||"),
        ],
    )
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_any_text_separates_columns(self, tmp_path, delimiter, given, end):
        rows = [HEADER, *rows_of_titles("a", "Toy_Story_(1995)", "c:d")]
        path = tmp_path / "log.txt"
        path.write_text(end.join(delimiter.join(map(str, row)) for row in rows) + end + end, newline="")
        data = Interactions(str(path), delimiter=given, title_column="title")
        assert data.item_names() == ["i0", "i1", "i2"]
        assert data.item_titles() == ["a", "Toy_Story_(1995)", "c:d"]
        assert data.report() == []

    @pytest.mark.parametrize("delimiter", ["", "\n", '"', r"\s+", "a\\"])
    def test_what_can_not_separate_is_refused(self, delimiter):
        with pytest.raises(ValueError, match=r"delimiter(='| must be)"):
            Interactions("log.csv", delimiter=delimiter)

    @pytest.mark.parametrize("real", ["\t", "::", ";", "|", ","])
    @pytest.mark.parametrize("given", [",", "\t", "::"])
    def test_a_wrong_one_is_named_with_the_right_one(self, tmp_path, real, given):
        path = write(tmp_path, [HEADER[:3], ("u", "a", 1), ("u", "b", 2)], real)
        if real == given:
            return
        with pytest.raises(
            ValueError, match=r"log.txt has no column user, item, timestamp, only .*: its columns"
        ) as error:
            Interactions(str(path), delimiter=given).load_sequences()
        assert f"set delimiter={real!r}" in str(error.value)

    @pytest.mark.parametrize("delimiter", [",", "\t", "::"])
    def test_a_row_that_is_too_long_is_refused(self, tmp_path, delimiter):
        rows = [HEADER, *rows_of_titles("a", f"Ink{delimiter} black", "c")]
        with pytest.raises(ValueError, match=r"log.txt, line 3 has 5 columns, but there are names for 4 only"):
            Interactions(str(write(tmp_path, rows, delimiter)), delimiter=delimiter).load_sequences()

    @pytest.mark.parametrize("delimiter", [",", "\t", "::"])
    def test_one_at_the_end_of_a_row_is_none(self, tmp_path, delimiter):
        rows = [HEADER[:3], *((*row[:3], "") for row in rows_of_titles(*"abc"))]
        assert Interactions(str(write(tmp_path, rows, delimiter)), delimiter=delimiter).num_items == 3


OPENED = {
    "closes in a later row": ["a", '"The best of (cut', "b", "c", 'd" x', "e"],
    "closes at the end of a later row": ["a", '"The best of (cut', "b", 'c"', "d"],
    "never closes": ["a", '"The best of (cut', "b", "c"],
    "closes before the end": ["a", '"Heroes" by Bowie', "b"],
    "closes in the next row": ["a", '"one', 'two"', "b"],
}


class TestQuotes:
    @pytest.mark.parametrize("titles", OPENED.values(), ids=OPENED)
    @pytest.mark.parametrize(
        ("delimiter", "arguments"), [("\t", {}), ("::", {}), (",", {"quoted": False}), ("\t", {"quoted": False})]
    )
    def test_a_character_like_others_swallows_nothing(self, tmp_path, titles, delimiter, arguments):
        path = write(tmp_path, [HEADER, *rows_of_titles(*titles)], delimiter)
        data = Interactions(str(path), delimiter=delimiter, title_column="title", **arguments)
        assert data.item_names() == [f"i{number}" for number in range(len(titles))]
        assert data.item_titles() == titles

    @pytest.mark.parametrize("titles", OPENED.values(), ids=OPENED)
    @pytest.mark.parametrize("delimiter", [",", ";", "|"])
    @pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
    def test_of_csv_one_that_swallows_rows_is_refused(self, tmp_path, titles, delimiter, place):
        rows = [(*row[:3][:place], row[3], *row[place:3]) for row in [HEADER, *rows_of_titles(*titles)]]
        path = write(tmp_path, rows, delimiter)
        with pytest.raises(ValueError, match=r"log.txt, lines? 3.*: a quote is .*closed .*Set quoted=False"):
            Interactions(str(path), delimiter=delimiter, title_column="title").load_sequences()

    def test_in_a_column_that_is_not_read_it_is_refused_too(self, tmp_path):
        path = write(tmp_path, [HEADER, *rows_of_titles("a", '"b', 'c"', "d")], ",")
        with pytest.raises(ValueError, match="lines 3 to 4: a quote is closed in another row"):
            Interactions(str(path)).load_sequences()

    @pytest.mark.parametrize(("delimiter", "quoted"), [(",", None), (";", None), (",", True), ("\t", True)])
    def test_values_of_csv_may_hold_anything(self, tmp_path, delimiter, quoted):
        titles = [f"Ink{delimiter} black", 'The "best"', "two\nlines", "x"]
        quotes = ['"' + title.replace('"', '""') + '"' for title in titles]
        path = write(tmp_path, [HEADER, *rows_of_titles(*quotes)], delimiter)
        data = Interactions(str(path), delimiter=delimiter, title_column="title", quoted=quoted)
        assert data.item_titles() == titles
        assert data.report() == ["1 row spans several lines in quotes: quoted=False reads quotes as plain characters."]

    def test_lines_that_look_like_rows_are_one_value_if_told_so(self, tmp_path):
        path = write(tmp_path, [HEADER, *rows_of_titles('"two\nu,x,1,lines"', "b", "c")], ",")
        with pytest.raises(ValueError, match="or quoted=True if these lines are one row"):
            Interactions(str(path), title_column="title").load_sequences()
        assert Interactions(str(path), title_column="title", quoted=True).item_titles()[0] == "two\nu,x,1,lines"

    def test_quotes_that_were_kept_are_counted(self, tmp_path):
        rows = [HEADER[:3], *(("u", f'"i{number}"', number) for number in range(3))]
        path = write(tmp_path, rows, "\t")
        with pytest.warns(UserWarning, match="3 values begin and end with a quote, which was kept: quoted=True"):
            assert Interactions(str(path), delimiter="\t").item_names() == ['"i0"', '"i1"', '"i2"']
        assert Interactions(str(path), delimiter="\t", quoted=True).item_names() == ["i0", "i1", "i2"]

    def test_names_in_quotes_get_a_sentence(self, tmp_path):
        path = write(tmp_path, [[f'"{name}"' for name in HEADER], ("u", "a", 1, "t")], "\t")
        with pytest.raises(ValueError, match="its names are in quotes: set quoted=True"):
            Interactions(str(path), delimiter="\t").load_sequences()

    def test_they_need_a_delimiter_of_one_character(self):
        with pytest.raises(ValueError, match="quoted=True needs a delimiter of one character, got '::'"):
            Interactions("log.csv", delimiter="::", quoted=True)


class TestHeader:
    MOVIELENS = "1::1193::5::978300760\n1::661::3::978302109\n1::914::3::978301968\n"
    COLUMNS = ("user", "item", "rating", "timestamp")

    def test_a_file_without_one_is_read_by_the_names_given(self, tmp_path):
        (tmp_path / "ratings.dat").write_text(self.MOVIELENS)
        data = Interactions(str(tmp_path / "ratings.dat"), delimiter="::", columns=self.COLUMNS)
        assert data.item_names() == ["1193", "914", "661"]

    def test_names_of_ones_own_are_found(self, tmp_path):
        (tmp_path / "ratings.dat").write_text(self.MOVIELENS)
        data = Interactions(
            str(tmp_path / "ratings.dat"), "who", "what", "when", delimiter="::", columns=["who", "what", "_", "when"]
        )
        assert data.item_names() == ["1193", "914", "661"]

    @pytest.mark.parametrize(
        ("text", "arguments", "message"),
        [
            ("1,7,978300760\n", {}, r"only 1, 7, 978300760: if the first line is a row, give .* as columns=\[...\]"),
            (
                "u,i,t\n",
                {"columns": ["user", "item", "when"]},
                "has no column timestamp, only user, item, when: user_column",
            ),
            (
                "user,item,timestamp\nu,i,1\n",
                {"columns": ["user", "item", "timestamp"]},
                "line 1: timestamp must be .*got 'timestamp'; leave columns out if the first line is a header",
            ),
            (
                "1::7::978300760\n",
                {"columns": ["user", "item", "timestamp"]},
                r"line 1 has 1 column, but columns=\['user', 'item', 'timestamp'\] has 3 with delimiter=','",
            ),
            ("user,item,timestamp,item\nu,i,1,j\n", {}, "has 2 columns item: rename all but one"),
        ],
    )
    def test_a_wrong_one_gets_a_sentence(self, tmp_path, text, arguments, message):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            Interactions(str(tmp_path / "log.csv"), **arguments).load_sequences()

    @pytest.mark.parametrize("columns", ["user,item,timestamp", ["user", "item", "item"]])
    def test_columns_are_a_list_of_different_names(self, columns):
        with pytest.raises(ValueError, match="columns must be a list of different names, one per column, got"):
            Interactions("log.csv", columns=columns)

    @pytest.mark.parametrize("suffix", ["", ":token"])
    def test_types_of_recbole_are_no_part_of_a_name(self, tmp_path, suffix):
        (tmp_path / "ml.inter").write_text(
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            "1\t1193\t5\t978300760\n1\t661\t3\t978302109\n1\t914\t3\t978301968.0\n"
        )
        (tmp_path / "ml.item").write_text(
            "item_id:token\tmovie_title:token_seq\tclass:token\n661\tJames\tx\n1193\tOne Flew\ty\n914\tFair\tz\n"
        )
        data = Interactions(
            str(tmp_path / "ml.inter"),
            f"user_id{suffix}",
            f"item_id{suffix}",
            "timestamp",
            delimiter="\t",
            title_file=TitleFile(str(tmp_path / "ml.item"), f"item_id{suffix}", "movie_title", delimiter="\t"),
        )
        assert data.item_names() == ["1193", "914", "661"]
        assert data.item_titles() == ["One Flew", "Fair", "James"]


class TestEncoding:
    ROWS = ("user,item,timestamp,title\n", "u,é,1,Amélie\n", "u,ü,2,Brücke\n", "u,c,3,c\n")
    TEXT = "".join(ROWS)

    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    @pytest.mark.parametrize(
        ("written", "given"),
        [
            ("utf-8", None),
            ("utf-8-sig", None),
            ("utf-8-sig", "utf-8"),
            ("utf-8-sig", "utf-8-sig"),
            ("latin-1", "latin-1"),
            ("cp1252", "cp1252"),
            ("utf-16", "utf-16"),
            ("utf-16-le", "utf-16-le"),
            ("utf-16-be", "utf-16-be"),
            ("utf-32", "utf-32"),
        ],
    )
    def test_the_right_one_reads_the_file(self, tmp_path, written, given, packed):
        content = self.TEXT.encode(written)
        (tmp_path / "log.csv").write_bytes(gzip.compress(content) if packed else content)
        arguments = {} if given is None else {"encoding": given}
        data = Interactions(str(tmp_path / "log.csv"), title_column="title", **arguments)
        assert data.item_titles() == ["Amélie", "Brücke", "c"]

    @pytest.mark.parametrize(
        ("written", "given", "message"),
        [
            ("utf-16", "utf-8", "log.csv is marked as UTF-16: set encoding='utf-16', or save it as UTF-8"),
            ("utf-32", "utf-8", "log.csv is marked as UTF-32: set encoding='utf-32'"),
            ("utf-8-sig", "latin-1", "log.csv is marked as UTF-8: set encoding='utf-8'"),
            ("utf-16", "latin-1", "log.csv is marked as UTF-16: set encoding='utf-16'"),
            (
                "utf-16-le",
                "latin-1",
                "log.csv has zero bytes, so it is UTF-16-LE or not text: set enc",
            ),
            ("utf-32-be", "utf-8", "set encoding='utf-32-be'"),
            ("utf-16-be", "utf-8", "set encoding='utf-16-be'"),
            ("latin-1", "utf-8", "log.csv, line 2: byte 0xe9 is not UTF-8: set encoding='latin-1'"),
            ("cp1252", "utf-8", "line 2: byte 0xe9 is not UTF-8: .* or cp1252"),
            ("utf-8", "ascii", "line 2: byte 0xc3 is not ASCII"),
        ],
    )
    def test_a_wrong_one_is_named_with_the_right_one(self, tmp_path, written, given, message):
        (tmp_path / "log.csv").write_bytes(self.TEXT.encode(written))
        with pytest.raises(ValueError, match=message):
            Interactions(str(tmp_path / "log.csv"), encoding=given).load_sequences()

    def test_the_line_is_right_far_into_the_file(self, tmp_path):
        lines = [b"user,item,timestamp\n", *(b"u,a,1\n" for _ in range(9_000)), b"u,\xe9,1\n"]
        (tmp_path / "log.csv").write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match="line 9002: byte 0xe9"):
            list(read_lines(tmp_path / "log.csv"))

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="Python has no encoding='utf-9': set 'utf-8'"):
            Interactions("log.csv", encoding="utf-9")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"PK\x03\x04...", "is a zip archive or a spreadsheet: unpack it, or save it as CSV"),
            (gzip.compress(TEXT.encode(), mtime=0)[:-9], "is a damaged gzip file"),
        ],
    )
    def test_what_is_no_text_gets_a_sentence(self, tmp_path, content, message):
        (tmp_path / "log.csv").write_bytes(content)
        with pytest.raises(ValueError, match=f"log.csv {message}"):
            Interactions(str(tmp_path / "log.csv")).load_sequences()

    def test_a_folder_gets_a_sentence(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder: give the path of a file in it"):
            Interactions(str(tmp_path)).load_sequences()


class TestTitleFile:
    LOG = "user,item,timestamp\na,17,1\na,4,2\na,8,3\n"

    @pytest.fixture
    def log(self, tmp_path) -> str:
        (tmp_path / "log.csv").write_text(self.LOG)
        return str(tmp_path / "log.csv")

    @pytest.mark.parametrize(
        ("content", "arguments"),
        [
            ("item,title\n4,Ink\n8,Nib\n17,Pen\n99,Other\n", {}),
            ("name;id\nPen;17\nInk;4\nNib;8\n", {"item_column": "id", "title_column": "name", "delimiter": ";"}),
            ("17::Pen::x\n4::Ink::y\n8::Nib::z\n", {"columns": ["item", "title", "_"], "delimiter": "::"}),
        ],
    )
    def test_titles_are_found_by_what_items_are_called(self, log, tmp_path, content, arguments):
        (tmp_path / "titles").write_text(content)
        data = Interactions(log, title_file=TitleFile(str(tmp_path / "titles"), **arguments))
        assert data.item_titles() == ["Pen", "Ink", "Nib"]
        assert data.report() == []

    def test_a_path_is_enough(self, log, tmp_path):
        (tmp_path / "titles.csv").write_text("item,title\n4,Ink\n8,Nib\n17,Pen\n")
        assert Interactions(log, title_file=str(tmp_path / "titles.csv")).item_titles() == ["Pen", "Ink", "Nib"]

    def test_it_has_an_encoding_of_its_own(self, log, tmp_path):
        (tmp_path / "titles.csv").write_text("item,title\n4,Tusche\n8,Hülse\n17,Füller\n", encoding="latin-1")
        with pytest.raises(ValueError, match=r"titles.csv, line 3: byte 0xfc is not UTF-8: set encoding='latin-1'"):
            Interactions(log, title_file=str(tmp_path / "titles.csv")).item_titles()
        file = TitleFile(str(tmp_path / "titles.csv"), encoding="latin-1")
        assert Interactions(log, title_file=file).item_titles() == ["Füller", "Tusche", "Hülse"]

    def test_items_without_a_title_and_with_several_are_counted(self, log, tmp_path):
        (tmp_path / "titles.csv").write_text("item,title\n4,Ink\n4,Black ink\n8,\n17,Pen\n17,Pen\n")
        data = Interactions(log, title_file=str(tmp_path / "titles.csv"))
        with pytest.warns(UserWarning, match="What was decided in reading"):
            assert data.item_titles() == ["Pen", "Ink", "8"]
        assert data.report() == [
            "1 of 3 items has no title in titles.csv: the name serves as title.",
            "1 item has several titles in titles.csv: the first counts.",
        ]

    def test_one_of_other_items_is_refused(self, log, tmp_path):
        (tmp_path / "titles.csv").write_text("item,title\nB01,Ink\n")
        with pytest.raises(ValueError, match=r"titles of none of the items of .*log.csv: .*such as 'B01', log.csv"):
            Interactions(log, title_file=str(tmp_path / "titles.csv")).item_titles()

    def test_a_missing_column_names_the_arguments_of_the_file(self, log, tmp_path):
        (tmp_path / "titles.csv").write_text("id,name\n4,Ink\n")
        with pytest.raises(ValueError, match=r"titles.csv has no column item, title, only id, name: set item_col"):
            Interactions(log, title_file=str(tmp_path / "titles.csv")).item_titles()

    def test_a_column_beside_it_is_refused(self, log):
        with pytest.raises(ValueError, match="come from title_column='title' or from a title_file: give one of them"):
            Interactions(log, title_column="title", title_file="titles.csv")

    def test_numbers_of_parquet_are_names(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(
            pa.table({"user": [1, 1, 1], "item": [5, 6, 7], "timestamp": [1, 2, 3]}), tmp_path / "log.parquet"
        )
        (tmp_path / "titles.csv").write_text("item,title\n7,Seven\n6,Six\n5,Five\n")
        data = Interactions(str(tmp_path / "log.parquet"), title_file=str(tmp_path / "titles.csv"))
        assert data.item_titles() == ["Five", "Six", "Seven"]
