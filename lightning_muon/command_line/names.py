"""Similar names for the errors of a command line: options, classes, members of modules."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry


def did_you_mean(word: str, known: Iterable[str], prefix: str = "", list_few: bool = False) -> str:
    """Return `` Did you mean a or b?``, or a list of the known names, or nothing; it begins with a space."""
    known = list(dict.fromkeys(known))
    if found := near(word, known):
        return f" Did you mean {either([prefix + name for name in found])}?"
    return f" There are {', '.join(known)}." if list_few and 0 < len(known) <= 25 else ""


def near(word: str, known: Iterable[str]) -> list[str]:
    """Return the known names most similar to ``word``, at most three; the case does not matter."""
    return _best({name: _likeness(word, name) for name in known}, least=0.6)


def near_dotted(word: str, known: Iterable[str]) -> list[str]:
    """Like :func:`near` for dotted names, part by part; ``--max_epochs`` finds ``--trainer.max_epochs``."""
    parts = word.removeprefix("--").split(".")
    scores: dict[str, float] = {}
    for name in known:
        others = name.removeprefix("--").split(".")
        if len(others) <= len(parts):  # the rest are arguments below that name
            found = ".".join([name, *parts[len(others) :]])
            score = min(map(_likeness, parts, others))
        else:  # the first parts may be left out
            found, score = name, 0.95 * min(map(_likeness, parts, others[-len(parts) :]))
            if others[-1] == parts[-1]:  # the last part is right, but stands elsewhere
                score = max(score, 0.7)
        if found != word:
            scores[found] = max(score, scores.get(found, 0.0))
    return _best(scores, least=0.7)


def either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def noun(kinds: Sequence[type]) -> str:
    """Return the common noun for objects of the first of these classes: ``model``, ``optimizer``, ``callback``."""
    if not kinds:
        return "class"
    names = [cls.__name__ for cls in kinds[0].__mro__]
    for name in ("LightningModule", "LightningDataModule", "Optimizer", "Schedule", "Callback", "Strategy", "Logger"):
        if name in names:
            return {"LightningModule": "model", "LightningDataModule": "data module"}.get(name, name.lower())
    return names[0]


def subclasses(kinds: Iterable[type]) -> list[str]:
    """Return the names of imported public classes of these kinds that can be instantiated, sorted."""
    return sorted({cls.__name__ for kind in kinds for cls in (kind, *_descendants(kind)) if _is_public(cls)})


def arguments(path: str) -> list[str]:
    """Return the names of all arguments of a class, with those that it passes on as ``**kwargs``."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(resolve(path), fail_untyped=False, sub_configs=False)
    except Exception:  # similar names are optional: a class that cannot be read has none
        return []
    return [name for name in vars(parser.get_defaults()) if name != "params"]


def members(module: str, kinds: Sequence[type]) -> list[str]:
    """Classes of these kinds in a module."""
    found = vars(sys.modules[module]) if module in sys.modules else {}
    return [name for name, value in found.items() if isinstance(value, type) and issubclass(value, tuple(kinds))]


def submodules(module: str) -> list[str]:
    """Modules in a package; all that can be imported for an empty name."""
    if not module:
        return [found.name for found in pkgutil.iter_modules()]
    paths = getattr(sys.modules.get(module), "__path__", ())
    return [found.name for found in pkgutil.iter_modules(paths)]


def resolve(path: str) -> Any:
    """Return the object at a dotted path; None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # a module of the user's may raise anything
        return None


def experimental(name: str) -> str | None:
    """Path of the experimental class of this name; None if there is none."""
    path = f"lightning_muon.experimental.{name}"
    return path if isinstance(resolve(path), type) else None


def check_namespace(cls: object) -> None:
    """Raise for a module of the package ``pytorch_lightning``.

    Raises:
        TypeError: if ``cls`` is one of its modules or data modules; names both packages.
    """
    if isinstance(cls, type) and (sentence := other_namespace(cls)):
        raise TypeError(sentence)


def other_namespace(cls: type) -> str | None:
    """What to do with a module of the package ``pytorch_lightning``; None for any other class."""
    bases = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in cls.__mro__}
    for name in ("LightningModule", "LightningDataModule"):
        if f"pytorch_lightning.{name}" in bases and f"lightning.{name}" not in bases:
            return (
                f"{cls.__name__} is a {name} of the package pytorch_lightning, and this command line has the Trainer "
                "of the package lightning, which refuses it. Write `import lightning.pytorch as pl` for `import "
                "pytorch_lightning as pl` in its file. Where the file is not yours, train it with pytorch_lightning's "
                "own Trainer and callbacks=[lightning_muon.UseMuon(...)]."
            )
    return None


def unregistered_name(trainer: Mapping[str, Any]) -> str | None:
    """Return the error for an unknown strategy or accelerator; Lightning's own error has no similar names."""
    for key, known in (
        ("strategy", ["auto", *StrategyRegistry.available_strategies()]),
        ("accelerator", ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]),
    ):
        name = trainer.get(key)
        if isinstance(name, str) and name not in known:
            return f"trainer.{key}: No {key} {name!r}.{did_you_mean(name, known, list_few=True)}"
    return None


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first.lower(), second.lower()).ratio()


def _best(scores: dict[str, float], least: float) -> list[str]:
    """Return the names with the best score, or nearly the best, at most three."""
    names = sorted(scores, key=lambda name: -scores[name])[:3]
    return [name for name in names if scores[name] >= max(least, scores[names[0]] - 0.05)]


def _descendants(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)


def _is_public(cls: type) -> bool:
    private = any(part.startswith("_") for part in (*cls.__module__.split(".")[:1], cls.__name__))
    base = cls in (LightningModule, LightningDataModule) or "<locals>" in cls.__qualname__
    return not (private or base or inspect.isabstract(cls))
