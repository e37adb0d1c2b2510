"""Checks of the arguments of callbacks."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer of ``least`` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(f"{name} must be an integer of {least} or more, got {value!r}.")


def check_globs(name: str, value: Any) -> None:
    """Raise unless ``value`` is None or a list of strings."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(glob, str) for glob in value):
        raise MisconfigurationException(
            f"{name} must be a list of globs on parameter names, such as ['*.attention.*'], or None, got {value!r}."
        )


def check_multiple(name: str, value: int, other: str, unit: int) -> None:
    """Raise unless ``value`` is a multiple of ``unit``, or 0."""
    if value % unit:
        raise MisconfigurationException(f"{name}={value} must be a multiple of {other}, which is {unit}.")
