"""The examples in docstrings give what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import examples
import lightning_muon
from lightning_muon import HybridOptimizer, Muon, ParameterRule
from lightning_muon.schedules import Cosine

NAMES = {
    "HybridOptimizer": HybridOptimizer,
    "Muon": Muon,
    "ParameterRule": ParameterRule,
    "Cosine": Cosine,
    "L": L,
    "Trainer": partial(L.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False),
    "nn": nn,
    "partial": partial,
    "torch": torch,
}
"""What an example may use besides the names of its module."""


def modules_with_examples() -> list[str]:
    found = []
    for package in (lightning_muon, examples):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            path = Path(importlib.util.find_spec(module.name).origin)
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for example in doctest.DocTestFinder().find(module, extraglobs=NAMES):
        runner.run(example, out=report.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(report)
