"""Running ``lightning-muon spectra`` and reading what it prints and writes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_muon.diagnostics.spectra import main


def shown(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """What the command prints."""
    main([str(arg) for arg in args])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The error with which the command ends."""
    with pytest.raises(SystemExit) as error:
        main([str(arg) for arg in args])
    assert error.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def rows(folder: Path) -> dict[tuple[str, str, str], float]:
    """The CSV file: (checkpoint, quantity, matrix) -> value."""
    with (folder / "spectra.csv").open() as file:
        lines = csv.DictReader(file)
        return {(line["checkpoint"], line["quantity"], line["matrix"]): float(line["value"]) for line in lines}


def matrices(folder: Path) -> list[str]:
    """Names of the matrices in the CSV file, in its order."""
    return list(dict.fromkeys(matrix for _, _, matrix in rows(folder)))
