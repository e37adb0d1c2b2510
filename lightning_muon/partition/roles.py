"""What a parameter is (role), where it goes (group), and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn

from lightning_muon.partition.layout import MatrixLayout

Role: TypeAlias = Literal["hidden", "embedding", "head", "input", "router", "vector", "other"]
Group: TypeAlias = Literal["matrix", "other"]


@dataclass(frozen=True, eq=False)
class ParameterAssignment:
    """One parameter of a module: its role, its group and the reason.

    Args:
        name: name in ``module.named_parameters()``, without the prefixes that wrappers add (``_orig_mod.`` and the
            like).
        parameter: the parameter itself.
        role: its role.
        group: which optimizer takes it.
        layout: how it is read as matrices; None in the group ``"other"``.
        reason: a sentence for the user.
        options: param-group options set by rules, e.g. ``{"lr": 3e-3}``.
        group_name: name of its param group, e.g. ``"other/embedding"``; unique for each set of options.
        aliases: other names of the same parameter, where modules share it.
        unknown: whether it goes to ``"other"`` although it may be a hidden matrix, and no rule decided.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    group: Group
    layout: MatrixLayout | None
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    group_name: str = ""
    aliases: tuple[str, ...] = ()
    unknown: bool = False

    @property
    def frozen(self) -> bool:
        """Whether the parameter takes no gradient; frozen parameters are listed but are in no param group."""
        return not self.parameter.requires_grad
