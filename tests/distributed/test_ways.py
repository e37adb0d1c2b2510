"""Each way into the package with two processes, started by Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ways import WAYS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import lightning.pytorch as pl
from lightning_muon.schedules import Linear
from tests.lightning_helpers import Items
from tests.ways import train

from tests.callbacks.test_late_parameters import Freeze

way, strategy, folder, freeze = sys.argv[1:]


class Write(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        optimizer, = trainer.optimizers
        found = {
            "optimizer": type(optimizer).__name__,
            "children": {name: type(child).__name__ for name, child in optimizer.optimizers.items()},
            "lr": [group["lr"] for group in optimizer.param_groups],
            "sum": [float(parameter.double().sum()) for parameter in pl_module.parameters()],
        }
        with open(f"{folder}/{trainer.global_rank}.json", "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    callbacks = [Write(), *([Freeze(("up", "embed"))] if freeze else [])]
    train(way, schedule=Linear(), data=Items(8), callbacks=callbacks, max_epochs=2, strategy=strategy, devices=2)
"""


@pytest.mark.parametrize(("way", "strategy"), [*((way, "ddp_spawn") for way in WAYS), ("MuonCLI", "ddp")])
def test_both_processes_train_with_the_hybrid(way, strategy, tmp_path):
    """A module that a callback or the command line gives its optimizer has it in every process."""
    both_equal(way, strategy, tmp_path)


def test_layers_unfrozen_under_ddp_stay_equal(tmp_path):
    """DistributedDataParallel averages no gradient of what was frozen when it was built."""
    both_equal("mixin", "ddp_spawn", tmp_path, freeze="yes")


def both_equal(way, strategy, tmp_path, freeze=""):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, script, way, strategy, str(tmp_path), freeze],
        capture_output=True, text=True, check=False, timeout=200, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["optimizer"] == "HybridOptimizer"
    assert first["children"] == {"other": "AdamW", "matrix": "Muon"}
