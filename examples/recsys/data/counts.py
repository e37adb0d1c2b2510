"""Counts with their noun in singular or plural."""

from __future__ import annotations


def counted(number: int, one: str, more: str) -> str:
    """``counted(1, "row repeats", "rows repeat")`` is ``1 row repeats``, and with 2 it is ``2 rows repeat``."""
    return f"{number} {one if number == 1 else more}"
