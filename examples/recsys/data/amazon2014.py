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
    """Size of an interaction set."""

    users: int
    items: int
    interactions: int


PUBLISHED: dict[str, Counts] = {
    "Beauty": Counts(22_363, 12_101, 198_502),
    "Toys_and_Games": Counts(19_412, 11_924, 167_597),
    "Sports_and_Outdoors": Counts(35_598, 18_357, 296_337),
}
"""What the literature states of each 5-core (arXiv 2305.05065, Table 6), and what a file must have to be used."""


class AmazonReviews2014(SequenceDataModule):
    """One category of the Amazon 2014 reviews.

    Reads ``{category}.txt`` in ``data_dir``, one user a line: ``user item item ...``, oldest first, ids from 1. Without
    ``data_dir`` it downloads the reviews and writes that file to ``cache_dir`` once.

    A prepared file tells no titles, so items go by their ids. What was downloaded has the ASIN of each item beside it,
    and titles come from the metadata of the category, which are downloaded once when they are asked for.

    Reviews bear a day and no hour. Reviews of the same day are in the order of the source file here, and which item is
    tested depends on it: figures from a download and from another ``{category}.txt`` differ by that alone.

    Args:
        category: ``Beauty``, ``Toys_and_Games`` or ``Sports_and_Outdoors``.
        data_dir: folder that holds ``{category}.txt``; None downloads.
        cache_dir: where downloads go; None for ``lightning_muon/amazon2014`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        base_url: folder on the web that holds ``reviews_{category}_5.json.gz`` and ``meta_{category}.json.gz``.
        **kwargs: of :class:`SequenceDataModule`.

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
        """The file that is read."""
        folder = self.cache_dir if self.data_dir is None else Path(self.data_dir).expanduser()
        return folder / f"{self.category}.txt"

    def prepare_data(self) -> None:
        """Make sure that the file is there; in the main process of a node.

        Raises:
            FileNotFoundError: if ``data_dir`` lacks it.
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
        # First, so that where there are sequences there are ASINs.
        write_lines(self._asin_path, map(str, asins))
        sequences.write(self.path)

    def item_fingerprint(self) -> str:
        """A hash of all interactions: a download and another file of the same set number its items differently."""
        return hashlib.sha256(self._split().sequences.items.numpy().tobytes()).hexdigest()

    def load_sequences(self) -> UserSequences:
        sequences = UserSequences.read(self.path, self.num_items)
        _check_published(self.category, sequences, self.path)
        return sequences

    def item_names(self) -> list[str]:
        """The ASINs of items 1, 2, ...; with ``data_dir`` their numbers in the file.

        Raises:
            FileNotFoundError: if the download was converted by a version that kept no ASINs.
            ValueError: if the file of ASINs is damaged.
        """
        if self.data_dir is not None:
            return super().item_names()
        if not self._asin_path.exists():
            raise FileNotFoundError(
                f"{self.cache_dir} has no {self._asin_path.name}, which tells the items apart: delete {self.path} to "
                "convert the reviews again."
            )
        asins = self._asin_path.read_text(encoding="utf-8").split("\n")[:-1]
        if len(asins) != self.num_items:
            raise ValueError(
                f"{self._asin_path} has {len(asins)} lines, but there are {self.num_items} items: delete it and "
                f"{self.path} to convert the reviews again."
            )
        return asins

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ...: the ASIN where the metadata have none; with ``data_dir`` the ids.

        Call it in one process first: the metadata are downloaded where they are not there.

        Raises:
            FileNotFoundError: if the download was converted by a version that kept no ASINs.
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
        """A line an item: the ASINs of items 1, 2, ..."""
        return self.path.with_name(f"{self.category}.asins.txt")


def read_reviews(path: str | os.PathLike[str]) -> Numbered:
    """Sequences from a gzip file of reviews, one dict a line, as JSON or as a Python literal; the ids they stand for.

    Users and items are numbered from 1 in order of appearance: users in the file, items in the sequences. Reviews of
    the same day keep the order of the file.

    Raises:
        ValueError: naming the line, if it lacks ``reviewerID``, ``asin`` or ``unixReviewTime``.
    """
    return number(
        Event(review["reviewerID"], review["asin"], int(review["unixReviewTime"])) for review in iterate_reviews(path)
    )


def iterate_reviews(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The dicts of a gzip file of reviews, read line by line.

    Raises:
        ValueError: as :func:`read_reviews`.
    """
    for line_number, line in enumerate(read_lines(path), start=1):
        review = _parse(line)
        if not isinstance(review, dict) or not {"reviewerID", "asin", "unixReviewTime"} <= review.keys():
            raise ValueError(
                f"{path}, line {line_number}: not a review with reviewerID, asin and unixReviewTime: {line[:60]!r}."
            )
        yield review


def read_titles(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, str]:
    """Titles by ASIN from a gzip file of metadata, one dict a line, as JSON or as a Python literal.

    Args:
        path: the file, which has far more items than a 5-core; only lines of wanted ones are parsed.
        wanted: ASINs; those without a title are left out.

    Raises:
        ValueError: naming the line, if it has no ``asin`` or is no dict.
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
    """The value that a line has as JSON or as a Python literal; None if it has none."""
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
            "is cut short or another set. Delete it to download it again, or give the right data_dir."
        )
