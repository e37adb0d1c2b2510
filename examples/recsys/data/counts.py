"""Numbers of things, in words."""

from __future__ import annotations


def counted(number: int, one: str, more: str) -> str:
    """``1 row repeats`` of ``counted(1, "row repeats", "rows repeat")``, and ``2 rows repeat`` of 2."""
    return f"{number} {one if number == 1 else more}"
