"""Writes the figures and measurements of a run when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from lightning_muon.diagnostics.figures import publish, save_pngs, shows_figures
from lightning_muon.diagnostics.history import History, write_csv

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure


def show_run(
    name: str,
    histories: Mapping[str, History],
    figures: Mapping[str, Figure],
    loggers: Sequence[Logger],
    directory: Path | None,
) -> None:
    """Pass figures to the loggers that show figures; without such a logger, write PNG and CSV files.

    Args:
        name: name of the CSV file.
        histories: measurements by key; at least one.
        figures: figures by key.
        loggers: loggers of the Trainer.
        directory: folder for the files; None for no files.
    """
    if any(map(shows_figures, loggers)):
        step = max(history.steps[-1] for history in histories.values())
        publish({f"spectral/{key}": figure for key, figure in figures.items()}, loggers, step)
    elif directory is not None:
        save_pngs(figures, directory)
        write_csv(directory / f"{name.replace('/', '_')}.csv", histories)
        rank_zero_info(f"The measurements of {name} are in {directory}")
