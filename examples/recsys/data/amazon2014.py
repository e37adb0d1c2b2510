"""Amazon reviews of 2014, 5-core: the leave-one-out benchmark of S3-Rec, P5 and TIGER.

The corpus is given for research use; cite McAuley et al. 2015, "Image-based recommendations on styles and substitutes".
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from examples.recsys.data.download import cache_folder, download_gzip
from examples.recsys.data.events import Event, Numbered, number
from examples.recsys.data.lines import read_lines
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.sequences import UserSequences
from examples.recsys.data.text import plain_text
from examples.recsys.files import write_lines

Category: TypeAlias = Literal["Beauty", "Toys_and_Games", "Sports_and_Outdoors"]

SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


class Counts(NamedTuple):
    """Size of a data set."""

    users: int
    items: int
    interactions: int


PUBLISHED: dict[str, Counts] = {
    "Beauty": Counts(22_363, 12_101, 198_502),
    "Toys_and_Games": Counts(19_412, 11_924, 167_597),
    "Sports_and_Outdoors": Counts(35_598, 18_357, 296_337),
}
"""Size of each 5-core in the literature (arXiv 2305.05065, Table 6); files of another size are refused."""


class AmazonReviews2014(SequenceDataModule):
    """One category of the Amazon 2014 reviews.

    Reads ``{category}.txt`` in ``data_dir``, one user per line: ``user item item ...``, oldest first, ids from 1.
    Without ``data_dir`` it downloads the reviews and writes that file to ``cache_dir`` once.

    A file in ``data_dir`` has no titles, so items are named by their ids. After a download a second file holds the
    ASIN of each item. Titles come from the metadata of the category, which are downloaded at the first use.

    The time of a review is a day without an hour. Reviews of the same day keep the order of the source file, and the
    tested item depends on this order. So results with a download and with another ``{category}.txt`` may differ.

    Args:
        category: ``Beauty``, ``Toys_and_Games`` or ``Sports_and_Outdoors``.
        data_dir: folder that holds ``{category}.txt``; None downloads.
        cache_dir: folder for downloads; None for ``lightning_muon/amazon2014`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        base_url: folder on the web that holds ``reviews_{category}_5.json.gz`` and ``meta_{category}.json.gz``.
        **kwargs: arguments of :class:`SequenceDataModule`.

    Raises:
        ValueError: if the category is unknown.
    """

    def __init__(
        self,
        category: Category = "Beauty",
        data_dir: str | None = None,
        cache_dir: str | None = None,
        base_url: str = SNAP,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if category not in PUBLISHED:
            raise ValueError(f"Unknown category {category!r}: choose one of {', '.join(PUBLISHED)}.")
        self.category = category
        self.data_dir = data_dir
        self.cache_dir = cache_folder("amazon2014", cache_dir)
        self.base_url = base_url

    @property
    def num_items(self) -> int:
        return PUBLISHED[self.category].items

    @property
    def path(self) -> Path:
        """Path of the file of interactions."""
        folder = self.cache_dir if self.data_dir is None else Path(self.data_dir).expanduser()
        return folder / f"{self.category}.txt"

    def prepare_data(self) -> None:
        """Download the file if needed, in one process per node.

        Raises:
            FileNotFoundError: if ``data_dir`` does not have it.
            ConnectionError: if it cannot be downloaded.
            ValueError: if the download is damaged, or does not have the published number of users and items.
        """
        if self.path.exists():
            return
        if self.data_dir is not None:
            raise FileNotFoundError(
                f"data_dir={self.data_dir!r} has no {self.category}.txt (looked for {self.path.absolute()}). Give the "
                "folder that holds it, or leave data_dir out to download the reviews."
            )
        name = f"reviews_{self.category}_5.json.gz"
        reviews = download_gzip(f"{self.base_url}/{name}", self.cache_dir / name)
        sequences, _, asins = read_reviews(reviews)
        _check_published(self.category, sequences, reviews)
        # The ASINs first: if there are sequences, there are ASINs.
        write_lines(self._asin_path, map(str, asins))
        sequences.write(self.path)

    def item_fingerprint(self) -> str:
        """A hash of all interactions, since another file of the same set may number the items differently."""
        return hashlib.sha256(self._split().sequences.items.numpy().tobytes()).hexdigest()

    def load_sequences(self) -> UserSequences:
        sequences = UserSequences.read(self.path, self.num_items)
        _check_published(self.category, sequences, self.path)
        return sequences

    def item_names(self) -> list[str]:
        """ASINs of items 1, 2, ...; with ``data_dir`` their numbers in the file.

        Raises:
            FileNotFoundError: if an old version, which stored no ASINs, converted the download.
            ValueError: if the file of ASINs is damaged.
        """
        if self.data_dir is not None:
            return super().item_names()
        if not self._asin_path.exists():
            raise FileNotFoundError(
                f"{self.cache_dir} has no {self._asin_path.name}, which holds the ids of the items: delete {self.path} "
                "to convert the reviews again."
            )
        asins = self._asin_path.read_text(encoding="utf-8").split("\n")[:-1]
        if len(asins) != self.num_items:
            raise ValueError(
                f"{self._asin_path} has {len(asins)} lines, but there are {self.num_items} items: delete it and "
                f"{self.path} to convert the reviews again."
            )
        return asins

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ...; the ASIN if the metadata have no title; with ``data_dir`` the ids.

        Call it in one process first, since it may download the metadata.

        Raises:
            FileNotFoundError: if an old version, which stored no ASINs, converted the download.
            ConnectionError: if the metadata cannot be downloaded.
            ValueError: if a file is damaged.
        """
        if self.data_dir is not None:
            return super().item_titles()
        asins = self.item_names()
        name = f"meta_{self.category}.json.gz"
        titles = read_titles(download_gzip(f"{self.base_url}/{name}", self.cache_dir / name), set(asins))
        return [titles.get(asin, asin) for asin in asins]

    @property
    def _asin_path(self) -> Path:
        """Path of the ASINs of items 1, 2, ..., one per line."""
        return self.path.with_name(f"{self.category}.asins.txt")


def read_reviews(path: str | os.PathLike[str]) -> Numbered:
    """Read a gzip file of reviews, one dict per line as JSON or Python literal, into numbered sequences.

    Users and items are numbered from 1 in order of appearance: users in the file, items in the sequences. Reviews of
    the same day keep the order of the file.

    Raises:
        ValueError: with the number of the line, if it lacks ``reviewerID``, ``asin`` or ``unixReviewTime``.
    """
    return number(
        Event(review["reviewerID"], review["asin"], int(review["unixReviewTime"])) for review in iterate_reviews(path)
    )


def iterate_reviews(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the dicts of a gzip file of reviews, line by line.

    Raises:
        ValueError: as in :func:`read_reviews`.
    """
    for line_number, line in enumerate(read_lines(path), start=1):
        review = _parse(line)
        if not isinstance(review, dict) or not {"reviewerID", "asin", "unixReviewTime"} <= review.keys():
            raise ValueError(
                f"{path}, line {line_number}: not a review with reviewerID, asin and unixReviewTime: {line[:60]!r}."
            )
        yield review


def read_titles(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, str]:
    """Read titles by ASIN from a gzip file of metadata, one dict per line as JSON or Python literal.

    Args:
        path: the file. It has far more items than a 5-core, so only lines of wanted items are parsed.
        wanted: ASINs; those without a title are left out of the result.

    Raises:
        ValueError: with the number of the line, if it is not a dict with ``asin``.
    """
    titles = {}
    for line_number, line in enumerate(read_lines(path), start=1):
        match = _ASIN.search(line)
        if match and match[1] not in wanted:
            continue
        entry = _parse(line)
        if not isinstance(entry, dict) or "asin" not in entry:
            raise ValueError(f"{path}, line {line_number}: not metadata with an asin: {line[:60]!r}.")
        if title := plain_text(entry.get("title") or ""):
            titles[entry["asin"]] = title
    return titles


_ASIN = re.compile(r"""['"]asin['"]: *['"](\w+)['"]""")


def _parse(line: str) -> Any:
    """Parse a line as JSON or as a Python literal; None if it is neither."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        try:
            return ast.literal_eval(line)
        except (ValueError, SyntaxError):
            return None


def _check_published(category: str, sequences: UserSequences, source: Path) -> None:
    found = Counts(len(sequences), len(sequences.items.unique()), len(sequences.items))
    expected = PUBLISHED[category]
    if found != expected:
        raise ValueError(
            f"{source} has {found.users} users, {found.items} items and {found.interactions} interactions, but the "
            f"published {category} 5-core has {expected.users}, {expected.items} and {expected.interactions}: the file "
            "is truncated or of another set. Delete it to download it again, or give the right data_dir."
        )
