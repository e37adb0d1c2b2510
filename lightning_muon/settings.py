"""The mixin's settings: checks of their reserved names, and how hyperparameters and checkpoints hold them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_muon.configure import check_settings, configure_hybrid_optimizer
from lightning_muon.partition import ParameterRule

SETTINGS = ("matrix_optimizer", "other_optimizer", "schedule", "parameter_rules")
"""Names of the mixin's arguments, which are its attributes too."""


def check_names(cls: type, mixin: type) -> None:
    """Raise if a class, or a base that the mixin hides, uses the name of a setting for something else."""
    hidden = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    for name in SETTINGS:
        for base in (base for base in hidden if name in vars(base)):
            raise name_taken(base.__name__, name, f"a {type(vars(base)[name]).__name__}")
        value = vars(cls).get(name)
        if isinstance(value, (FunctionType, property)):
            error = name_taken(cls.__name__, name, f"a {type(value).__name__}")
            if name.endswith("_optimizer") and isinstance(value, FunctionType):
                error.add_note(f"To set it for the class write {name} = staticmethod(...) or functools.partial(...).")
            raise error
        if name in ("schedule", "parameter_rules") and name in vars(cls):
            check_setting(cls.__name__, name, value)


def check_setting(module: str, name: str, value: Any) -> None:
    """Raise unless a value can be the setting: the module may use the name for something else."""
    if name == "parameter_rules":
        plausible = value is None or (
            isinstance(value, Sequence) and all(isinstance(rule, ParameterRule) for rule in value)
        )
        if not plausible:
            raise name_taken(module, name, type(value).__name__)
        return
    if hasattr(value, "parameters") and hasattr(value, "named_modules"):
        raise name_taken(module, name, "a submodule")
    settings = {"matrix_optimizer": None, "other_optimizer": None, "schedule": None, name: value}
    try:
        check_settings(**settings, where=f"{module}.")
    except TypeError as error:
        raise TypeError(f"{error} ({name} is a setting of MuonMixin: give your attribute another name.)") from None


def name_taken(module: str, name: str, kind: str) -> AttributeError:
    return AttributeError(
        f"{module}.{name} is a setting of MuonMixin and cannot be {kind}. Give your attribute another name."
    )


def own_arguments(cls: type, mixin: type) -> set[str]:
    """Names of settings that a constructor of the module lists itself: they are hyperparameters of the module."""
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    listed = [inspect.signature(base.__init__).parameters for base in before if "__init__" in vars(base)]  # type: ignore[misc]
    return {name for name in SETTINGS if any(name in parameters for parameters in listed)}


def settings_made_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Instantiate optimizers, schedule and rules from their configuration."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_function_arguments(configure_hybrid_optimizer, skip={"module"})
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # its name before jsonargparse 4.49
    made = instantiate(parser.parse_object(settings))
    return {name: made[name] for name in settings}


def is_configuration(value: Any) -> bool:
    """Whether a hyperparameter is the configuration of a setting, from a command line, and not the module's own."""
    if isinstance(value, list):
        return all(isinstance(item, dict) for item in value)
    return isinstance(value, dict) and "class_path" in value


def is_plain(value: Any) -> bool:
    """Whether ``value`` has only types that load with ``weights_only=True`` and that YAML shows as text."""
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (str, bool, int, float)
