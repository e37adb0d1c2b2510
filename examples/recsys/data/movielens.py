"""MovieLens-1M: ratings of movies, a data set in the HSTU paper (arXiv 2402.17152).

The data are for research use. Redistribution and commercial use need permission; the README in the archive has the
terms. Cite Harper and Konstan 2015, "The MovieLens datasets: history and context".
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from examples.recsys.data.download import cache_folder, download_md5
from examples.recsys.data.events import Event, Numbered, number
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.sequences import UserSequences

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
MD5 = "c4d9eecfca2ab87c1945afe126590906"

USERS, ITEMS, RATINGS = 6_040, 3_706, 1_000_209
"""Size of the published set; 3,706 of its 3,883 movies are rated."""

_RATING = re.compile(r"(\d+)::(\d+)::\d+::(\d+)")
_MOVIE = re.compile(r"(\d+)::(.*)::.*")


class MovieLens1M(SequenceDataModule):
    """The movies that each user rated, in order of time, with any rating; split by leave-one-out.

    Many ratings of a user have the same second. They keep the order of the file, and the tested movie depends on this
    order. So results with a file in another order may differ.

    Args:
        data_dir: folder that holds ``ratings.dat`` and ``movies.dat``; None downloads ``ml-1m.zip`` and reads it
            without unpacking.
        cache_dir: folder for the download; None for ``lightning_muon/movielens`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.
        base_url: folder on the web that holds ``ml-1m.zip``.
        max_length: number of latest items of a history that the model sees; 200 in published comparisons.
        **kwargs: arguments of :class:`SequenceDataModule`.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        base_url: str = GROUPLENS,
        max_length: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        self.data_dir = data_dir
        self.cache_dir = cache_folder("movielens", cache_dir)
        self.base_url = base_url

    @property
    def num_items(self) -> int:
        return ITEMS

    @property
    def folder(self) -> Path | zipfile.Path:
        """Folder of the files: ``data_dir``, or the folder in the archive."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        return zipfile.Path(self.cache_dir / "ml-1m.zip", "ml-1m/")

    def prepare_data(self) -> None:
        """Download the archive if needed, in one process per node.

        Raises:
            FileNotFoundError: if a file is missing in ``data_dir``.
            ConnectionError: if the archive cannot be downloaded.
            ValueError: if the download has another checksum than the published archive.
        """
        if self.data_dir is None:
            download_md5(f"{self.base_url}/ml-1m.zip", self.cache_dir / "ml-1m.zip", MD5)
            return
        for name in ("ratings.dat", "movies.dat"):
            if not (self.folder / name).exists():
                raise FileNotFoundError(
                    f"data_dir={self.data_dir!r} has no {name}. Give the folder that ml-1m.zip unpacks to, or leave "
                    "data_dir out to download it."
                )

    def load_sequences(self) -> UserSequences:
        return self._ratings.sequences

    def item_names(self) -> list[str]:
        """Movie numbers in the file of items 1, 2, ..."""
        return [str(movie) for movie in self._ratings.items]

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ..., each with its year.

        Raises:
            ValueError: if ``movies.dat`` is not as published, or lacks a rated movie.
        """
        path = self.folder / "movies.dat"
        titles = dict(_records(path, _MOVIE))
        movies = self._ratings.items
        unnamed = [movie for movie in movies if movie not in titles]
        if unnamed:
            raise ValueError(f"{path} lacks {len(unnamed)} rated movies, the first of them {unnamed[0]}.")
        return [titles[movie] for movie in movies]

    def user_names(self) -> list[str]:
        """Numbers in the file of users 0, 1, ..."""
        return [str(user) for user in self._ratings.users]

    @cached_property
    def _ratings(self) -> Numbered:
        """The ratings, read once."""
        path = self.folder / "ratings.dat"
        ratings = number(Event(user, movie, int(time)) for user, movie, time in _records(path, _RATING))
        found = len(ratings.users), len(ratings.items), len(ratings.sequences.items)
        if found != (USERS, ITEMS, RATINGS):
            raise ValueError(
                f"{path} has {found[0]} users, {found[1]} rated movies and {found[2]} ratings, but MovieLens-1M has "
                f"{USERS}, {ITEMS} and {RATINGS}: the file is truncated or of another set."
            )
        if ties := ratings.sequences.tie_remark():
            rank_zero_info(f"{path}: {ties}")
        return ratings


def _records(path: Path | zipfile.Path, form: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """Yield the groups of ``form`` in each line."""
    with path.open("r", encoding="latin-1") as lines:
        for line_number, line in enumerate(lines, start=1):
            match = form.fullmatch(line.rstrip("\r\n"))
            if match is None:
                raise ValueError(f"{path}, line {line_number}: expected {form.pattern}, got {line[:60]!r}.")
            yield match.groups()
