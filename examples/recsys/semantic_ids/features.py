"""What is known about items as rows of numbers, as LightningDataModules."""

import json
import math
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.recsys.checks import check_positive
from examples.recsys.data.lines import read_lines
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.sampling import evaluation_sampler


class ItemFeatures(L.LightningDataModule):
    """Features of all items, in batches of rows (B, D).

    Every source is centred, and divided by one number for all features so that their mean variance is 1. So distances
    keep their proportions, a mean squared error is a share of the variance, and learning rates carry over from source
    to source. To give each feature the same variance would make the rarest attributes the loudest.

    Args:
        batch_size: items a training batch and process.
        eval_batch_size: items a batch and process elsewhere.
        num_workers: processes that load batches; the default loads them in the main process.
    """

    def __init__(self, batch_size: int = 1024, eval_batch_size: int = 4096, num_workers: int = 0) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers

    @abstractmethod
    def load_features(self) -> Tensor:
        """Features of items 1, 2, ... as the source has them, (num_items, D), from what ``prepare_data`` left."""

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self._features)

    @property
    def num_features(self) -> int:
        """Width D of the features."""
        return self._features.shape[1]

    def features(self) -> Tensor:
        """Features of items 1, 2, ..., centred and scaled: (num_items, D) float32.

        Raises:
            ValueError: if a feature is not finite, or all items have the same.
        """
        return self._features

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches of items in an order that is new every epoch."""
        return self._loader(batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches of all items, in order; codes are learned for these very items, so none is held out."""
        sampler = evaluation_sampler(_Rows(self._features), self.trainer)
        return self._loader(batch_size=self.eval_batch_size, sampler=sampler)

    @cached_property
    def _features(self) -> Tensor:
        # Validation may be what asks first, and a training step after it could not use tensors of inference mode.
        with torch.inference_mode(False):
            return standardize(self.load_features())

    def _loader(self, **kwargs: Any) -> DataLoader[Tensor]:
        return DataLoader(
            _Rows(self._features),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )


class AttributeFeatures(ItemFeatures):
    """Multi-hot vectors from a JSON file ``{"item": [attribute, ...]}``, gzipped or not.

    Without ``source`` items are numbers from 1. With it they are what the data module calls them (``item_names()``), of
    a file of your own the names in it; items of the file that the data module lacks are left out, and a warning counts
    them.

    Attributes may be any words or numbers. An item that the file lacks, or that has no attribute, is a zero row before
    centring; a warning tells how many there are. Items with the same attributes have the same features, and no codes of
    these tell them apart.

    Args:
        path: the file.
        num_items: size of the catalogue; None for that of ``source``, or else the largest item of the file.
        num_components: project to so many principal components; None keeps the multi-hot vectors. On Amazon Beauty 64
            components hold 78 % of the variance, but items that differ in rare attributes alone become one: RQ-k-means
            then has 2,070 different tuples and not 2,775, of 3,116 that can be.
        source: the data module that the recommender is trained on, if the file calls the items by name. What it
            downloads has to be there.
        **kwargs: of :class:`ItemFeatures`.

    Raises:
        ValueError: if a size is below 1, or ``num_items`` is given beside ``source``.
    """

    def __init__(
        self,
        path: str,
        num_items: int | None = None,
        num_components: int | None = None,
        source: SequenceDataModule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive(num_items=num_items, num_components=num_components)
        if source is not None and num_items is not None:
            raise ValueError(f"num_items={num_items} is given beside source, which knows its size: leave it out.")
        self.path = Path(path).expanduser()
        self.catalogue_size = num_items
        self.num_components = num_components
        self.source = source

    def load_features(self) -> Tensor:
        """See the class.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not as described, an item is outside of the catalogue, or there are fewer attributes or
                items than ``num_components``.
        """
        attributes = _read_attributes(self.path)
        rows = self._by_number(attributes) if self.source is None else self._by_name(attributes, self.source)
        columns = {attribute: None for row in rows for attribute in row}
        columns = {attribute: column for column, attribute in enumerate(columns)}
        features = torch.zeros(len(rows), len(columns))
        for feature, row in zip(features, rows, strict=True):
            feature[[columns[attribute] for attribute in row]] = 1.0
        bare = int((features == 0).all(1).sum())
        if bare:
            rank_zero_warn(f"{bare} of {len(rows)} items have no attributes in {self.path}: they get the same codes.")
        return features if self.num_components is None else principal_components(features, self.num_components)

    def _by_number(self, attributes: dict[str, list[Any]]) -> list[list[Any]]:
        """Attributes of items 1, 2, ..., which the file calls so."""
        names = [item for item in attributes if not item.isdecimal()]
        if names:
            raise ValueError(
                f"{self.path} calls items by name, as {names[0]!r}: give the data module that knows the names as "
                "source, or number the items from 1."
            )
        numbered = {int(item): row for item, row in attributes.items()}
        num_items = self.catalogue_size or max(numbered)
        outside = [item for item in numbered if not 1 <= item <= num_items]
        if outside:
            raise ValueError(
                f"{self.path} has item {outside[0]}, which is outside of the catalogue 1..{num_items}: count items "
                "from 1, or give the data module that calls them so as source."
            )
        return [numbered.get(item, []) for item in range(1, num_items + 1)]

    def _by_name(self, attributes: dict[str, list[Any]], source: SequenceDataModule) -> list[list[Any]]:
        """Attributes of items 1, 2, ... of a data module, which the file calls by their names in it."""
        names = source.item_names()
        others = len(attributes.keys() - set(names))
        if others == len(attributes):
            raise ValueError(
                f"{self.path} has attributes of none of the items of {type(source).__name__}: it calls them as "
                f"{next(iter(attributes))!r}, the data module as {names[0]!r}."
            )
        if others:
            rank_zero_warn(
                f"{others} of {len(attributes)} items in {self.path} are not among those of {type(source).__name__}: "
                "they are left out."
            )
        return [attributes.get(name, []) for name in names]


class EmbeddingFile(ItemFeatures):
    """Features from a file that holds one matrix, whose rows are items 1, 2, ...

    Args:
        path: a ``.npy`` file, or a ``.pt`` file with one tensor.
        **kwargs: of :class:`ItemFeatures`.

    Raises:
        ValueError: if the name ends otherwise.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        if self.path.suffix not in (".npy", ".pt"):
            raise ValueError(f"path={path!r} must end in .npy or .pt.")

    def load_features(self) -> Tensor:
        """See the class.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else than a matrix of numbers.
        """
        _check_exists(self.path)
        try:
            matrix = (
                torch.from_numpy(np.load(self.path, allow_pickle=False))
                if self.path.suffix == ".npy"
                else torch.load(self.path, map_location="cpu", weights_only=True)
            )
        except (ValueError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} does not hold a plain array or tensor ({str(error)[:80]}).") from None
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.numel() or matrix.is_complex():
            found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"{self.path} must hold a matrix (items, width) of real numbers, got {found}.")
        return matrix.float()


class SyntheticFeatures(ItemFeatures):
    """Features of the items of :class:`examples.recsys.data.SyntheticSequences`: place on the ring and rank.

    The cluster's angle on the ring as cosine and sine, and the rank within the cluster from -1/2 to 1/2, times
    ``rank_weight``. Below 1 the weight makes the first codes tell clusters apart and the last ones ranks.

    Args:
        num_clusters: as there.
        items_per_cluster: as there.
        rank_weight: what the rank counts beside the place on the ring.
        **kwargs: of :class:`ItemFeatures`.

    Raises:
        ValueError: if a size is below 1 or the weight is not positive.
    """

    def __init__(
        self, num_clusters: int = 50, items_per_cluster: int = 10, rank_weight: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_positive(num_clusters=num_clusters, items_per_cluster=items_per_cluster)
        if not rank_weight > 0.0:
            raise ValueError(f"rank_weight must be above 0, got {rank_weight}.")
        self.num_clusters = num_clusters
        self.items_per_cluster = items_per_cluster
        self.rank_weight = rank_weight

    def load_features(self) -> Tensor:
        item = torch.arange(self.num_clusters * self.items_per_cluster)
        angle = 2 * math.pi * (item % self.num_clusters) / self.num_clusters
        rank = (item // self.num_clusters) / max(self.items_per_cluster - 1, 1) - 0.5
        return torch.stack([angle.cos(), angle.sin(), self.rank_weight * rank], dim=1)


def standardize(features: Tensor) -> Tensor:
    """Centre the columns, and divide all by one number so that their mean variance is 1: (N, D) -> (N, D).

    Raises:
        ValueError: if a feature is not finite, or all rows are the same.
    """
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"The features of item {row + 1} are not all finite: mend the file that they come from.")
    centred = features - features.mean(0)
    scale = centred.square().mean().sqrt()
    if scale <= torch.finfo(features.dtype).eps * features.abs().max():
        raise ValueError(f"All {len(features)} items have the same features: there is nothing to tell them apart by.")
    return centred / scale


def principal_components(features: Tensor, num_components: int) -> Tensor:
    """Coordinates on the principal components of most variance: (N, D) -> (N, num_components).

    Raises:
        ValueError: if there are fewer rows or columns than components.
    """
    if num_components > min(features.shape):
        raise ValueError(
            f"num_components={num_components} is more than {features.shape[0]} items with {features.shape[1]} features "
            "allow."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the algorithm draws at random, and every process has to get the same
        left, values, _ = torch.pca_lowrank(features, num_components, niter=4)
    return left * values


class _Rows(Dataset[Tensor]):
    """Rows of a matrix, fetched a batch at a time."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, row: int) -> Tensor:
        return self.matrix[row]

    def __getitems__(self, rows: list[int]) -> Tensor:
        return self.matrix[rows]


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def _read_attributes(path: Path) -> dict[str, list[Any]]:
    text = "".join(read_lines(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{path} must hold {{"item": [attribute, ...]}}, got {str(content)[:60]!r}.')
    for item, row in content.items():
        if not (isinstance(row, list) and all(isinstance(attribute, (int, str)) for attribute in row)):
            raise ValueError(f"{path}: expected a list of attributes for item {item!r}, got {str(row)[:60]}.")
    return dict(content)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist (looked for {path.absolute()}).")
