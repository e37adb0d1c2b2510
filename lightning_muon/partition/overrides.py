"""Applies the user's rules to the partition."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_muon.partition.layout import MatrixLayout
from lightning_muon.partition.roles import Group, ParameterAssignment, Role
from lightning_muon.partition.rules import ParameterRule, unmatched


@dataclass(frozen=True)
class Verdict:
    """The automatic decision on a parameter, before any rule.

    Args:
        role: role of the parameter; ``"hidden"`` goes to the group ``"matrix"``, all others to ``"other"``.
        reason: a sentence for the user.
        layout: how it would be read as matrices, even in ``"other"``: a rule may send it to ``"matrix"``.
        unknown: whether it may be a hidden matrix that was not recognized.
    """

    role: Role
    reason: str
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    unknown: bool = False


@dataclass
class Change:
    """All that the rules set for one parameter; a later rule overrides an earlier one."""

    group: Group | None = None
    split: int | list[int] | None = None
    repeats: int | None = None
    transposed: bool | None = None
    batch_dims: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    label: str = ""
    rules: list[ParameterRule] = field(default_factory=list)

    def add(self, rule: ParameterRule) -> None:
        """Add the settings of a rule."""
        if rule.split is not None:
            self.repeats = None
        for key in ("group", "split", "repeats", "transposed", "batch_dims", "name"):
            value = getattr(rule, key)
            if value is not None:
                setattr(self, key, value)
        if rule.options or rule.name is not None:
            self.label = rule.label
        self.options |= rule.options
        self.rules.append(rule)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A parameter, its verdict, and the names and owners by which rules select it."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    owners: tuple[type[nn.Module], ...]
    verdict: Verdict


def collect_changes(rules: Sequence[ParameterRule], candidates: Sequence[Candidate]) -> list[Change]:
    """Return the settings of the rules for each candidate.

    Raises:
        ValueError: for a rule that matches no parameter.
    """
    changes = [Change() for _ in candidates]
    for rule in rules:
        matched = False
        for candidate, change in zip(candidates, changes, strict=True):
            if rule.matches(candidate.names, candidate.verdict.role, candidate.owners):
                change.add(rule)
                matched = True
        if not matched:
            raise _unmatched(rule, candidates)
    return changes


def _unmatched(rule: ParameterRule, candidates: Sequence[Candidate]) -> ValueError:
    ordered = sorted(candidates, key=lambda candidate: candidate.verdict.role == "vector")
    names: dict[bool, list[str]] = {False: [], True: []}
    for candidate in candidates:
        names[candidate.verdict.role == "vector"] += candidate.names
    owners = dict.fromkeys(owner.__name__ for candidate in ordered for owner in candidate.owners)
    roles = sorted({candidate.verdict.role for candidate in candidates})
    return unmatched(rule, names[False], names[True], roles, list(owners))


def assign(candidates: Sequence[Candidate], changes: Sequence[Change]) -> list[ParameterAssignment]:
    """Apply the rules to the verdicts, and name the param groups.

    Raises:
        ValueError: if a rule sends a tensor that is not a matrix to ``"matrix"``, sets a layout that does not fit the
            tensor, or sets a layout for parameters that all go to ``"other"``.
    """
    entries = [_assign(candidate, change) for candidate, change in zip(candidates, changes, strict=True)]
    _check_layouts_used(entries, changes)
    names = _group_names(entries, changes)
    return [dataclasses.replace(entry, group_name=name) for entry, name in zip(entries, names, strict=True)]


def _assign(candidate: Candidate, change: Change) -> ParameterAssignment:
    verdict, parameter, name = candidate.verdict, candidate.parameter, candidate.names[0]
    group: Group = change.group or ("matrix" if verdict.role == "hidden" else "other")
    layout = None
    if group == "matrix":
        if sum(size > 1 for size in parameter.shape) < 2:
            raise ValueError(
                f"{change.rules[-1]} sends {name!r} to the group 'matrix', but its shape {tuple(parameter.shape)} has "
                "fewer than two dimensions larger than 1. Leave it in 'other'."
            )
        try:
            layout = _layout(verdict.layout, change, parameter.shape)
            layout.check(parameter.shape)
        except ValueError as error:
            rules = "; ".join(map(str, change.rules))
            raise ValueError(f"{name!r} of shape {tuple(parameter.shape)} does not fit {rules}: {error}") from None
    moved = change.group is not None and change.group != ("matrix" if verdict.role == "hidden" else "other")
    reason = f"Sent to {group} by a rule. {verdict.reason}" if moved else verdict.reason
    if layout is not None and layout != verdict.layout:
        reason = f"{reason} Layout set by a rule."
    return ParameterAssignment(
        name=name,
        parameter=parameter,
        role=verdict.role,
        group=group,
        layout=layout,
        reason=reason,
        options=dict(change.options),
        aliases=candidate.names[1:],
        unknown=verdict.unknown and change.group is None,
    )


def _layout(layout: MatrixLayout, change: Change, shape: Sequence[int]) -> MatrixLayout:
    """Return the layout with the changes of the rules."""
    batch_dims = layout.batch_dims if change.batch_dims is None else change.batch_dims
    transposed = layout.transposed if change.transposed is None else change.transposed
    repeats = change.repeats or (1 if change.split is not None else layout.repeats)
    split = layout.split
    if isinstance(change.split, int):
        split = ()
        if change.split > 1 or repeats > 1:
            fan_out = shape[batch_dims + 1] if transposed else shape[batch_dims] // layout.groups
            if fan_out % (change.split * repeats):
                raise ValueError(f"{change.split * repeats} equal blocks do not divide the fan-out, {fan_out}.")
            split = (fan_out // (change.split * repeats),) * change.split
    elif change.split is not None:
        split = tuple(change.split)
    groups = layout.groups if batch_dims == layout.batch_dims and transposed == layout.transposed else 1
    return MatrixLayout(batch_dims, groups, transposed, split, repeats)


def _check_layouts_used(entries: Sequence[ParameterAssignment], changes: Sequence[Change]) -> None:
    used = {id(rule) for entry, change in zip(entries, changes, strict=True) if entry.layout for rule in change.rules}
    for entry, change in zip(entries, changes, strict=True):
        for rule in change.rules:
            # A later rule may send the parameter to the other group: a user's rule overrides a model's own.
            unused = rule.sets_layout and id(rule) not in used
            if unused and (change.group != "other" or rule.group == "other"):
                raise ValueError(
                    f"{rule} sets a layout, but what it matches goes to the group 'other', {entry.name!r} for example. "
                    f"({entry.reason}) Add group='matrix' to the rule to train it as matrices."
                )


def _group_names(entries: Sequence[ParameterAssignment], changes: Sequence[Change]) -> list[str]:
    """Return the names of the entries' param groups: one name for each group, role and set of options.

    The names are ``"matrix"`` for hidden matrices and ``"other/<role>"`` for the rest. A name given by a rule overrides
    them. If rules set options for only some parameters of a role, their group is ``"matrix/<selectors>"`` or
    ``"other/<role>/<selectors>"``.
    """
    keys = [_group_key(entry, change) for entry, change in zip(entries, changes, strict=True)]
    scopes = Counter(scope for scope, *_ in dict.fromkeys(keys))
    wanted: dict[tuple[str, str | None, str], str] = {}
    for key, entry, change in zip(keys, entries, changes, strict=True):
        scope, name, _ = key
        alone = scopes[scope] == 1 or not entry.options
        label = change.label.removeprefix(entry.role).strip("/") or "options"
        wanted.setdefault(key, name or (scope if alone else f"{scope}/{label}"))
    clashes = Counter(wanted.values())
    names: dict[tuple[str, str | None, str], str] = {}
    for key, name in wanted.items():
        stem = f"{key[0]}/{name}" if clashes[name] > 1 and not name.startswith(key[0]) else name
        numbered = (f"{stem}-{count}" if count > 1 else stem for count in itertools.count(1))
        names[key] = next(unique for unique in numbered if unique not in names.values())
    return [names[key] for key in keys]


def _group_key(entry: ParameterAssignment, change: Change) -> tuple[str, str | None, str]:
    """Return the key of a param group: the group (and role, unless a rule names it), the name and the options."""
    options = repr(sorted(entry.options.items()))
    if change.name is not None:
        return entry.group, change.name, options
    hidden_matrix = (entry.group, entry.role) == ("matrix", "hidden")
    return "matrix" if hidden_matrix else f"{entry.group}/{entry.role}", None, options
