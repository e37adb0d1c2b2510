"""Warnings about matrices that may be missing in the group ``"matrix"``."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_muon.partition.names import INDEX
from lightning_muon.partition.roles import ParameterAssignment

_ENOUGH = 0.1
_NAMED = 3


def left_out(entries: Sequence[ParameterAssignment]) -> list[str]:
    """See :meth:`Partition.warnings`."""
    trainable = [entry for entry in entries if not entry.frozen]
    unknown = [entry for entry in trainable if entry.unknown]
    taken = sum(entry.parameter.numel() for entry in trainable if entry.group == "matrix")
    missed = sum(entry.parameter.numel() for entry in unknown)
    if not missed or taken >= _ENOUGH * (taken + missed):
        return []
    kinds: dict[str, list[ParameterAssignment]] = {}
    for entry in sorted(unknown, key=lambda entry: -entry.parameter.numel()):
        kinds.setdefault(INDEX.sub("*", entry.name), []).append(entry)
    return [
        f"Only {taken:,} of {taken + missed:,} elements that may be hidden matrices go to the matrix optimizer. "
        f"The largest that do not: {' '.join(_described(*kind) for kind in list(kinds.items())[:_NAMED])} "
        f"If these are matrices, a rule sends them there: {{pattern: {next(iter(kinds))!r}, group: matrix}}, with "
        "transposed: true if they are stored (fan-in, fan-out)."
    ]


def _described(pattern: str, entries: list[ParameterAssignment]) -> str:
    first = entries[0]
    name = pattern if len(entries) > 1 else first.name
    shape = " x ".join(map(str, first.parameter.shape))
    return f"{name!r} ({len(entries)} x {shape}): {first.reason}"
