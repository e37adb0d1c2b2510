"""Two processes of a Trainer give the same metrics as one, although the users do not divide evenly."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.recsys.data import SyntheticSequences
from examples.recsys.models import SASRec, SemanticIdLM
from examples.recsys.semantic_ids.codes import SemanticIds

USERS = 37


def evaluate(**kwargs) -> dict[str, float]:
    L.seed_everything(0)
    data = SyntheticSequences(num_users=USERS, num_clusters=10, items_per_cluster=3, max_length=15, eval_batch_size=5)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **kwargs)
    (metrics,) = trainer.test(SASRec(data.num_items, max_length=15), datamodule=data, verbose=False)
    return metrics


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_count_every_user_once(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    one = evaluate(devices=1)
    two = evaluate(devices=2, strategy="ddp_fork")  # a new interpreter would import for longer than it runs
    assert two == pytest.approx(one, abs=1e-6)
    assert one["test/masked/recall@10"] * USERS == pytest.approx(round(one["test/masked/recall@10"] * USERS), abs=1e-4)


def test_ddp_does_not_send_the_tables_of_the_codes_at_every_step(tmp_path):
    """They are equal in all processes, and larger than many models."""
    SemanticIds(torch.arange(200)[:, None] // torch.tensor([10, 1])).write(tmp_path / "codes.csv")
    model = SemanticIdLM(200, str(tmp_path / "codes.csv"), hidden_size=8, num_layers=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sent = DistributedDataParallel(model).modules_buffers
    finally:
        dist.destroy_process_group()
    constants = [model.codes, *model.tree.buffers()]
    assert len(constants) == 4
    assert not {id(buffer) for buffer in sent} & {id(buffer) for buffer in constants}
