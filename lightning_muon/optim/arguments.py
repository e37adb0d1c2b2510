"""Checks of parameters and options. Each error message says how to fix the problem."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_muon.partition import MatrixLayout
from lightning_muon.partition.names import near_names

OPTIMIZER_KEY = "optimizer"
"""Key of a param group for the class of its optimizer, so that no other class loads its state."""

FOLLOWS_KEY = "follows"
"""Key of a param group of a hybrid for the name of the group whose learning rate it follows."""

STRUCTURAL_KEYS = frozenset({"params", "param_names", "name", "layouts"})
"""Keys that users may write into a param group besides options."""

WRITTEN_BY_OTHERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}  # schedulers of torch
    | {"use_muon"}  # pytorch-optimizer and Keller Jordan's Muon
)
"""Keys that schedulers and other optimizers write into param groups."""

_NOT_AN_OPTION = {
    OPTIMIZER_KEY: (
        "options cannot choose the optimizer. Make an optimizer of that class for these parameters; a HybridOptimizer "
        "holds several"
    ),
    FOLLOWS_KEY: "it is kept by HybridOptimizer. Give the group an 'lr' of its own",
}
"""Keys of param groups that only this package writes: why users cannot set them, and what to do instead."""

NO_CLASS = (
    "A package that calls optimizer(params=module.parameters(), lr=...) cannot say which parameters are matrices: pass "
    "callbacks=[lightning_muon.UseMuon(...)] to its Trainer instead, and leave its optimizer as it is."
)
"""What to do if another package calls an optimizer class with all parameters of a module."""


class UnknownOptionError(ValueError):
    """Raised for an option that an optimizer does not have."""

    kind: str
    key: str
    options: list[str]

    @classmethod
    def of(cls, kind: str, key: str, options: list[str], who: str) -> UnknownOptionError:
        """Create the error with its message.

        Args:
            kind: class of the optimizer.
            key: the unknown option.
            options: the options that the optimizer has.
            who: words for who sets the option, e.g. ``"param group 0 sets"``.
        """
        hint = near_names(key, options, limit=len(options), what="Options")
        error = cls(f"{kind} has no option {key!r}, which {who}. {hint}")
        error.kind, error.key, error.options = kind, key, options
        return error


def checked_layout(parameter: Tensor, name: str, layout: MatrixLayout | None) -> MatrixLayout:
    """Check a parameter and return its layout: the given one, or that of a 2-D matrix.

    Raises:
        TypeError: if the parameter is sharded or not floating-point.
        ValueError: if it cannot be read as matrices.
    """
    if isinstance(parameter, DTensor):
        raise TypeError(
            f"{name!r} is a DTensor (FSDP2 or ModelParallelStrategy): matrix optimizers need whole matrices. Use DDP "
            "or a single device, or an elementwise optimizer such as torch.optim.AdamW for it."
        )
    if not parameter.is_floating_point():
        raise TypeError(f"{name!r} is {parameter.dtype}: matrix optimizers take real floating-point parameters only.")
    if layout is None:
        if parameter.ndim != 2:
            raise ValueError(
                f"{name!r} has shape {tuple(parameter.shape)}, which is not a matrix. Send vectors and tables to "
                "another optimizer, e.g. by HybridOptimizer.from_module; for convolutions or experts give the group "
                f"'layouts'. {NO_CLASS}"
            )
        return MatrixLayout()
    try:
        layout.check(parameter.shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return layout


def check_option_names(optimizer: Optimizer, group: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Check that the constructor of the optimizer knows the options of a new param group; torch does not check it.

    Args:
        optimizer: the optimizer of the group.
        group: the group, as the user wrote it.
        allowed: further keys that the group may have.

    Raises:
        UnknownOptionError: if the optimizer does not have an option.
        ValueError: if the group has a key that only this package writes; see :func:`check_own_keys`.
    """
    options = constructor_options(optimizer)
    where = _description(group, len(optimizer.param_groups))
    check_own_keys(optimizer, group, where)
    for key in group:
        if key not in options and key not in STRUCTURAL_KEYS and key not in _NOT_AN_OPTION and key not in allowed:
            raise UnknownOptionError.of(type(optimizer).__name__, str(key), options, f"{where} sets")


def check_rule_options(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Check the option names of a group of the partition. Its options come from parameter rules.

    Raises:
        UnknownOptionError: if the optimizer does not have an option.
    """
    options = constructor_options(optimizer)
    for key in group:
        if key not in options and key not in STRUCTURAL_KEYS:
            raise UnknownOptionError.of(type(optimizer).__name__, str(key), options, set_by_rule(group))


def set_by_rule(group: dict[str, Any]) -> str:
    """The argument ``who`` of :meth:`UnknownOptionError.of` for a group of the partition."""
    return f"a parameter rule sets for the group {group['name']!r}"


def check_own_keys(optimizer: Optimizer, group: dict[str, Any], where: str) -> None:
    """Check that a user does not set keys that only this package writes.

    A copy of a param group of an optimizer of the same class may have them.

    Args:
        optimizer: the optimizer of the group.
        group: the group, as the user wrote it.
        where: words for the group in the error.

    Raises:
        ValueError: if the group has such a key.
    """
    if group.get(OPTIMIZER_KEY) == class_label(optimizer):
        return
    for key, reason in _NOT_AN_OPTION.items():
        if key in group:
            raise ValueError(f"{where[0].upper()}{where[1:]} sets {key!r} to {group[key]!r}, but {reason}.")


def class_label(optimizer: Optimizer) -> str:
    """Package and class of an optimizer, e.g. ``"torch.AdamW"``, as stored in its param groups."""
    kind = type(optimizer)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


def constructor_options(optimizer: Optimizer) -> list[str]:
    """The options that a param group may set: the ``defaults`` that the constructor of the optimizer takes.

    A rule may fix a default of its base class, which a group must not change.
    """
    taken: set[str] = set()
    for base in type(optimizer).__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        if "defaults" in parameters:  # through **kwargs, or inherited: any default can be given
            return list(optimizer.defaults)
        taken.update(parameters)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return [key for key in optimizer.defaults if key in taken]


def check_non_negative(group: dict[str, Any], key: str) -> None:
    """Raise ``ValueError`` unless an option is a finite number of 0 or more, or a tensor that holds one."""
    value = group[key]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"A tensor {key} must have one element, got shape {tuple(value.shape)}.")
        value = value.item()
    if not _is_number(value) or not 0.0 <= value < math.inf:
        raise ValueError(f"{key} must be a finite number of 0 or more, got {value!r}.")


def check_fraction(group: dict[str, Any], key: str) -> None:
    """Raise ``ValueError`` unless an option is a number from 0 to below 1."""
    if not _is_number(group[key]) or not 0.0 <= group[key] < 1.0:
        raise ValueError(f"{key} must be a number from 0 to below 1, got {group[key]!r}.")


def check_betas(group: dict[str, Any], key: str) -> None:
    """Raise ``ValueError`` unless an option is a pair of numbers from 0 to below 1."""
    value = group[key]
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{key} must be a pair of numbers from 0 to below 1, got {value!r}.")
    for index, beta in enumerate(value):
        check_fraction({f"{key}[{index}]": beta}, f"{key}[{index}]")


def check_positive(group: dict[str, Any], key: str) -> None:
    """Raise ``ValueError`` unless an option is a finite number above 0."""
    if not _is_number(group[key]) or not 0.0 < group[key] < math.inf:
        raise ValueError(f"{key} must be a finite number above 0, got {group[key]!r}.")


def check_integer(group: dict[str, Any], key: str, minimum: int) -> None:
    """Raise ``ValueError`` unless an option is an integer of at least ``minimum``."""
    value = group[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be an integer of {minimum} or more, got {value!r}.")


def check_choice(group: dict[str, Any], key: str, choices: tuple[str | bool, ...]) -> None:
    """Raise ``ValueError`` unless an option is one of the choices."""
    if group[key] not in choices:
        raise ValueError(f"{key} must be one of {', '.join(map(str, choices))}, got {group[key]!r}.")


def parameter_names(group: dict[str, Any]) -> list[str]:
    """A name for each parameter of a param group: from ``param_names``, or its index in the group."""
    names = group.get("param_names")
    if names is not None:
        return list(names)
    return [f"{group.get('name', 'group')}[{index}]" for index in range(len(group["params"]))]


def unique_names(groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
    """A unique name for each parameter of an optimizer.

    A name that several groups have gets the name or number of the group as a prefix. A name that repeats in a group
    gets a number as a suffix.
    """
    named = [
        (parameter, name, group.get("name", index))
        for index, group in enumerate(groups)
        for parameter, name in zip(group["params"], parameter_names(group), strict=True)
    ]
    counts = Counter(name for _, name, _ in named)
    unique: dict[str, Tensor] = {}
    for parameter, name, group in named:
        stem = name if counts[name] == 1 else f"{group}/{name}"
        numbered = (f"{stem}[{number}]" if number else stem for number in itertools.count())
        unique[next(name for name in numbered if name not in unique)] = parameter
    return {parameter: name for name, parameter in unique.items()}


def check_dtype(group: dict[str, Any], key: str) -> None:
    """Raise ``ValueError`` unless an option is a floating-point dtype, or the name of one, or None."""
    name = plain_option(group[key])
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{key} must be a floating-point dtype such as 'float32', or None, got {group[key]!r}.")


def plain_option(value: Any) -> Any:
    """An option as stored in param groups: the name of a dtype, which every loader can read; a tuple for a list."""
    if isinstance(value, torch.dtype | str):
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, list) else value


def dtype_for_squares(dtype: torch.dtype) -> torch.dtype:
    """The dtype for squares of values in ``dtype``: float32 for float16, where squares underflow, else the same."""
    return torch.float32 if dtype == torch.float16 else dtype


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """1 - beta^t, the divisor that corrects the bias of a moving average; (B,) steps t -> (B, 1, 1)."""
    correction = torch.ones_like(step) if beta == 0.0 else -torch.expm1(step * math.log(beta))
    return correction[:, None, None]


def _description(group: dict[str, Any], index: int) -> str:
    return f"the param group {group['name']!r}" if "name" in group else f"param group {index}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
