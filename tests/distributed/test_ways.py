"""Each way into the package with two processes: spawned or launched by Lightning, and those of torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_muon.schedules import Linear
from tests.callbacks.test_late_parameters import Freeze
from tests.distributed import processes
from tests.lightning_helpers import Items
from tests.ways import WAYS, train

pytestmark = pytest.mark.distributed


ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tests.distributed.test_ways import fit

if __name__ == "__main__":
    fit("MuonCLI", Path(sys.argv[1]), "ddp")
"""


class Write(pl.Callback):
    """Writes what a process has trained, and by what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        found = {
            "optimizer": type(optimizer).__name__,
            "children": {name: type(child).__name__ for name, child in optimizer.optimizers.items()},
            "steps": trainer.global_step,
            "lr": [group["lr"] for group in optimizer.param_groups],
            "sum": [float(parameter.double().sum()) for parameter in pl_module.parameters()],
            "in memory of its own": not any(parameter.is_shared() for parameter in pl_module.parameters()),
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def fit(way: str, folder: Path, strategy: str, *callbacks: pl.Callback) -> None:
    data, callbacks = Items(8), (Write(folder), *callbacks)
    train(way, schedule=Linear(), data=data, callbacks=callbacks, max_epochs=2, strategy=strategy, devices=2)


def fit_by_command_line(rank: int, folder: Path) -> None:
    fit("MuonCLI", folder, "ddp")


@pytest.mark.parametrize("way", WAYS)
def test_spawned_processes_train_with_the_hybrid(way: str, tmp_path: Path) -> None:
    """The Trainer is pickled for them, and what a callback or the command line gives its module goes along."""
    with processes.spawned_by_fork_server():
        fit(way, tmp_path, "ddp_spawn")
    assert_equal(tmp_path)


def test_processes_of_torchrun_train_with_the_hybrid(tmp_path: Path) -> None:
    processes.run({"fit": fit_by_command_line}, tmp_path, args=(tmp_path,))
    assert_equal(tmp_path)


def test_processes_that_lightning_launches_train_with_the_hybrid(tmp_path: Path) -> None:
    """The strategy ddp starts the script once more for each further process."""
    script = tmp_path / "main.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    started = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        _, messages = started.communicate(timeout=240)
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    assert started.returncode == 0, messages
    assert_equal(tmp_path)


def test_layers_unfrozen_under_ddp_stay_equal(tmp_path: Path) -> None:
    """DistributedDataParallel averages no gradient of what was frozen when it was built."""
    with processes.spawned_by_fork_server():
        fit("mixin", tmp_path, "ddp_spawn", Freeze(("up", "embed")))
    assert_equal(tmp_path)


def assert_equal(folder: Path) -> None:
    """Both processes trained by the same steps to the same weights."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    expected: dict[str, Any] = {
        "optimizer": "HybridOptimizer",
        "children": {"other": "AdamW", "matrix": "Muon"},
        "steps": 8,
        "in memory of its own": True,
    }
    assert expected.items() <= first.items()
