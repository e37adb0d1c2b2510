"""Checkpoints of earlier versions load, and their runs continue as they would have then.

``python -m tests.test_old_checkpoints`` writes a set of checkpoints by the current version.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_muon
from lightning_muon import NorMuon
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor
from lightning_muon.schedules import Cosine
from tests.lightning_helpers import Items, Net, WithOptimizer
from tests.ways import WAYS, train

SAVED = Path(__file__).parent / "saved"
VERSIONS = sorted(path.name for path in SAVED.iterdir())


def monitors() -> list[SpectralNormMonitor | EffectiveRankMonitor]:
    quiet = {"every_n_steps": 2, "print_table": False, "plot": False}
    return [SpectralNormMonitor(**quiet), EffectiveRankMonitor(**quiet)]


def run(way: str, max_epochs: int, ckpt_path: Path | None = None):
    """The Trainer and its monitors, in float32 on any CPU."""
    watching = monitors()
    settings = {"kind": Float32NorMuon, "schedule": Cosine(warmup=2, final=0.1), "callbacks": watching}
    return train(way, data=Items(4), max_epochs=max_epochs, ckpt_path=ckpt_path, **settings), watching


class Float32NorMuon(NorMuon):
    def __init__(self, params, lr: float = 0.01):
        super().__init__(params, lr, weight_decay=0.1, orthogonalize_dtype="float32")


def weights(trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.lightning_module.named_parameters()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on(way, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what the monitors write
    trainer, (norms, ranks) = run(way, 2, SAVED / version / f"{way}.pt")
    assert trainer.global_step == 8
    expected = torch.load(SAVED / version / "weights.pt", weights_only=True)
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-4, atol=1e-5)
    assert norms.histories["spectral_norm"].steps == [1, 3, 5, 7]
    assert ranks.histories["stable_rank"].steps == [1, 3, 5, 7]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("way", "kind"), [("mixin", Net), ("UseMuon", WithOptimizer), ("MuonCLI", WithOptimizer)])
def test_weights_load_in_their_class(way, kind, version):
    path = SAVED / version / f"{way}.pt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    loaded = kind.load_from_checkpoint(path, weights_only=True).state_dict()
    torch.testing.assert_close(dict(loaded), dict(saved), rtol=0, atol=0)


def _write() -> None:
    folder = SAVED / lightning_muon.__version__
    folder.mkdir(parents=True)
    for way in WAYS:
        path = folder / f"{way}.pt"
        run(way, 1)[0].save_checkpoint(path)
        reached = weights(run(way, 2, path)[0])
        if way == WAYS[0]:
            torch.save(reached, folder / "weights.pt")
        torch.testing.assert_close(reached, torch.load(folder / "weights.pt"), rtol=0, atol=0)


if __name__ == "__main__":
    _write()
