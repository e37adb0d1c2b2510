"""Generative recommenders learn the order of items, which popularity ignores."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from examples.recsys.data import SyntheticSequences
from examples.recsys.models import TIGER, GenerativeRecommender, MiniOneRec, Popularity, Recommender, SemanticIdLM
from examples.recsys.semantic_ids.codes import SemanticIds
from lightning_muon import Muon
from tests.lightning_helpers import QUIET

NUM_CLUSTERS, ITEMS_PER_CLUSTER = 20, 3
T5 = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "head_size": 16, "feedforward_size": 64, "attention": "eager"}
QWEN3 = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "sizes", "samples", "max_steps"),
    [
        (TIGER, T5, "prefix", 150),
        (SemanticIdLM, QWEN3, "sequence", 150),
        (partial(MiniOneRec, tasks=["next_item"]), QWEN3, "prefix", 100),
    ],
    ids=["tiger", "sid_lm", "minionerec"],
)
def test_ranks_at_least_twice_as_well_as_popularity(model_class, sizes, samples, max_steps, tmp_path):
    data = SyntheticSequences(
        num_users=200,
        num_clusters=NUM_CLUSTERS,
        items_per_cluster=ITEMS_PER_CLUSTER,
        num_strides=2,
        min_length=6,
        max_sequence_length=9,
        samples=samples,
        batch_size=64,
    )
    optimizers = {
        "matrix_optimizer": partial(Muon, lr=1e-2, weight_decay=0.0),
        "other_optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }
    model: GenerativeRecommender = model_class(
        data.num_items, code_file(tmp_path), dropout=0.0, num_beams=10, **sizes, **optimizers
    )
    L.Trainer(**{**QUIET, "max_steps": max_steps, "max_epochs": -1}).fit(model, data)
    assert ndcg(model, data) >= 2 * ndcg(Popularity(data.num_items), data) > 0.1


def code_file(folder: Path) -> str:
    """Write codes of all items: the cluster, and the number within it."""
    items = torch.arange(NUM_CLUSTERS * ITEMS_PER_CLUSTER)
    SemanticIds(torch.stack([items % NUM_CLUSTERS, items // NUM_CLUSTERS], dim=1)).write(folder / "codes.csv")
    return str(folder / "codes.csv")


def ndcg(model: Recommender, data: SyntheticSequences) -> float:
    """Masked test NDCG@10."""
    (metrics,) = L.Trainer(**QUIET).test(model, datamodule=data, verbose=False)
    return metrics["test/masked/ndcg@10"]
