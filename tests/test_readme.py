"""The Python code of the README runs as it stands, block after block, in one namespace."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_muon import HybridOptimizer, Partition
from lightning_muon.cli import main

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run() -> None:
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
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("lightning-muon ")]
    assert {command[1] for command in commands} == {"partition", "fit"}
    monkeypatch.chdir(tmp_path)
    for command in commands:
        main(command[1:])
        assert "matrix: 2 matrices" in capsys.readouterr().out
