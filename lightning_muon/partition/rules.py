"""ParameterRule: a rule that overrides the automatic partition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from lightning_muon.partition.names import close_names, names_sentence, one_of_each_kind
from lightning_muon.partition.roles import Group, Role

_LAYOUT_FIELDS = ("split", "repeats", "transposed", "batch_dims")
_VECTOR = re.compile(r"bias|norm|gain|scale|(^|[._])ln", re.IGNORECASE)
_SET_BY_PARTITION = "it is set by the partition"
_RESERVED_OPTIONS = {
    "name": "use the rule's field `name`",
    "params": _SET_BY_PARTITION,
    "param_names": _SET_BY_PARTITION,
    "layouts": "use the rule's fields `split`, `repeats`, `transposed` and `batch_dims`",
    "optimizer": "options cannot choose the optimizer: set group to 'matrix' or 'other'",
    "follows": "it is kept by HybridOptimizer: set 'lr'",
}
"""Keys of a param group that rules cannot set as options, and what to do instead."""


@dataclass
class ParameterRule:
    """Overrides the automatic partition for the parameters that match.

    A rule selects parameters and changes how they are treated. Every selector that is given must match, and at least
    one must be given. Rules apply in the order of the list. If two rules set the same field of the same parameter, the
    later one overrides the earlier one; ``options`` merge key by key.

    Args:
        pattern: glob on the parameter's name (or one of its names, if it is shared), e.g. ``"*.router.weight"``.
            Names are those of ``module.named_parameters()`` without the prefixes of wrappers; ``*`` also matches dots.
        role: role of the parameter in the automatic partition, e.g. ``"embedding"``.
        module_type: class of the module that owns the parameter, by name (``"Linear"``) or dotted path
            (``"torch.nn.Linear"``); in Python also the class itself. Subclasses match.
        group: ``"matrix"`` or ``"other"``.
        split: number of equal maps, or sizes of the maps, that are fused along fan-out; 1 reads one matrix.
        repeats: how often ``split`` recurs along fan-out, e.g. the number of heads if each head keeps its q, k and v
            together. A rule that sets ``split`` resets it to 1.
        transposed: whether the tensor is stored (fan-in, fan-out).
        batch_dims: leading dimensions that count matrices, e.g. 1 for stacked experts (E, m, n).
        options: param-group options that the constructor of the group's optimizer takes, e.g.
            ``{"lr": 3e-3, "weight_decay": 0.0}``.
        name: name of the param group of these parameters. By default, the name of a group with its own options is made
            from the pattern, the module type or the role.

    Raises:
        ValueError: if there is no selector or nothing to change, or if a value is not one of those above.

    Example::

        >>> rules = [
        ...     ParameterRule(pattern="*.router.weight", group="other"),
        ...     ParameterRule(role="embedding", options={"lr": 3e-3, "weight_decay": 0.0}),
        ...     ParameterRule(module_type="FusedAttention", pattern="*.qkv.weight", split=3),
        ... ]
    """

    pattern: str | None = None
    role: Role | None = None
    module_type: str | type[nn.Module] | None = None
    group: Group | None = None
    split: int | list[int] | None = None
    repeats: int | None = None
    transposed: bool | None = None
    batch_dims: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is None and self.role is None and self.module_type is None:
            raise ValueError(f"{self} selects nothing: give it a pattern, a role or a module_type.")
        if self.role is not None and self.role not in get_args(Role):
            raise ValueError(f"Unknown role {self.role!r} in a parameter rule. Roles: {', '.join(get_args(Role))}.")
        if self.group is not None and self.group not in get_args(Group):
            raise ValueError(f"Unknown group {self.group!r} in a parameter rule. Groups: {', '.join(get_args(Group))}.")
        if not (self.group or self.sets_layout or self.options or self.name):
            raise ValueError(f"{self} changes nothing: give it a group, a layout (split, ...), options or a name.")
        sizes = [self.split] if isinstance(self.split, int) else self.split
        if sizes is not None and (not sizes or any(isinstance(s, bool) or s < 1 for s in sizes)):
            raise ValueError(f"split must be a number of blocks or a list of block sizes, 1 or more; got {self.split}.")
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {self.repeats}.")
        if self.batch_dims is not None and self.batch_dims < 0:
            raise ValueError(f"batch_dims must be 0 or more, got {self.batch_dims}.")
        for key in self.options:
            if key in _RESERVED_OPTIONS:
                raise ValueError(f"The option {key!r} cannot be set by a parameter rule; {_RESERVED_OPTIONS[key]}.")

    def __str__(self) -> str:
        module_type = self.module_type.__name__ if isinstance(self.module_type, type) else self.module_type
        values = {**vars(self), "module_type": module_type}
        given = ", ".join(f"{key}={value!r}" for key, value in values.items() if value is not None and value != {})
        return f"ParameterRule({given})"

    @property
    def sets_layout(self) -> bool:
        """Whether the rule says how a tensor is read as matrices."""
        return any(getattr(self, key) is not None for key in _LAYOUT_FIELDS)

    @property
    def label(self) -> str:
        """The label of the rule's param group: its name, or else its selectors without wildcards."""
        if self.name is not None:
            return self.name
        module_type = self.module_type.__name__ if isinstance(self.module_type, type) else self.module_type
        parts = (self.role, module_type, self.pattern and self.pattern.replace("*", "").strip("."))
        return "/".join(part for part in parts if part) or "all"

    def matches(self, names: Iterable[str], role: Role, owners: Iterable[type[nn.Module]]) -> bool:
        """Whether the rule selects a parameter with these names and this role, owned by modules of these types."""
        return (
            (self.role is None or self.role == role)
            and (self.pattern is None or any(fnmatchcase(name, self.pattern) for name in names))
            and (self.module_type is None or any(is_module_type(owner, self.module_type) for owner in owners))
        )


def is_module_type(owner: type[nn.Module], module_type: str | type[nn.Module]) -> bool:
    """Whether a class is, or derives from, the one given as class, class name or dotted path.

    A dotted path matches where the class is defined and where a parent package re-exports it: both
    ``torch.nn.modules.linear.Linear`` and ``torch.nn.Linear``.
    """
    if isinstance(module_type, type):
        return issubclass(owner, module_type)
    package, _, name = module_type.rpartition(".")
    return any(
        base.__qualname__ == name and (not package or f"{base.__module__}.".startswith(f"{package}."))
        for base in owner.__mro__
    )


def unmatched(
    rule: ParameterRule, weights: Sequence[str], vectors: Sequence[str], roles: Sequence[str], owners: Sequence[str]
) -> ValueError:
    """Return the error for a rule that selects no parameter, with similar names.

    Args:
        rule: the rule.
        weights: names of the parameters that are not vectors; they are suggested unless the rule names a bias or norm.
        vectors: names of the vectors.
        roles: roles of the parameters.
        owners: class names of the modules that own the parameters, those of weights first.
    """
    hints = []
    if rule.pattern is not None and not any(fnmatchcase(name, rule.pattern) for name in (*weights, *vectors)):
        asked = rule.pattern.replace("*", "").strip(".")
        kinds = [one_of_each_kind(names) for names in (weights, vectors)]
        likely, others = reversed(kinds) if _VECTOR.search(asked) else kinds
        pool = next((names for names in (likely, others) if close_names(asked, names)), likely or others)
        hints.append(names_sentence(close_names(asked, pool), pool))
    if rule.role is not None and rule.role not in roles:
        hints.append(f"Roles in this module: {', '.join(roles)}.")
    if rule.module_type is not None:
        asked = rule.module_type.__name__ if isinstance(rule.module_type, type) else rule.module_type.rpartition(".")[2]
        if asked not in owners:
            hints.append(f"Modules with parameters: {names_sentence(close_names(asked, owners), owners)}")
    if not hints:
        hints.append("Each selector matches some parameter, but no parameter matches all of them.")
    return ValueError(f"{rule} matches no parameter. {' '.join(hints)}")
