"""The command: arguments, measuring, tables, files."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich import get_console
from rich.markup import escape
from torch import Tensor

from lightning_muon.diagnostics.figures import course_plot, figures_available, heat_map, save_pngs, spectra_plot
from lightning_muon.diagnostics.history import History
from lightning_muon.diagnostics.matrices import select
from lightning_muon.diagnostics.spectra.checkpoints import Checkpoint, CheckpointError, read_checkpoints
from lightning_muon.diagnostics.spectra.histories import select_histories
from lightning_muon.diagnostics.spectra.measure import QUANTITIES, Measured, measure, read_matrices
from lightning_muon.diagnostics.spectra.tables import COMPARED, comparison_table, course_table, matrices_table
from lightning_muon.partition.names import some_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(args: Sequence[str] | None = None) -> None:
    """``lightning-muon spectra``: show what the singular values of the matrices in checkpoints say.

    Args:
        args: the command line after ``spectra``; None for the process's own arguments.

    Raises:
        SystemExit: with code 2 and a message on stderr, if the arguments or the checkpoints cannot be used.

    Example::

        lightning-muon spectra first.ckpt last.ckpt --exclude "decoder.*" --output out
    """
    parser = _parser()
    given = parser.parse_args(args)
    try:
        show_spectra(
            given.checkpoints,
            given.include,
            given.exclude,
            given.model,
            given.output,
            given.max_size,
            given.quantities,
        )
    except (CheckpointError, MisconfigurationException, OSError) as error:
        parser.error(str(error))


def show_spectra(
    paths: Sequence[Path],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    model: str | None = None,
    output: Path = Path("spectra"),
    max_size: int = 4096,
    quantities: Sequence[str] | None = None,
) -> None:
    """Print a table of one checkpoint, of the changes between two, or of the course of more; write CSV and figures.

    Where spectral monitors took part in the runs, a figure shows what they had measured, run beside run; of several
    checkpoints of a run, what the last has.

    Args:
        paths: the checkpoints.
        include: globs on parameter names; None for the parameters that are trained as matrices.
        exclude: globs on parameter names, applied afterwards.
        model: import path of the LightningModule whose partition says what is a matrix.
        output: folder for the files.
        max_size: matrices whose smaller side is larger are left out.
        quantities: globs on the keys under which monitors logged, such as ``"update_*"``: what to draw of that; None
            for all.

    Raises:
        CheckpointError: if a checkpoint cannot be read, or none of its matrices can be shown.
        MisconfigurationException: for a glob that matches nothing, and for the other arguments.
    """
    if max_size < 1:
        raise MisconfigurationException(f"max_size must be 1 or more, got {max_size}.")
    if output.exists() and not output.is_dir():
        raise MisconfigurationException(f"{output} is a file, and output must be a folder.")
    paths = _distinct(paths)
    checkpoints = read_checkpoints(paths, None if model is None else _module_class(model))
    chosen = set(select([parameter for one in checkpoints for parameter in one.parameters], include, exclude))
    output.mkdir(parents=True, exist_ok=True)
    notes = list(dict.fromkeys(note for one in checkpoints for note in one.notes))
    if quantities and not any(one.histories for one in checkpoints):
        notes.append("--quantities has nothing to choose from: no checkpoint holds what spectral monitors measured.")
    histories = select_histories([one.histories for one in checkpoints], quantities)
    measured = []
    for checkpoint, label, drawn in zip(checkpoints, _labels(paths), histories, strict=True):
        matrices = read_matrices(parameter for parameter in checkpoint.parameters if parameter in chosen)
        large = [name for name, matrix in matrices.items() if min(matrix.shape) > max_size]
        if large:
            notes.append(
                f"Left out of {label}, with a smaller side above {max_size} (--max_size): {some_names(large)}."
            )
        _check_any(checkpoint, matrices, large)
        spectra = measure({name: matrix for name, matrix in matrices.items() if name not in large})
        measured.append(Measured(label, checkpoint.step, spectra, drawn))
    if len(measured) > 2 and all(one.step is not None for one in measured):
        measured.sort(key=lambda one: one.step or 0)
    names = _common(measured)
    notes += [*_differences(measured, names), *_not_finite(measured)]
    _print(measured, names, notes)
    lines = [f"Wrote {path}" for path in _write(measured, names, output)]
    if not figures_available():
        lines.append("Figures take matplotlib: pip install matplotlib")
    for line in lines:
        get_console().print(escape(line), soft_wrap=True, highlight=False)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-muon spectra",
        description="Spectral norms, ranks and condition numbers of the matrices in checkpoints: of one checkpoint, "
        "the changes between two, or the course of more. Prints a table, and writes a CSV file and figures.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="Lightning's .ckpt, or a plain state dict."
    )
    for name, text in (
        ("include", "Parameters to show, by name; those trained as matrices unless given."),
        ("exclude", "Parameters to leave out, by name."),
    ):
        parser.add_argument(f"--{name}", nargs="+", action="extend", type=str, metavar="GLOB", help=text)
    parser.add_argument(
        "--quantities",
        nargs="+",
        action="extend",
        type=str,
        metavar="GLOB",
        help="What to draw of that which spectral monitors measured in the run; all unless given.",
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        metavar="my.Module",
        help="LightningModule whose partition says which tensors are matrices, instead of the checkpoint.",
    )
    parser.add_argument("--output", type=Path, default=Path("spectra"), metavar="DIR", help="Folder for the files.")
    parser.add_argument(
        "--max_size", type=int, default=4096, metavar="N", help="Largest smaller side of a matrix that is decomposed."
    )
    return parser


def _module_class(name: str) -> type:
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MisconfigurationException(f"The model {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and hasattr(found, "load_from_checkpoint")):
        raise MisconfigurationException(f"The model {name!r} is no LightningModule: it has no load_from_checkpoint.")
    return found


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list({path.absolute(): path for path in paths}.values())


def _labels(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _check_any(checkpoint: Checkpoint, matrices: Mapping[str, Tensor], large: Sequence[str]) -> None:
    if len(large) < len(matrices):
        return
    if large:
        raise CheckpointError(f"Every matrix of {checkpoint.path} is larger than --max_size: {some_names(large)}.")
    others = [parameter.name for parameter in checkpoint.parameters]
    raise CheckpointError(
        f"No matrix to show in {checkpoint.path}. "
        + (f"With --include you can choose among {some_names(others)}." if others else "No tensor has two dimensions.")
    )


def _common(measured: Sequence[Measured]) -> list[str]:
    """Names of the matrices that all checkpoints have, in the same shape."""
    first, *others = measured
    names = [
        name
        for name, spectrum in first.spectra.items()
        if all(name in other.spectra and other.spectra[name].shape == spectrum.shape for other in others)
    ]
    if not names:
        raise CheckpointError(
            f"{first.label} and the other checkpoints have no matrix of the same name and shape. {first.label}: "
            f"{some_names(first.spectra)}. {others[0].label}: {some_names(others[0].spectra)}."
        )
    return names


def _differences(measured: Sequence[Measured], names: Sequence[str]) -> Iterator[str]:
    every = dict.fromkeys(name for one in measured for name in one.spectra)
    alone = [name for name in every if name not in set(names)]
    missing = [name for name in alone if any(name not in one.spectra for one in measured)]
    if missing:
        yield f"Not in every checkpoint, and left out of the comparison: {some_names(missing)}."
    shapes = [
        f"{name} ({', '.join(dict.fromkeys('{} x {}'.format(*one.spectra[name].shape) for one in measured))})"
        for name in alone
        if name not in missing
    ]
    if shapes:
        yield f"Of different shapes, and left out of the comparison: {some_names(shapes)}."


def _not_finite(measured: Sequence[Measured]) -> Iterator[str]:
    for one in measured:
        broken = [name for name, found in one.spectra.items() if not bool(found.singular_values.isfinite().all())]
        if broken:
            yield f"NaN or infinity in {one.label}: {some_names(broken)}."


def _print(measured: Sequence[Measured], names: Sequence[str], notes: Sequence[str]) -> None:
    if len(measured) == 1:
        table = matrices_table(measured[0])
    elif len(measured) == 2:
        table = comparison_table(measured[0], measured[1], names)
    else:
        table = course_table(measured, names)
    console = get_console()
    console.print(table)
    for note in notes:
        console.print(escape(note), style="yellow", highlight=False)


def _write(measured: Sequence[Measured], names: Sequence[str], output: Path) -> list[Path]:
    """Write all values as CSV, and figures of the common matrices where there is matplotlib.

    Returns:
        The files.
    """
    table = output / "spectra.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("checkpoint", "step", "quantity", "matrix", "value"))
        for one in measured:
            for key in QUANTITIES:
                writer.writerows((one.label, one.step, key, name, of.values[key]) for name, of in one.spectra.items())
    if not figures_available():
        return [table]
    snapshots = {one.label: {name: one.spectra[name].singular_values for name in names} for one in measured}
    figures = {"singular_values": spectra_plot(snapshots, "Singular values")}
    histories = {one.label: one.histories for one in measured if one.histories}
    if histories:
        figures["histories"] = course_plot(histories, "What the monitors measured")
    if len(measured) > 2:
        figures |= {key: _course(measured, names, key) for key in COMPARED}
    return [table, *save_pngs(figures, output)]


def _course(measured: Sequence[Measured], names: Sequence[str], key: str) -> Figure:
    """A heat map over the steps, or over the checkpoints' numbers where steps do not tell them apart."""
    steps = [one.step for one in measured if one.step is not None]
    by_step = len(set(steps)) == len(measured)
    history = History()
    for step, one in zip(steps if by_step else range(1, len(measured) + 1), measured, strict=True):
        history.append(step, {name: one.spectra[name].values[key] for name in names})
    words = QUANTITIES[key]
    figure = heat_map(history, key, words, f"{words.capitalize()} in {len(measured)} checkpoints")
    if not by_step:
        figure.axes[0].set_xlabel("checkpoint, in the order of the table")
    return figure
