"""What spectral monitors had measured in a run, as its checkpoints hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_muon.diagnostics.history import History
from lightning_muon.partition.names import near_names

Histories: TypeAlias = Mapping[tuple[str, str], History]
"""By the key under which a quantity was logged, and its name in words; no words where the checkpoint has none."""

_ENTRIES = {"names", "steps", "values", "measured"}


def read_histories(content: Mapping[str, Any]) -> Histories:
    """The histories in a Lightning checkpoint, of all its monitors; what other callbacks keep is passed over."""
    callbacks = content.get("callbacks") if "state_dict" in content else None
    histories = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        for key, saved in _saved(state):
            logged, label = state.get("shown", {}).get(key, (key, ""))
            histories[logged, label] = History()
            histories[logged, label].load_state_dict(saved)
    return histories


def select_histories(runs: Sequence[Histories], quantities: Sequence[str] | None) -> list[Histories]:
    """What to draw of each checkpoint: nothing of one whose histories go on in those of another.

    Args:
        runs: the histories of each checkpoint.
        quantities: globs on the keys; None for all.

    Returns:
        As many as there are checkpoints, in their order.

    Raises:
        MisconfigurationException: for a glob that matches nothing in any checkpoint that has histories.
    """
    keys = list(dict.fromkeys(key for histories in runs for key, _ in histories))
    for glob in quantities or ():
        if keys and not any(fnmatchcase(key, glob) for key in keys):
            raise MisconfigurationException(f"quantities: nothing like {glob!r} was measured. {near_names(glob, keys)}")
    chosen = {key for key in keys if quantities is None or any(fnmatchcase(key, glob) for glob in quantities)}
    whole = _whole(runs)
    return [
        {names: history for names, history in histories.items() if index in whole and names[0] in chosen}
        for index, histories in enumerate(runs)
    ]


def _saved(state: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a callback's state that :class:`History` wrote."""
    histories = state.get("histories") if isinstance(state, Mapping) else None
    for key, saved in histories.items() if isinstance(histories, Mapping) else ():
        if isinstance(saved, Mapping) and saved.keys() >= _ENTRIES:
            yield key, saved


def _whole(runs: Sequence[Histories]) -> set[int]:
    """Indices of the runs that are no beginning of another one; of equal ones the first."""

    def length(index: int) -> tuple[int, int]:
        last = max((history.steps[-1] for history in runs[index].values() if history.steps), default=-1)
        return last, len(runs[index])

    whole: list[int] = []
    for index in sorted(range(len(runs)), key=length, reverse=True):
        if not any(_begins(runs[index], runs[longer]) for longer in whole):
            whole.append(index)
    return set(whole)


def _begins(part: Histories, whole: Histories) -> bool:
    return part.keys() <= whole.keys() and all(_first_rows(history, whole[names]) for names, history in part.items())


def _first_rows(part: History, whole: History) -> bool:
    """Whether ``part`` is how ``whole`` began, which may have lost rows since, but not the first one."""
    if not part.steps:
        return True
    rows = _rows(part)
    early = {step: row for step, row in _rows(whole).items() if step <= part.steps[-1]}
    return part.steps[0] in early and all(rows.get(step) == row for step, row in early.items())


def _rows(history: History) -> dict[int, dict[str, float | None]]:
    """Rows by step, with None for NaN, which does not equal itself."""
    return {
        step: {name: None if math.isnan(value) else value for name, value in history.row(index).items()}
        for index, step in enumerate(history.steps)
    }
