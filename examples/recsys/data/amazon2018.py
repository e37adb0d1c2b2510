"""Amazon reviews of 2018 as MiniOneRec (arXiv 2510.24431) and MuonRec (arXiv 2603.00416) use them.

The corpus is given for research use; cite Ni, Li and McAuley 2019, "Justifying recommendations using distantly-labeled
reviews and fine-grained aspects".
"""

from __future__ import annotations

import hashlib
import html
import operator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from examples.recsys.data import prepared
from examples.recsys.data.amazon2018_raw import months, preprocess
from examples.recsys.data.download import cache_folder, download_gzip
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.protocol import (
    TEST,
    TRAIN,
    VALIDATION,
    EvaluationProtocol,
    LeaveOneOut,
    Samples,
    TimeSplit,
)
from examples.recsys.data.sequences import UserSequences
from examples.recsys.data.text import describe

Category: TypeAlias = Literal["Industrial_and_Scientific", "Office_Products", "Musical_Instruments"]

UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"

FULL, PARTIAL, SEQUENCES = "interactions.csv.gz", "interactions.partial.csv.gz", "sequences.txt.gz"

DESCRIBED = ("brand", "categories", "description")
"""Keys of the catalogue that describe an item beside its title."""


class Counts(NamedTuple):
    """Size of a data set, and the number of targets in each split."""

    users: int
    items: int
    train: int
    validation: int
    test: int


PUBLISHED: dict[str, Counts] = {
    "Industrial_and_Scientific": Counts(7_694, 3_686, 36_259, 4_532, 4_533),
    "Office_Products": Counts(8_328, 3_459, 38_924, 4_866, 4_866),
    "Musical_Instruments": Counts(24_772, 9_922, 131_837, 24_772, 24_772),
}
"""Size of each released set; files of another size are refused. In a partial file users and training targets may be
missing. The number of training targets of Industrial follows from the other numbers by the split, up to one."""

WINDOWS: dict[str, range] = {
    "Industrial_and_Scientific": months((1996, 10), (2018, 11)),
    "Office_Products": months((2016, 10), (2018, 11)),
}
"""The Unix seconds of the reviews that are kept. Some released files of Industrial have the window of Office in their
name, but that window does not reproduce them."""


class AmazonReviews2018(SequenceDataModule):
    """One category of the Amazon 2018 reviews.

    ``Industrial_and_Scientific`` and ``Office_Products`` are split by time (:class:`TimeSplit`). They are read from
    ``data_dir/{category}``. There ``interactions.csv.gz`` is complete, and ``interactions.partial.csv.gz`` lacks
    training users: a warning says how much is there, and results do not compare with published ones. Without
    ``data_dir`` reviews and metadata are downloaded (95 MB and 626 MB), and the complete set is written to
    ``cache_dir/{category}`` once, with users and items numbered as in the released files.

    ``Musical_Instruments`` is split by user (:class:`LeaveOneOut`), has no times and no titles, and can only be read
    from ``data_dir/Musical_Instruments/sequences.txt.gz``.

    Args:
        category: one of the three.
        data_dir: folder with one folder per category; None downloads.
        cache_dir: folder for downloads; None for ``lightning_muon/amazon2018`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        base_url: folder on the web that holds ``categoryFilesSmall`` and ``metaFiles2``.
        max_length: number of latest items of a history that the model sees; 10 as published.
        mask_history: whether validation leaves out the items of the history; False as published, since items repeat.
        samples: as in :class:`SequenceDataModule`; ``"prefix"`` as published.
        **kwargs: arguments of :class:`SequenceDataModule`.

    Raises:
        ValueError: if the category is unknown, or is ``Musical_Instruments`` without ``data_dir``.
    """

    def __init__(
        self,
        category: Category = "Industrial_and_Scientific",
        data_dir: str | None = None,
        cache_dir: str | None = None,
        base_url: str = UCSD,
        max_length: int = 10,
        mask_history: bool = False,
        samples: Samples = "prefix",
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, mask_history=mask_history, samples=samples, **kwargs)
        if category not in PUBLISHED:
            raise ValueError(f"Unknown category {category!r}: choose one of {', '.join(PUBLISHED)}.")
        if data_dir is None and category not in WINDOWS:
            raise ValueError(f"{category} cannot be made from the raw reviews: give the data_dir that holds it.")
        self.category = category
        self.data_dir = data_dir
        self.cache_dir = cache_folder("amazon2018", cache_dir)
        self.base_url = base_url
        self.users: list[str] = []
        self.labels: Tensor | None = None

    @property
    def num_items(self) -> int:
        return PUBLISHED[self.category].items

    @property
    def path(self) -> Path:
        """Path of the file of interactions; if there is none yet, the one that a download would write."""
        folder = (self.cache_dir if self.data_dir is None else Path(self.data_dir).expanduser()) / self.category
        names = (FULL, PARTIAL) if self.category in WINDOWS else (SEQUENCES,)
        return next((folder / name for name in names if (folder / name).exists()), folder / names[0])

    def prepare_data(self) -> None:
        """Download and convert the file if needed, in one process per node.

        Raises:
            FileNotFoundError: if ``data_dir`` does not have it.
            ConnectionError: if it cannot be downloaded.
            ValueError: if the download is damaged, or does not give the published numbers.
        """
        if self.path.exists():
            return
        if self.data_dir is not None:
            raise FileNotFoundError(
                f"data_dir={self.data_dir!r} has no interactions of {self.category} (looked for "
                f"{self.path.absolute()}). Give the folder that holds the folder {self.category}"
                + (", or leave data_dir out to download the reviews." if self.category in WINDOWS else ".")
            )
        names = f"categoryFilesSmall/{self.category}_5.json.gz", f"metaFiles2/meta_{self.category}.json.gz"
        reviews, metadata = (
            download_gzip(f"{self.base_url}/{name}", self.cache_dir / name.rpartition("/")[2]) for name in names
        )
        sequences, catalogue = preprocess(reviews, metadata, WINDOWS[self.category])
        self._check_published(TimeSplit(sequences), reviews)
        prepared.write(self.path.parent, sequences, catalogue)

    def load_sequences(self) -> UserSequences:
        if self.category not in WINDOWS:
            return UserSequences.read(self.path, self.num_items)
        sequences, self.users, self.labels = prepared.read_interactions(self.path, self.num_items)
        if ties := sequences.tie_remark():
            rank_zero_info(f"{self.path}: {ties}")
        return sequences

    def make_protocol(self, sequences: UserSequences) -> EvaluationProtocol:
        protocol: EvaluationProtocol
        if self.category in WINDOWS:
            protocol = TimeSplit(sequences, self.max_length, self.samples, self.labels)
        else:
            protocol = LeaveOneOut(sequences, self.max_length, self.samples)
        self._check_published(protocol, self.path)
        return protocol

    def item_fingerprint(self) -> str | None:
        """A hash of all titles, since a download may number items differently; None for ``Musical_Instruments``."""
        if self.category not in WINDOWS:
            return None
        return hashlib.sha256("\n".join(self.item_titles()).encode()).hexdigest()

    def item_names(self) -> list[str]:
        """Numbers of items 1, 2, ... in the files, which count from 0; for ``Musical_Instruments`` from 1."""
        if self.category not in WINDOWS:
            return super().item_names()
        return [str(item) for item in range(self.num_items)]

    def user_names(self) -> list[str]:
        """Names of users 0, 1, ... in the file; for ``Musical_Instruments`` their numbers from 1."""
        return self.users or super().user_names()

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ...; for ``Musical_Instruments`` their ids, since it has no titles."""
        if self.category not in WINDOWS:
            return super().item_titles()
        return [html.unescape(entry["title"]) for entry in self._catalogue]

    def item_descriptions(self) -> list[str]:
        """Brand, categories and description of items 1, 2, ..., joined by :func:`describe`.

        For ``Musical_Instruments`` all are "", since it has no metadata.
        """
        if self.category not in WINDOWS:
            return super().item_descriptions()
        return [describe(*(entry.get(key, "") for key in DESCRIBED)) for entry in self._catalogue]

    @cached_property
    def _catalogue(self) -> list[dict[str, str]]:
        """The catalogue, read once."""
        return prepared.read_catalogue(self.path.parent, self.num_items)

    def _check_published(self, protocol: EvaluationProtocol, source: Path) -> None:
        found, expected = _count(protocol), PUBLISHED[self.category]
        if source.name == PARTIAL:
            same = found[3:] == expected[3:] and all(map(operator.le, found, expected))
        else:
            same = found == expected._replace(train=found.train) and abs(found.train - expected.train) <= 1
        if not same:
            raise ValueError(
                f"{source} gives {_sentence(found)}, but the published {self.category} has {_sentence(expected)}: the "
                "file is truncated, altered or of another category. Delete it to make it again, or give the right "
                "data_dir."
            )
        if source.name == PARTIAL:
            rank_zero_warn(
                f"{source} is partial: training has {found.train} of {expected.train} targets "
                f"({found.train / expected.train:.1%}) and {found.users} of {expected.users} users; validation and "
                "test are complete. Do not compare with published results; leave data_dir out to make the complete set."
            )


def _count(protocol: EvaluationProtocol) -> Counts:
    sequences = protocol.sequences
    train, validation, test = (len(protocol.targets(label)) for label in (TRAIN, VALIDATION, TEST))
    return Counts(len(sequences), len(sequences.items.unique()), train, validation, test)


def _sentence(counts: Counts) -> str:
    return (
        f"{counts.users} users, {counts.items} items and {counts.train} / {counts.validation} / {counts.test} targets"
    )
