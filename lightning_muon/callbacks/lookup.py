"""Finding callbacks of a Trainer, of ``lightning.pytorch`` and of ``pytorch_lightning`` alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def callbacks_named(trainer: Trainer, name: str) -> list[Any]:
    """The callbacks of Lightning's class of this name, or of ours, or of a subclass of it.

    A user's own callback may have the same name, ``Timer`` for one, and nothing else in common.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if any(_is_named(base, name) for base in type(callback).__mro__)]


def _is_named(cls: type, name: str) -> bool:
    package = cls.__module__.partition(".")[0]
    return cls.__name__ == name and package in ("lightning", "pytorch_lightning", "lightning_muon")
