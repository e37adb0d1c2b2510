"""History: the measurements of a monitor, as a table of steps and matrices."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


class History:
    """One quantity over a run: a row for each measured step, a column for each matrix.

    Rows are kept in the order of their steps. Where they are more than ``max_rows``, every second one is dropped; the
    first and the last stay. So a long run costs no more memory than a short one, and its older part is kept coarser.

    Args:
        max_rows: the most rows that are kept, at least 2.

    Attributes:
        steps: the measured steps, ascending.
        names: the matrices' names, in the order first seen.

    Raises:
        ValueError: ``max_rows`` is below 2.
    """

    def __init__(self, max_rows: int = 512) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows is {max_rows}: a history keeps its first and last row; set 2 or more")
        self.max_rows = max_rows
        self.steps: list[int] = []
        self.names: list[str] = []
        self._rows: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step.

        A run that is resumed measures some steps again: rows of this step and of later ones are dropped first.
        """
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self._rows.pop()
        known = set(self.names)
        self.names.extend(name for name in values if name not in known)
        self.steps.append(int(step))
        self._rows.append({name: float(value) for name, value in values.items()})
        if len(self.steps) > self.max_rows:
            self.steps = [*self.steps[:-1:2], self.steps[-1]]
            self._rows = [*self._rows[:-1:2], self._rows[-1]]

    def row(self, index: int) -> dict[str, float]:
        """The measured values of the row at ``index`` by name, including those that are not finite."""
        return dict(self._rows[index])

    def array(self) -> list[list[float]]:
        """All values, (steps, names); NaN where a matrix was not measured."""
        return [[row.get(name, math.nan) for name in self.names] for row in self._rows]

    def state_dict(self) -> dict[str, Any]:
        """Names and tensors, which ``torch.load(weights_only=True)`` accepts."""
        shape = (len(self.steps), len(self.names))
        return {
            "names": list(self.names),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "values": torch.tensor(self.array(), dtype=torch.float64).reshape(shape),
            # Kept beside the values, because a measured value may be NaN too.
            "measured": torch.tensor([[name in row for name in self.names] for row in self._rows])
            .bool()
            .reshape(shape),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all rows with those of a ``state_dict``."""
        self.names = list(state["names"])
        self.steps = state["steps"].tolist()
        self._rows = [
            {name: value for name, value, there in zip(self.names, values, measured, strict=True) if there}
            for values, measured in zip(state["values"].tolist(), state["measured"].tolist(), strict=True)
        ]


def write_csv(path: Path, histories: Mapping[str, History]) -> None:
    """Write histories in long format, a line a value: step, quantity, matrix, value.

    Quantities come in the order given, and within one the steps ascend. Numbers are written so that they read back
    exactly; ``nan`` and ``inf`` stand for themselves, and what was not measured has no line.

    Args:
        path: the file, replaced where it exists; its folder is made.
        histories: by quantity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "quantity", "matrix", "value"))
        for quantity, history in histories.items():
            writer.writerows((step, quantity, name, value) for step, name, value in _values(history))


def _values(history: History) -> Iterator[tuple[int, str, float]]:
    for index, step in enumerate(history.steps):
        for name, value in history.row(index).items():
            yield step, name, value
