"""Two processes of a Trainer judge a model as one does, though the users do not share out evenly."""

from __future__ import annotations

import lightning as L
import pytest

from examples.recsys.data import SyntheticSequences
from examples.recsys.models import SASRec

USERS = 37


def evaluate(**kwargs) -> dict[str, float]:
    L.seed_everything(0)
    data = SyntheticSequences(num_users=USERS, num_clusters=10, items_per_cluster=3, max_length=15, eval_batch_size=5)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **kwargs)
    (metrics,) = trainer.test(SASRec(data.num_items, max_length=15), datamodule=data, verbose=False)
    return metrics


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_count_every_user_once(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    one = evaluate(devices=1)
    two = evaluate(devices=2, strategy="ddp_spawn")
    assert two == pytest.approx(one, abs=1e-6)
    assert one["test/masked/recall@10"] * USERS == pytest.approx(round(one["test/masked/recall@10"] * USERS), abs=1e-4)
