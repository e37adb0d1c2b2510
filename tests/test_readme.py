"""The Python code of the README runs unchanged, block after block, in one namespace."""

from __future__ import annotations

import re
import shlex
from glob import glob
from pathlib import Path

import pytest

from lightning_muon import HybridOptimizer, Partition
from lightning_muon.cli import main

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Trainers write their logs there
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, README.name, "exec"), namespace)
    assert isinstance(namespace["optimizer"], HybridOptimizer)
    partition = namespace["model"].partition()  # type: ignore[attr-defined]
    assert isinstance(partition, Partition)
    assert partition["encoder.linear1.weight"].group == "other"
    assert partition["encoder.linear2.weight"].group == "matrix"


@pytest.mark.filterwarnings("ignore")
def test_commands_of_the_console_script_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("lightning-muon ")]
    assert {command[1] for command in commands} == {"partition", "fit", "spectra"}
    monkeypatch.chdir(tmp_path)
    # The first commands write the checkpoints that the others read.
    for command in sorted(commands, key=lambda command: command[1] == "spectra"):
        words = [found for word in command[1:] for found in (sorted(glob(word)) or [word])]
        main(words)
        expected = "spectral" if command[1] == "spectra" else "matrix: 2 matrices"
        assert expected in capsys.readouterr().out
