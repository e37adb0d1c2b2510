"""What an import brings along."""

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_muon

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "transformers", "matplotlib")


@pytest.mark.slow
def test_numerics_import_no_lightning():
    """Which takes three times as long to import as torch."""
    modules = [f"lightning_muon{name}" for name in ("", ".linalg", ".optim", ".partition", ".schedules")]
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "torch" in done.stdout.split()
    assert not set(done.stdout.split()) & set(HEAVY)


@pytest.mark.parametrize("name", [*lightning_muon.__all__, "callbacks", "diagnostics", "optim", "__version__"])
def test_public_names_are_there(name):
    assert getattr(lightning_muon, name) is not None
    assert name in dir(lightning_muon)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_muon' has no attribute 'Moun'"):
        _ = lightning_muon.Moun
