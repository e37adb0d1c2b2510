"""The matrices of a module that monitors watch, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_muon.partition import MatrixLayout, ParameterAssignment, ParameterRule, partition_parameters
from lightning_muon.partition.names import near_names
from lightning_muon.partition.sites import walk


@dataclass(frozen=True, eq=False)
class WatchedParameter:
    """A parameter and the matrices that it holds.

    Args:
        name: in the LightningModule, without the prefixes of wrappers.
        parameter: the parameter.
        layout: how it is read as matrices.
        aliases: other names of the same parameter.
        by_default: whether it is watched where nobody asks for it by name.
    """

    name: str
    parameter: nn.Parameter
    layout: MatrixLayout
    aliases: tuple[str, ...] = ()
    by_default: bool = True
    matrices: list[list[str]] = field(init=False)
    """Names of the matrices, a list for each view of the layout (:meth:`MatrixLayout.matrix_names`)."""
    shapes: dict[str, tuple[int, int]] = field(init=False)
    """(m, n) of each matrix by its name."""

    def __post_init__(self) -> None:
        views = self.layout.matrix_shapes(self.parameter.shape)
        names = self.layout.matrix_names(self.name, self.parameter.shape)
        shapes = {name: (m, n) for same, (_, m, n) in zip(names, views, strict=True) for name in same}
        object.__setattr__(self, "matrices", names)
        object.__setattr__(self, "shapes", shapes)

    def read(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of a tensor of the parameter's shape: (b, m, n) a view."""
        return self.layout.read(tensor)

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether one of the globs is about this parameter."""
        return any(fnmatchcase(name, pattern) for name in (self.name, *self.aliases) for pattern in patterns)


def find_matrices(
    module: nn.Module, known: Mapping[nn.Parameter, ParameterAssignment], rules: Sequence[ParameterRule] = ()
) -> list[WatchedParameter]:
    """All parameters of a module that can be read as matrices, frozen ones too, in the module's order.

    Those that a matrix optimizer has are watched by default, and of those that no optimizer of this package has, what
    the partition of the module under its ``parameter_rules`` and ``rules`` would send to one.

    Without a partition (lazy parameters, flat shards) there is a warning, and nothing is watched by default.

    Args:
        module: the module.
        known: what optimizers of this package do with the parameters that they have.
        rules: for the partition of the others.

    Raises:
        ValueError: if ``rules`` are given and do not fit the module.
    """
    entries = {id(parameter): entry for parameter, entry in known.items()}
    if any(id(parameter) not in entries for parameter in module.parameters()):
        for entry in _partition(module, rules):
            entries.setdefault(id(entry.parameter), entry)
    elif rules:
        rank_zero_warn("parameter_rules of a monitor have no effect: the optimizer brings its own partition.")
    names: dict[int, list[str]] = {}
    for site in walk(module):
        names.setdefault(id(site.parameter), []).append(site.name)
    watched = []
    for parameter in module.parameters():
        layout = entries[id(parameter)].layout if id(parameter) in entries else None
        readable = not is_lazy(parameter) and parameter.ndim >= 2 and parameter.numel() > 0
        if not (readable and parameter.is_floating_point()):
            continue
        name, *aliases = names[id(parameter)]
        watched.append(
            WatchedParameter(name, parameter, layout or MatrixLayout(), tuple(aliases), by_default=layout is not None)
        )
    return watched


def select(
    parameters: Sequence[WatchedParameter], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[WatchedParameter]:
    """Those that a monitor is to watch.

    Args:
        parameters: what there is.
        include: globs on names; None for what is watched by default.
        exclude: globs on names, applied afterwards.

    Raises:
        MisconfigurationException: for a glob that matches nothing.
    """
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(parameter.matches([pattern]) for parameter in parameters):
                names = [name for parameter in parameters for name in (parameter.name, *parameter.aliases)]
                near = near_names(pattern.replace("*", "").strip("."), names)
                raise MisconfigurationException(f"{argument}: no matrix has a name like {pattern!r}. {near}")
    chosen = [p for p in parameters if (p.by_default if include is None else p.matches(include))]
    return [parameter for parameter in chosen if not parameter.matches(exclude or ())]


def evenly_chosen(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names at even distances, the first and the last among them, or all where they are fewer."""
    if len(names) <= count:
        return list(names)
    distance = (len(names) - 1) / max(count - 1, 1)
    return [names[round(index * distance)] for index in range(count)]


def _partition(module: nn.Module, rules: Sequence[ParameterRule]) -> Iterable[ParameterAssignment]:
    own = getattr(module, "parameter_rules", None) or ()
    # Parameters that matrix optimizers refuse go to "other" here, so that the rest can be watched.
    refused = [
        ParameterRule(pattern=escape(site.name), group="other")
        for site in walk(module)
        if not is_lazy(site.parameter) and (site.parameter.is_complex() or getattr(site.owner, "sparse", False))
    ]
    try:
        return partition_parameters(module, [*refused, *own, *rules])
    except ValueError as error:
        if rules:
            raise
        rank_zero_warn(f"No matrix of {type(module).__name__} is watched by default: {error}")
        return ()
