"""Finding callbacks of a Trainer, of ``lightning.pytorch`` and of ``pytorch_lightning`` alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def callbacks_named(trainer: Trainer, name: str) -> list[Any]:
    """Return the callbacks whose class, or a base of it, has this name in Lightning or in this package.

    A class of the same name in the user's own code, e.g. ``Timer``, does not count.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if any(_is_named(base, name) for base in type(callback).__mro__)]


def _is_named(cls: type, name: str) -> bool:
    package = cls.__module__.partition(".")[0]
    return cls.__name__ == name and package in ("lightning", "pytorch_lightning", "lightning_muon")
