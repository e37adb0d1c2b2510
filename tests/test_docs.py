"""The README and the pages of the documentation: their code runs, their commands and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from examples.plain import Classifier, RandomTokens
from lightning_muon import HybridOptimizer
from lightning_muon.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page as (language, text), in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(program: str) -> Iterator[list[str]]:
    """The words of each command of the pages that starts with ``program``, once."""
    lines = [
        line
        for page in PAGES
        for _, text in blocks(page, "bash", "text")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    seen = dict.fromkeys(line[line.index(program) :] for line in lines if program in line.partition("#")[0])
    return (shlex.split(line, comments=True) for line in seen)


def side(diff: str, sign: str) -> str:
    """A diff's text before (``-``) or after (``+``) the change."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in (" ", sign, "\n"))


class WithOptimizer(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def run_code(page: Path) -> dict[str, Any]:
    """Run a page's code, block after block in one namespace, of a diff what it makes of the code.

    Diffs change code of the reader's: ``model``, ``network`` and ``rows`` stand for it.
    """
    namespace: dict[str, Any] = {"__name__": "page", "model": WithOptimizer()}
    namespace["rows"] = RandomTokens().train_dataloader()
    namespace["network"] = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    for language, text in blocks(page, "python", "diff"):
        code = side(text, "+") if language == "diff" else text
        exec(compile(code, page.name, "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "diff")], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Trainers write their logs there
    monkeypatch.setattr(sys, "argv", ["main.py", "partition"])  # of the MuonCLI in a main.py
    values = run_code(page).values()
    trained = [optimizer for value in values if isinstance(value, L.Trainer) for optimizer in value.optimizers]
    assert all(isinstance(optimizer, HybridOptimizer) for optimizer in trained)
    assert trained or page.name not in ("README.md", "quickstart.md", "your-project.md", "diagnostics.md")


@pytest.mark.filterwarnings("ignore")
def test_rules_of_the_quickstart_send_matrices_where_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    partition = run_code(ROOT / "docs" / "quickstart.md")["model"].partition()
    assert partition["encoder.linear1.weight"].group == "other"
    assert partition["encoder.linear2.weight"].group == "matrix"


def test_the_old_code_of_a_diff_is_code() -> None:
    for page in PAGES:
        for _, text in blocks(page, "diff"):
            compile(side(text, "-"), name_of(page), "exec")


@pytest.mark.filterwarnings("ignore")
def test_commands_of_the_console_script_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [words for words in commands("lightning-muon ") if "logs/muon/" not in " ".join(words)]
    assert {words[1] for words in run} == {"partition", "fit", "spectra"}
    monkeypatch.chdir(tmp_path)
    # The first commands write the checkpoints that the others read.
    for words in sorted(run, key=lambda words: words[1] == "spectra"):
        main([found for word in words[1:] for found in (sorted(glob(word)) or [word])])
        expected = "spectral" if words[1] == "spectra" else "matrix: 2 matrices"
        assert expected in capsys.readouterr().out


def test_configs_of_the_commands_exist() -> None:
    named = {word for words in commands("python -m examples") for word in words if word.startswith("configs/")}
    assert len(named) > 5
    placeholders = re.compile(r"ARM|CONFIG|MODEL|DATA")
    assert not [path for path in named if not placeholders.search(path) and not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_yaml_names_classes_that_exist(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        yaml.safe_load(text)
        for path in re.findall(r"(?:class_path: |_optimizer: )((?:lightning_muon|torch|examples)\.[\w.]+)", text):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


@pytest.mark.slow
def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    """Sphinx warns of markup that it cannot read, of references that lead nowhere and of pages outside the contents."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "dummy", "-W", "--keep-going", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not broken
