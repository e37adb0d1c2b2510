"""Names of parameters and classes in messages, and similar names for a mistyped one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.utils import parametrize

INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)|(?<=_l)\d+")
"""An index in a parameter's name: of a block, or of a layer of an RNN."""

WRAPPER_NAMES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Attribute names under which wrappers hold their module."""

_ALIKE = 0.6


def class_name(module: nn.Module) -> str:
    """Return the class name of a module for a sentence: ``"Linear"`` for torch's, with the path for others.

    With its path, ``torch_geometric.nn.dense.linear.Linear`` is not mistaken for ``nn.Linear``. The prefix that
    parametrization adds is left out.
    """
    kind = type(module)
    if kind.__name__.startswith("Parametrized") and parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    name = kind.__qualname__.rpartition("<locals>.")[2]
    if kind.__module__.startswith("torch."):
        return "Linear" if name == "NonDynamicallyQuantizableLinear" else name
    return f"{kind.__module__}.{name}"


def near_names(name: str, candidates: Collection[str], limit: int = 5, what: str = "Names") -> str:
    """Return a sentence that lists the candidates closest to a mistyped name, or some of them if none is close.

    Args:
        name: the mistyped name.
        candidates: the existing names.
        limit: most candidates to list.
        what: plural noun for the candidates, which begins the sentence if none is close.

    Example::

        >>> near_names("encoder.wieght", ["encoder.weight", "encoder.bias"])
        'Near names: encoder.weight, encoder.bias.'
    """
    # Equally similar names in reverse alphabetical order, as in difflib: the highest number first.
    return names_sentence(close_names(name, sorted(candidates, reverse=True)), candidates, limit, what)


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """Return the first of the names that differ only by indices: one name for the same layer of all blocks."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(INDEX.sub("*", name), name)
    return list(first.values())


def names_sentence(close: Sequence[str], names: Collection[str], limit: int = 5, what: str = "Names") -> str:
    """Return the sentence of :func:`near_names` if the close names are known."""
    if not names:
        return "There are no names to choose from."
    if close:
        return f"Near names: {', '.join(close[:limit])}."
    first = list(names)[:limit]
    return f"{what}: {', '.join(first)}{', ...' if len(names) > len(first) else '.'}"


def some_names(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names as text, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def close_names(name: str, candidates: Sequence[str]) -> list[str]:
    """Return the candidates that are similar to a name, or have a similar part, closest first."""
    scores = {candidate: _likeness(name, candidate) for candidate in candidates}
    close = [candidate for candidate in scores if scores[candidate] >= _ALIKE]
    return sorted(close, key=lambda candidate: -scores[candidate])


def _likeness(name: str, candidate: str) -> float:
    """Return the similarity, from 0 to 1, of a name to a candidate or to as many segments of it as the name has."""
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
