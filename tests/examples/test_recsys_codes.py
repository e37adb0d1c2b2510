"""Semantic ids: reading, writing, refused files, and statistics."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from examples.recsys.semantic_ids.codes import SemanticIds

SHARED = Path(__file__).parents[2] / "../shared/data"
CODES = [[3, 0, 7], [0, 2, 2], [3, 0, 7], [5, 1, 0]]
"""Of items 1 to 4."""


def semantic_ids(codes: list[list[int]] = CODES) -> SemanticIds:
    return SemanticIds(torch.tensor(codes))


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows(first: int, codes: list[list[int]] = CODES) -> list[str]:
    return [",".join(map(str, [item, *each])) for item, each in enumerate(codes, start=first)]


class TestReport:
    def test_sizes(self):
        ids = semantic_ids()
        assert (ids.num_items, ids.levels, ids.codebook_size) == (4, 3, 8)

    def test_items_that_share_their_codes_are_all_counted(self):
        assert semantic_ids().collisions() == 2
        assert semantic_ids([[1, 2], [2, 1], [1, 1], [2, 2]]).collisions() == 0
        assert semantic_ids([[1, 2], [1, 2], [0, 0], [1, 2], [0, 0]]).collisions() == 5

    def test_use_is_a_share_of_the_largest_codebook(self):
        assert semantic_ids().usage() == pytest.approx([3 / 8, 3 / 8, 3 / 8])
        assert semantic_ids([[0, 0], [1, 0], [2, 3], [3, 0]]).usage() == pytest.approx([1.0, 0.5])

    def test_agrees_with_plain_counting(self, generator):
        codes = torch.randint(6, (90, 3), generator=generator)
        ids = SemanticIds(codes)
        counts = Counter(map(tuple, codes.tolist()))
        assert 0 < ids.collisions() == sum(count for count in counts.values() if count > 1) < 90
        assert ids.usage() == pytest.approx([len(set(level)) / 6 for level in zip(*codes.tolist(), strict=True)])

    @pytest.mark.parametrize(
        "codes",
        [
            torch.tensor([1, 2, 3]),
            torch.zeros(2, 2, 2, dtype=torch.long),
            torch.zeros(0, 3, dtype=torch.long),
            torch.zeros(3, 0, dtype=torch.long),
            torch.tensor([[1.0, 2.0]]),
            torch.tensor([[1, 2]], dtype=torch.int32),
            torch.tensor([[1, 2], [0, -1]]),
        ],
        ids=lambda codes: f"{tuple(codes.shape)}-{codes.dtype}",
    )
    def test_other_tensors_are_refused(self, codes):
        with pytest.raises(ValueError, match="codes"):
            SemanticIds(codes)


class TestFile:
    @pytest.mark.parametrize("name", ["codes.csv", "codes.csv.gz", "new/folders/codes.csv.gz"])
    def test_what_is_written_is_read(self, tmp_path, name):
        ids = semantic_ids()
        ids.write(tmp_path / name)
        read = SemanticIds.read(tmp_path / name, 4)
        assert torch.equal(read.codes, ids.codes)
        assert read.codes.dtype == torch.long
        assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]

    def test_form_is_a_header_and_items_from_one(self, tmp_path):
        semantic_ids().write(str(tmp_path / "codes.csv"))
        assert (tmp_path / "codes.csv").read_text().splitlines() == ["item,c1,c2,c3", *rows(1)]
        semantic_ids().write(tmp_path / "codes.csv.gz")
        content = gzip.decompress((tmp_path / "codes.csv.gz").read_bytes())
        assert content == (tmp_path / "codes.csv").read_bytes()

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        semantic_ids().write(tmp_path / "codes.csv")

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", stop)
        monkeypatch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            semantic_ids([[9, 9]]).write(tmp_path / "codes.csv")
        assert torch.equal(SemanticIds.read(tmp_path / "codes.csv", 4).codes, torch.tensor(CODES))

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("name", ["codes.csv", "codes.csv.gz"])
    def test_items_count_from_zero_or_one_in_any_order(self, tmp_path, first, name):
        lines = rows(first)
        random.shuffle(lines)
        path = write_text(tmp_path / name, "\n".join(["item,c1,c2,c3", *lines]) + "\n")
        assert torch.equal(SemanticIds.read(path, 4).codes, torch.tensor(CODES))

    @pytest.mark.parametrize("levels", [1, 2, 5])
    def test_any_number_of_levels(self, tmp_path, levels):
        ids = SemanticIds(torch.arange(3 * levels).view(3, levels))
        ids.write(tmp_path / "codes.csv")
        assert torch.equal(SemanticIds.read(tmp_path / "codes.csv", 3).codes, ids.codes)

    def test_windows_line_ends_do_no_harm(self, tmp_path):
        path = tmp_path / "codes.csv"
        path.write_bytes("\r\n".join(["item,c1,c2,c3", *rows(1), ""]).encode())
        assert torch.equal(SemanticIds.read(path, 4).codes, torch.tensor(CODES))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["2,0,0", "1,x,0"], "line 3"),
            (["1,0,0", "2,0.5,1"], "line 3"),
            (["1,0,0", "2,0,"], "line 3"),
            (["1,0,0", "2,0"], "line 3"),
            (["1,0,0", "2,0,1,5"], "line 3"),
            (["1", "2"], "line 2"),
            (["1,0,0", "2,0,-3"], "-3"),
            (["1,0,0", "2,0,1", "1,0,2"], "line 4.*1"),
        ],
    )
    def test_bad_rows_are_named_with_file_and_line(self, tmp_path, lines, message):
        path = write_text(tmp_path / "codes.csv", "\n".join(["item,c1,c2", *lines]) + "\n")
        with pytest.raises(ValueError, match=f"codes.csv.*{message}"):
            SemanticIds.read(path, 2)

    @pytest.mark.parametrize("header", ["", "product,c1,c2", "1,0,0", "item"])
    def test_a_bad_header_is_named(self, tmp_path, header):
        path = write_text(tmp_path / "codes.csv", f"{header}\n1,0,1\n2,1,0\n")
        with pytest.raises(ValueError, match=r"codes.csv.*item,c1"):
            SemanticIds.read(path, 2)

    @pytest.mark.parametrize("text", ["", "item,c1,c2\n"])
    def test_an_empty_file_gets_a_sentence(self, tmp_path, text):
        path = write_text(tmp_path / "codes.csv", text)
        with pytest.raises(ValueError, match=r"codes.csv"):
            SemanticIds.read(path, 2)

    @pytest.mark.parametrize(
        ("items", "num_items", "named"),
        [
            ([1, 2, 4], 4, "3"),
            ([0, 1, 3], 4, "2"),
            ([1, 2, 3], 5, "4|5"),
            ([0, 1, 2, 3, 4], 4, "5|4"),
            ([1, 2, 3, 4], 3, "4"),
            ([2, 3, 4], 3, "1|4"),
            ([-1, 0, 1], 2, "-1"),
        ],
    )
    def test_missing_and_foreign_items_are_named(self, tmp_path, items, num_items, named):
        path = write_text(tmp_path / "codes.csv", "item,c1\n" + "".join(f"{item},0\n" for item in items))
        with pytest.raises(ValueError, match=rf"codes.csv.*(?<!\d)({named})(?!\d)"):
            SemanticIds.read(path, num_items)

    def test_no_file_gets_a_sentence(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.csv.*semantic"):
            SemanticIds.read(tmp_path / "nowhere.csv", 2)

    @pytest.mark.parametrize("name", ["codes.csv", "codes.csv.gz"])
    @pytest.mark.parametrize("content", [b"item,c1\n1,0\n2,1\n", gzip.compress(b"item,c1\n1,0\n2,1\n", mtime=0)])
    def test_the_content_tells_whether_it_is_gzipped(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        assert SemanticIds.read(tmp_path / name, 2).codes.tolist() == [[0], [1]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (gzip.compress(b"item,c1\n1,0\n2,1\n", mtime=0)[:-9], "is a damaged gzip file"),
            ("item,c1\n1,0\n2,1\n".encode("utf-16"), "is marked as UTF-16: save it as UTF-8"),
        ],
    )
    def test_files_that_are_no_text_get_a_sentence(self, tmp_path, content, message):
        (tmp_path / "codes.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"codes.csv {message}"):
            SemanticIds.read(tmp_path / "codes.csv", 2)


@pytest.mark.parametrize(
    ("name", "num_items", "levels", "unique"),
    [
        ("amazon2014/Beauty.sid.rqvae_llama7b.csv.gz", 12_101, 4, 12_101),
        ("amazon2014/Beauty.sid.rqkmeans_llama7b.csv.gz", 12_101, 4, 12_101),
        ("amazon2014/Beauty.sid.letter.csv.gz", 12_101, 4, 12_088),
        ("amazon2018/Industrial_and_Scientific/sid.rqvae_qwen.csv.gz", 3_686, 3, 3_670),
        ("amazon2018/Office_Products/sid.rqvae_qwen.csv.gz", 3_459, 3, 3_444),
        ("amazon2018/Musical_Instruments/sid.letter.csv.gz", 9_922, 4, 9_897),
    ],
)
def test_prepared_files_have_their_counts(name, num_items, levels, unique):
    if not SHARED.exists():
        pytest.skip("no ../shared/data")
    ids = SemanticIds.read(SHARED / name, num_items)
    assert (ids.num_items, ids.levels, ids.codebook_size) == (num_items, levels, 256)
    assert len(set(map(tuple, ids.codes.tolist()))) == unique
    # With k items a tuple, k of them share and k - 1 are lost, so there are one to two times as many as are lost.
    assert num_items - unique <= ids.collisions() <= 2 * (num_items - unique)
    with pytest.raises(ValueError, match=f"{num_items + 1}|{num_items}"):
        SemanticIds.read(SHARED / name, num_items + 1)
