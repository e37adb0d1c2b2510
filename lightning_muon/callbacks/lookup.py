"""Finding callbacks of a Trainer, of ``lightning.pytorch`` and of ``pytorch_lightning`` alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def callbacks_named(trainer: Trainer, name: str) -> list[Any]:
    """The callbacks of a class of this name or of a subclass of it."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if any(base.__name__ == name for base in type(callback).__mro__)]
