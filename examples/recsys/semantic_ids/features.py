"""What is known about items as rows of numbers, as LightningDataModules."""

import json
import math
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from gzip import BadGzipFile
from gzip import open as open_gzip
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.recsys.data.sampling import evaluation_sampler
from examples.recsys.models.layers import check_positive


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
    """Multi-hot vectors from a gzipped JSON file ``{"item": [attribute, ...]}``, items from 1.

    Attributes may be any words or numbers. An item that the file lacks, or that has no attribute, is a zero row before
    centring; a warning tells how many there are. Items with the same attributes have the same features, and no codes of
    these tell them apart.

    Args:
        path: the file.
        num_items: size of the catalogue; None for the largest item of the file.
        num_components: project to so many principal components; None keeps the multi-hot vectors. On Amazon Beauty 64
            components hold 78 % of the variance, but items that differ in rare attributes alone become one: RQ-k-means
            then has 2,070 different tuples and not 2,775, of 3,116 that can be.
        **kwargs: of :class:`ItemFeatures`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self, path: str, num_items: int | None = None, num_components: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_positive(num_items=num_items, num_components=num_components)
        self.path = Path(path).expanduser()
        self.catalogue_size = num_items
        self.num_components = num_components

    def load_features(self) -> Tensor:
        """See the class.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not as described, an item is outside of the catalogue, or there are fewer attributes or
                items than ``num_components``.
        """
        attributes = _read_attributes(self.path)
        num_items = self.catalogue_size or max(attributes)
        outside = [item for item in attributes if not 1 <= item <= num_items]
        if outside:
            raise ValueError(f"{self.path} has item {outside[0]}, which is outside of the catalogue 1..{num_items}.")
        columns = {attribute: None for row in attributes.values() for attribute in row}
        columns = {attribute: column for column, attribute in enumerate(columns)}
        features = torch.zeros(num_items, len(columns))
        for item, row in attributes.items():
            features[item - 1, [columns[attribute] for attribute in row]] = 1.0
        bare = int((features == 0).all(1).sum())
        if bare:
            rank_zero_warn(f"{bare} of {num_items} items have no attributes in {self.path}: they get the same codes.")
        return features if self.num_components is None else principal_components(features, self.num_components)


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


def _read_attributes(path: Path) -> dict[int, list[Any]]:
    _check_exists(path)
    try:
        with open_gzip(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not gzipped JSON ({error}).") from None
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{path} must hold {{"item": [attribute, ...]}}, got {str(content)[:60]!r}.')
    attributes: dict[int, list[Any]] = {}
    for item, row in content.items():
        plain = isinstance(row, list) and all(isinstance(attribute, (int, str)) for attribute in row)
        if not item.isdecimal() or not plain:
            raise ValueError(
                f"{path}: expected an item number and a list of attributes, got {item!r}: {str(row)[:60]}."
            )
        attributes[int(item)] = row
    return attributes


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist (looked for {path.absolute()}).")
