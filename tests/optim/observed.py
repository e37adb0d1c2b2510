"""Updates by parameter, from what observers of a step get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_muon.optim import StackUpdate


def by_name(write: Callable[[str, Tensor], Any]) -> Callable[[StackUpdate], None]:
    """An observer that calls ``write(name, update)`` for each parameter that moves, with a copy in its shape."""
    waiting: dict[str, dict[int, Tensor]] = {}

    def observe(update: StackUpdate) -> None:
        for member in update.members:
            blocks = waiting.setdefault(member.name, {})
            blocks[member.view] = update.direction[member.slice] * update.scale
            if len(blocks) == member.views:
                write(
                    member.name,
                    member.layout.write([blocks[view] for view in range(member.views)], member.parameter.shape),
                )
                del waiting[member.name]

    return observe
