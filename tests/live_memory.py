"""Peak memory of a piece of code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes that operations allocate, and the most that are alive at the same time.

    Existing tensors do not count. Memory that a kernel allocates and frees within one call is not seen.

    Attributes:
        peak: most bytes of storages that were alive at the same time.
        largest: bytes of the largest storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._older[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._older:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
