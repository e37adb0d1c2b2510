"""MovieLens-1M, on an archive of the same form."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from examples.recsys.data import movielens
from examples.recsys.data.movielens import MovieLens1M
from tests.examples.file_server import serve

# User, movie, rating, time; the ratings of user 8 at time 30 tie.
RATINGS = [(7, 3, 5, 20), (7, 1, 1, 10), (7, 9, 4, 40), (8, 9, 2, 30), (8, 1, 3, 30), (8, 3, 3, 50), (8, 5, 3, 5)]
MOVIES = ["1::Amélie (2001)::Comedy", "2::Unrated (1999)::Drama", "3::A: B (1990)::Drama|War", "5::C::War", "9::D::War"]


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """A folder with ``ml-1m.zip``; replaces the published counts and checksum by its own."""
    path = tmp_path / "web" / "ml-1m.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ml-1m/ratings.dat", "".join("::".join(map(str, rating)) + "\n" for rating in RATINGS))
        file.writestr("ml-1m/movies.dat", "\n".join(MOVIES).encode("latin-1"))
    monkeypatch.setattr(movielens, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    for name, value in (("USERS", 2), ("ITEMS", 4), ("RATINGS", 7)):
        monkeypatch.setattr(movielens, name, value)
    return path


@pytest.fixture
def unpacked(archive) -> Path:
    zipfile.ZipFile(archive).extractall(archive.parent)
    return archive.parent / "ml-1m"


def test_downloads_once_and_leaves_one_out_by_time(archive, tmp_path):
    cache = tmp_path / "cache"
    with serve(archive.parent) as url:
        MovieLens1M(cache_dir=str(cache), base_url=url).prepare_data()
    data = MovieLens1M(cache_dir=str(cache), base_url=url)
    data.prepare_data()
    data.setup("fit")
    sequences = data.protocol.sequences
    # Items are numbered in the order of the sequences: movies 1, 3, 9, then 5. Ties keep the order of the file.
    assert [sequences[user].tolist() for user in range(2)] == [[1, 2, 3], [4, 3, 1, 2]]
    assert sequences.times.tolist() == [10, 20, 40, 5, 30, 30, 50]
    (batch,) = data.test_dataloader()
    assert batch["target"].tolist() == [3, 2]
    assert batch["times"].tolist() == [[10, 20, 0], [5, 30, 30]]
    assert data.item_titles() == ["Amélie (2001)", "A: B (1990)", "D", "C"]
    assert data.user_names() == ["7", "8"]
    assert data.item_names() == ["1", "3", "9", "5"]
    assert (data.max_length, data.mask_history) == (200, True)


def test_a_folder_serves_as_well(unpacked):
    data = MovieLens1M(data_dir=str(unpacked))
    data.prepare_data()
    data.setup("fit")
    assert data.item_titles()[0] == "Amélie (2001)"
    assert len(data.protocol.test()) == 2


def test_another_archive_than_the_published_one_gets_a_sentence(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "MD5", "0" * 32)
    with (
        serve(archive.parent) as url,
        pytest.raises(ValueError, match=r"are not the published file \(md5 .* instead of 0"),
    ):
        MovieLens1M(cache_dir=str(tmp_path / "cache"), base_url=url).prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_archive_in_the_cache_is_fetched_again(archive, tmp_path):
    cached = tmp_path / "cache" / "ml-1m.zip"
    cached.parent.mkdir()
    cached.write_bytes(b"PK")
    with serve(archive.parent) as url:
        MovieLens1M(cache_dir=str(cached.parent), base_url=url).prepare_data()
    assert cached.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat"])
def test_a_missing_file_gets_a_sentence(unpacked, name):
    (unpacked / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}. Give the folder that ml-1m.zip unpacks to, or leave"):
        MovieLens1M(data_dir=str(unpacked)).prepare_data()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "7::3::5::20\n",
            "has 1 users, 1 rated movies and 1 ratings, but MovieLens-1M has 2, 4 and 7: the file is trunc",
        ),
        ("7::3::5::20\n7::3::5\n", r"ratings.dat, line 2: expected .*, got '7::3::5\\n'"),
        ("user,movie,rating,time\n", "ratings.dat, line 1: expected"),
        ("", "There are no users"),
    ],
)
def test_bad_ratings_get_a_sentence(unpacked, text, message):
    (unpacked / "ratings.dat").write_text(text)
    with pytest.raises(ValueError, match=message):
        MovieLens1M(data_dir=str(unpacked)).setup("fit")


def test_a_rated_movie_without_a_title_gets_a_sentence(unpacked):
    (unpacked / "movies.dat").write_text("1::Toy Story::War\n")
    with pytest.raises(ValueError, match="lacks 3 rated movies, the first of them 3"):
        MovieLens1M(data_dir=str(unpacked)).item_titles()
