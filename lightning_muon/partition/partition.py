"""Partition: every parameter of a module, its role and its group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from lightning_muon.partition.layout import MatrixLayout
from lightning_muon.partition.left_out import left_out
from lightning_muon.partition.names import near_names
from lightning_muon.partition.roles import Group, ParameterAssignment
from lightning_muon.partition.table import partition_table

LAYOUTS_KEY = "matrix_layouts"
"""Key of :meth:`Partition.layouts` in a checkpoint."""


class Partition:
    """The result of :func:`partition_parameters`: every parameter of a module once, in the module's order.

    Args:
        assignments: one entry per parameter; tied parameters have one entry with aliases.

    Raises:
        KeyError: on ``partition[name]`` for a name that the module does not have; the error lists similar names.
    """

    def __init__(self, assignments: Sequence[ParameterAssignment]) -> None:
        self.assignments = list(assignments)
        self._by_name = {name: entry for entry in self.assignments for name in (entry.name, *entry.aliases)}

    def __getitem__(self, name: str) -> ParameterAssignment:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"No parameter {name!r}. {near_names(name, self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[ParameterAssignment]:
        return iter(self.assignments)

    def __len__(self) -> int:
        return len(self.assignments)

    def param_groups(self, group: Group) -> list[dict[str, Any]]:
        """Return param groups for an optimizer, with the trainable parameters of one group.

        Returns:
            Dicts with ``name``, ``params``, ``param_names``, ``layouts`` (group ``"matrix"`` only; one
            :class:`MatrixLayout` per parameter) and the options that rules set.
        """
        groups: dict[str, dict[str, Any]] = {}
        for entry in self.assignments:
            if entry.group != group or entry.frozen:
                continue
            param_group = groups.setdefault(
                entry.group_name, {"name": entry.group_name, "params": [], "param_names": [], **entry.options}
            )
            param_group["params"].append(entry.parameter)
            param_group["param_names"].append(entry.name)
            if group == "matrix":
                param_group.setdefault("layouts", []).append(entry.layout)
        return list(groups.values())

    def layouts(self) -> dict[str, dict[str, Any]]:
        """Return how the group ``"matrix"`` is read, as plain data for a checkpoint.

        Returns:
            By name, the fields that differ from the defaults of :class:`MatrixLayout`: ``MatrixLayout(**fields)``
            restores the layout.
        """
        return {entry.name: _changed_fields(entry.layout) for entry in self if entry.group == "matrix" and entry.layout}

    def warnings(self) -> list[str]:
        """Return warnings if the group ``"matrix"`` is nearly empty although there may be many matrices.

        Trainable elements of hidden matrices are counted, and those of tensors that may be hidden matrices but are not
        known to be. Embeddings, heads, input stems, routers, vectors, depthwise filters and parameters that a rule
        sends to ``"other"`` do not count. There is a warning if less than a tenth of these elements is in
        ``"matrix"``.

        Returns:
            Sentences with the largest tensors left out, the reasons, and the rule that would send them; often none.
        """
        return left_out(self.assignments)

    def table(self) -> Table:
        """Return a Rich table of counts and reasons, one row per pattern of names (``blocks.*.q_proj.weight x12``)."""
        return partition_table(self.assignments)


def _changed_fields(layout: MatrixLayout) -> dict[str, Any]:
    changed = {key: value for key, value in vars(layout).items() if value != getattr(MatrixLayout(), key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
