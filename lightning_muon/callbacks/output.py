"""Writes the figures and measurements of a run when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
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

    Each figure takes about a second of a CPU; a line says how long all took.

    Args:
        name: name of the CSV file.
        histories: measurements by key; at least one.
        figures: figures by key.
        loggers: loggers of the Trainer.
        directory: folder for the files; None for no files.
    """
    begin = perf_counter()
    if any(map(shows_figures, loggers)):
        step = max(history.steps[-1] for history in histories.values())
        publish({f"spectral/{key}": figure for key, figure in figures.items()}, loggers, step)
    elif directory is not None:
        save_pngs(figures, directory)
        write_csv(directory / f"{name.replace('/', '_')}.csv", histories)
        rank_zero_info(f"The measurements of {name} are in {directory}")
    if figures:
        count = "1 figure" if len(figures) == 1 else f"{len(figures)} figures"
        rank_zero_info(f"{count} of {name} took {perf_counter() - begin:.1f} s; plot=False leaves them out.")


def where_all_values_are(loggers: Sequence[Logger], directory: Path | None, per_parameter: bool) -> str:
    """A sentence on where a run keeps what it measures of each matrix.

    Args:
        loggers: the Trainer's.
        directory: for the files of those runs whose loggers show no figures; None for no files.
        per_parameter: whether the matrices are logged.
    """
    if per_parameter and loggers:
        return f"logged to {', '.join(type(logger).__name__ for logger in loggers)}."
    if any(map(shows_figures, loggers)):
        return "figures at the end of the fit; per_parameter=True logs them."
    if directory is not None:
        return f"{directory}/*.csv at the end of the fit."
    return "per_parameter=True logs them." if loggers else "monitor.histories."
