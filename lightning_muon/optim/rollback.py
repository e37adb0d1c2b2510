"""Rollback: restore optimizers after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


@contextmanager
def unchanged_on_error(*optimizers: Optimizer) -> Iterator[None]:
    """Undo all changes of the block to these optimizers if it raises.

    Attributes, param groups, state entries and plain containers are the same objects as before, with the same content.
    The tensors of the state are the same objects, but their elements are not restored: the block must not write to
    them.
    """
    remembered = [_Remembered(optimizer) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for one in remembered:
            one.restore()
        raise


class _Remembered:
    """Snapshot of an optimizer: its attributes, and the content of its lists, dicts, param groups and states."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.attributes = vars(optimizer)
        values = [self.attributes, *self.attributes.values(), *optimizer.param_groups, *optimizer.state.values()]
        nested = (vars(value) for value in self.attributes.values() if _is_own_record(value))
        inner = [value for record in nested for value in (record, *record.values())]
        self.contents: list[tuple[Any, Any]] = [
            (value, kind(value)) for value in (*values, *inner) for kind in (list, dict, set) if isinstance(value, kind)
        ]

    def restore(self) -> None:
        for value, content in self.contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def _is_own_record(value: object) -> bool:
    """Whether it is a bookkeeping object of this package, and not an optimizer."""
    return type(value).__module__.startswith("lightning_muon.optim.") and not isinstance(value, Optimizer)
