"""The shipped configs, as words of a command line."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"


def files(*names: str) -> list[str]:
    """``-c`` and the path of each config, which is named as ``model/sasrec``."""
    return [word for name in names for word in ("-c", str(CONFIGS / f"{name}.yaml"))]


def on_synthetic(model: str) -> list[str]:
    """A model on synthetic sequences, with the preset of the two."""
    return files(f"model/{model}", "data/synthetic", f"preset/{model}_synthetic")
