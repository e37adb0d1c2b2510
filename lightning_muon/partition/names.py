"""Names of parameters and of classes: in sentences, and those that a mistyped one may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.utils import parametrize

INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)|(?<=_l)\d+")
"""An index in a parameter's name: of a block, or of a layer of an RNN."""

WRAPPER_NAMES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What wrappers call the one module that they hold."""

_ALIKE = 0.6


def class_name(module: nn.Module) -> str:
    """The class of a module for a sentence: ``"Linear"`` for torch's, else with its path.

    ``torch_geometric.nn.dense.linear.Linear`` is not read as ``nn.Linear`` then. What parametrization puts before the
    name is left out.
    """
    kind = type(module)
    if kind.__name__.startswith("Parametrized") and parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    name = kind.__qualname__.rpartition("<locals>.")[2]
    if kind.__module__.startswith("torch."):
        return "Linear" if name == "NonDynamicallyQuantizableLinear" else name
    return f"{kind.__module__}.{name}"


def near_names(name: str, candidates: Collection[str], limit: int = 5, what: str = "Names") -> str:
    """A sentence that lists the candidates closest to a mistyped name, or some of them where none is close.

    Args:
        name: as it was written.
        candidates: what it may have meant.
        limit: how many are listed at most.
        what: the candidates are, which begins the sentence where none is close.

    Example::

        >>> near_names("encoder.wieght", ["encoder.weight", "encoder.bias"])
        'Near names: encoder.weight, encoder.bias.'
    """
    # Of names alike the last in the alphabet first, as difflib has it: the latest of numbered ones.
    return names_sentence(close_names(name, sorted(candidates, reverse=True)), candidates, limit, what)


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """The first of the names that differ by indices only: one for the like layers of all blocks."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(INDEX.sub("*", name), name)
    return list(first.values())


def names_sentence(close: Sequence[str], names: Collection[str], limit: int = 5, what: str = "Names") -> str:
    """The sentence of :func:`near_names` for names of which it is known which are close."""
    if not names:
        return "There are no names to choose from."
    if close:
        return f"Near names: {', '.join(close[:limit])}."
    first = list(names)[:limit]
    return f"{what}: {', '.join(first)}{', ...' if len(names) > len(first) else '.'}"


def some_names(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def close_names(name: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that are like a name, or have a part that is, closest first, else in their order."""
    scores = {candidate: _likeness(name, candidate) for candidate in candidates}
    close = [candidate for candidate in scores if scores[candidate] >= _ALIKE]
    return sorted(close, key=lambda candidate: -scores[candidate])


def _likeness(name: str, candidate: str) -> float:
    """Between 0 and 1: that of the names, or of as many segments of the candidate as the name has."""
    tail = name.rpartition(".")[2]
    parts, count = candidate.split("."), name.count(".") + 1
    runs = {".".join(parts[start : start + count]) for start in range(len(parts) - count + 1)}
    matcher = difflib.SequenceMatcher(b=name)
    best = float(len(tail) > 2 and tail in candidate) * _ALIKE
    for run in (candidate, *runs):
        matcher.set_seq1(run)
        if matcher.real_quick_ratio() > best:
            best = max(best, matcher.ratio())
    return best
