"""The sampler whose batches have samples of about the same length."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, RandomSampler, Sampler

from examples.recsys.data import SyntheticSequences
from examples.recsys.data.sampling import LengthGroupedSampler
from examples.recsys.models import SASRec
from tests.lightning_helpers import QUIET

LENGTHS = [1 + (7 * index) % 50 for index in range(2_003)]


def batches(sampler: LengthGroupedSampler, size: int) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(groups: list[list[int]]) -> int:
    """Number of padding positions if each batch is as wide as its longest sample."""
    longest = [max(LENGTHS[index] for index in group) for group in groups]
    return sum(width * len(group) for width, group in zip(longest, groups, strict=True)) - sum(LENGTHS)


def as_in_distributed_training(loader: DataLoader, processes: int, rank: int) -> Sampler[int]:
    """The sampler that a Trainer with several processes uses in the training loader."""
    trainer = SimpleNamespace(
        _accelerator_connector=SimpleNamespace(is_distributed=True, use_distributed_sampler=True),
        distributed_sampler_kwargs={"num_replicas": processes, "rank": rank},
        overfit_batches=0,
    )
    return _DataConnector(trainer)._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING).sampler


class TestLengthGroupedSampler:
    @pytest.mark.parametrize("batch_size", [1, 8, 32, 2_003, 5_000])
    @pytest.mark.parametrize("pool_size", [1, 3, 50])
    def test_every_sample_comes_once(self, batch_size, pool_size):
        sampler = LengthGroupedSampler(LENGTHS, batch_size, pool_size=pool_size)
        order = list(sampler)
        assert len(sampler) == len(order) == 2_003
        assert sorted(order) == list(range(2_003))
        assert all(type(index) is int for index in order)

    def test_batches_have_a_small_part_of_the_padding_of_random_ones(self):
        grouped = padding(batches(LengthGroupedSampler(LENGTHS, 16), 16))
        order = torch.randperm(len(LENGTHS)).tolist()
        shuffled = padding([order[start : start + 16] for start in range(0, len(order), 16)])
        assert 10 * grouped < shuffled

    def test_a_larger_pool_pads_less(self):
        small, large = (padding(batches(LengthGroupedSampler(LENGTHS, 16, pool_size=pool), 16)) for pool in (2, 20))
        assert 2 * large < small

    def test_a_pool_of_one_batch_is_a_random_order_in_batches(self):
        order = torch.randperm(len(LENGTHS)).tolist()
        shuffled = padding([order[start : start + 16] for start in range(0, len(order), 16)])
        assert padding(batches(LengthGroupedSampler(LENGTHS, 16, pool_size=1), 16)) == pytest.approx(shuffled, rel=0.1)

    def test_an_incomplete_batch_comes_last_and_whole_batches_are_alike(self):
        """2,003 samples are 125 batches of 16 and one of 3; with one pool nearly all batches have one length."""
        groups = batches(LengthGroupedSampler(LENGTHS, 16, pool_size=200), 16)
        spreads = [max(values) - min(values) for values in ([LENGTHS[i] for i in group] for group in groups)]
        assert len(groups[-1]) == 3
        assert max(spreads[:-1]) <= 2

    def test_batches_are_in_random_order(self):
        groups = batches(LengthGroupedSampler(LENGTHS, 16, pool_size=200), 16)[:-1]
        means = torch.tensor([sum(LENGTHS[index] for index in group) / len(group) for group in groups])
        neighbours = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
        assert abs(neighbours) < 0.3

    def test_epochs_differ_in_order_and_in_batches(self):
        sampler = LengthGroupedSampler(LENGTHS, 16)
        first, second = batches(sampler, 16), batches(sampler, 16)
        assert first != second
        assert len({frozenset(group) for group in first} & {frozenset(group) for group in second}) < 10

    def test_the_seed_of_the_run_and_the_epoch_decide(self, monkeypatch):
        """Processes with different random states must use the same order."""

        def order(seed: int, epoch: int) -> list[int]:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            torch.manual_seed(len(orders))
            sampler = LengthGroupedSampler(LENGTHS, 16)
            sampler.set_epoch(epoch)
            return list(sampler)

        orders: list[list[int]] = []
        for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 5)):
            orders.append(order(seed, epoch))
        assert orders[0] == orders[1]
        assert orders[0] != orders[2] != orders[3] != orders[0]

    def test_samples_of_one_length_are_all_the_same_to_it(self):
        order = list(LengthGroupedSampler([5] * 100, 8))
        assert sorted(order) == list(range(100)) != order

    @pytest.mark.parametrize(("batch_size", "pool_size", "name"), [(0, 50, "batch_size"), (8, 0, "pool_size")])
    def test_sizes_below_one_get_a_sentence(self, batch_size, pool_size, name):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            LengthGroupedSampler(LENGTHS, batch_size, pool_size=pool_size)


class TestLoader:
    @staticmethod
    def data(**kwargs) -> SyntheticSequences:
        data = SyntheticSequences(num_users=203, num_clusters=10, items_per_cluster=3, samples="prefix", **kwargs)
        data.setup("fit")
        return data

    def test_batches_are_of_about_one_length_and_hold_every_sample(self):
        data = self.data(group_by_length=True, batch_size=16)
        batches = list(data.train_dataloader())
        pads = sum(int((batch["history"] == 0).sum()) for batch in batches)
        shuffled = sum(int((batch["history"] == 0).sum()) for batch in self.data(batch_size=16).train_dataloader())
        assert 5 * pads < shuffled
        assert sum(len(batch["history"]) for batch in batches) == len(data.protocol.train())
        assert [len(batch["history"]) for batch in batches[:-1]] == [16] * (len(batches) - 1)

    def test_without_it_the_order_is_random(self):
        assert isinstance(self.data().train_dataloader().sampler, RandomSampler)

    def test_evaluation_keeps_the_order_of_the_users(self):
        users = torch.cat([batch["user"] for batch in self.data(group_by_length=True).val_dataloader()])
        assert users.tolist() == list(range(203))

    @pytest.mark.parametrize("processes", [2, 3])
    def test_processes_share_every_sample_out_evenly(self, processes):
        parts = [list(LengthGroupedSampler(LENGTHS, 16, processes, rank)) for rank in range(processes)]
        assert {len(part) for part in parts} == {-(-2_003 // processes)}
        assert sorted({index for part in parts for index in part}) == list(range(2_003))

    def test_each_of_two_processes_gets_batches_of_about_one_length(self):
        """With the loader that Lightning makes from ours: it would shuffle any sampler but a DistributedSampler."""
        data, pads = self.data(group_by_length=True, batch_size=16), {}
        for processes in (1, 2):
            pads[processes] = 0
            for rank in range(processes):
                data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
                loader = data.train_dataloader()
                sampler = loader.sampler
                if processes > 1:
                    sampler = as_in_distributed_training(loader, processes, rank)
                sampler.set_epoch(0)
                lengths = torch.tensor(data.protocol.train().lengths())[list(sampler)]
                pads[processes] += sum(int((batch.max() - batch).sum()) for batch in lengths.split(16))
        assert pads[2] < 2 * pads[1]

    def test_a_trainer_fits_with_it(self):
        data = self.data(group_by_length=True, batch_size=64)
        trainer = L.Trainer(**{**QUIET, "max_epochs": 1})
        trainer.fit(SASRec(data.num_items, hidden_size=8), data)
        assert trainer.global_step == -(-len(data.protocol.train()) // 64)
