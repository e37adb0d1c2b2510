"""SASRec in both forms, the losses, and evaluation by the protocol."""

from __future__ import annotations

import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.recsys.data import SyntheticSequences
from examples.recsys.data.protocol import collate
from examples.recsys.models import PaperSASRec, Popularity, Recommender, SASRec
from examples.recsys.models.losses import binary_cross_entropy_loss, sampled_softmax_loss, softmax_loss
from lightning_muon import Muon

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def small_data(**kwargs) -> SyntheticSequences:
    data = SyntheticSequences(num_users=60, num_clusters=10, items_per_cluster=3, max_length=10, **kwargs)
    data.setup("fit")
    return data


class TestSASRec:
    def test_parameters_on_beauty(self):
        model = SASRec(num_items=12_101)
        matrices = [a for a in model.partition().assignments if a.group == "matrix"]
        assert sum(parameter.numel() for parameter in model.parameters()) == 98_304 + 779_520
        assert sum(assignment.parameter.numel() for assignment in matrices) == 98_304
        assert len(matrices) == 12
        assert {assignment.name.rsplit(".", 2)[1] for assignment in matrices} == {
            *("query", "key", "value", "output"),
            *("0", "2"),  # the two maps of a feed-forward
        }

    def test_paper_form_has_the_size_of_the_study(self):
        model = PaperSASRec(num_items=3_686)
        groups = {assignment.name: assignment.group for assignment in model.partition().assignments}
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 0.50
        assert [name for name, group in groups.items() if group == "matrix"] == [
            *(f"attention.{name}.weight" for name in ("query", "key", "value")),
            *("ffn.0.weight", "ffn.2.weight"),
        ]

    def test_paper_form_starts_from_small_items_and_large_positions(self):
        embedding = PaperSASRec(num_items=500).embedding
        assert float(embedding.items.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert float(embedding.positions.weight.detach().std()) == pytest.approx(1.0, rel=0.2)

    def test_tied_output_and_untied_output(self):
        tied, untied = SASRec(30), PaperSASRec(30)
        weight, bias = tied.output_layer()
        assert bias is None
        assert weight.data_ptr() == tied.embedding.items.weight[1:].data_ptr()
        assert untied.output_layer() == (untied.head.weight, untied.head.bias)

    def test_scores_are_float32_without_ties_in_mixed_precision(self):
        model = SASRec(2_000, dropout=0.0).eval()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(torch.tensor([[3, 1, 4]]))
        assert scores.dtype == torch.float32
        assert len(scores.unique()) > 1_990

    def test_a_long_history_gets_a_sentence(self):
        with pytest.raises(ValueError, match="The history has 11 items, but max_length=10"):
            PaperSASRec(30)(torch.ones(1, 11, dtype=torch.long))

    def test_heads_that_do_not_divide_get_a_sentence(self):
        with pytest.raises(ValueError, match="num_heads=3 does not divide hidden_size=64"):
            SASRec(30, num_heads=3)

    def test_a_catalogue_of_one_gets_a_sentence(self):
        with pytest.raises(ValueError, match="num_items must be 2 or more, got 1"):
            SASRec(1)

    @pytest.mark.parametrize(
        ("model_class", "options", "samples"),
        [
            (SASRec, {"max_length": 10}, "sequence"),
            (SASRec, {"max_length": 10, "num_negatives": 8}, "sequence"),
            (PaperSASRec, {}, "prefix"),
        ],
    )
    def test_every_parameter_is_trained(self, model_class, options, samples):
        data = small_data(samples=samples)
        model = model_class(data.num_items, **options)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        L.Trainer(max_steps=3, limit_val_batches=0, **QUIET).fit(model, data)
        # A key's bias shifts all scores of a query alike, so its gradient is zero but for rounding.
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and not n.endswith("key.bias")]
        assert still == []

    def test_padding_stays_zero(self):
        data = small_data()
        model = SASRec(data.num_items, max_length=10)
        L.Trainer(max_steps=3, limit_val_batches=0, **QUIET).fit(model, data)
        assert not model.embedding.items.weight[0].any()

    def test_checkpoint_restores_model_and_settings(self, tmp_path):
        data = small_data()
        trainer = L.Trainer(max_steps=2, limit_val_batches=0, **QUIET)
        model = SASRec(data.num_items, max_length=10, num_heads=4)
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = SASRec.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
        history = torch.tensor([[3, 1, 4]])
        torch.testing.assert_close(loaded(history), model.eval()(history))
        assert loaded.blocks[0].attention.num_heads == 4

    @pytest.mark.slow
    def test_paper_form_learns_which_item_follows_which(self):
        ring = {"num_clusters": 40, "items_per_cluster": 1, "num_strides": 1, "noise": 0.0}
        data = SyntheticSequences(num_users=32, max_length=15, **ring)
        data.setup("fit")
        optimizers = {
            "matrix_optimizer": partial(Muon, lr=1e-2, weight_decay=0.0),
            "other_optimizer": partial(torch.optim.AdamW, lr=1e-2),
        }
        model = PaperSASRec(data.num_items, max_length=15, dropout=0.0, **optimizers)
        L.Trainer(max_steps=300, max_epochs=-1, limit_val_batches=0, **QUIET).fit(model, data)
        batch = next(iter(data.train_dataloader()))
        last = (batch["history"] > 0).sum(1) - 1
        targets = batch["targets"][torch.arange(len(last)), last]
        assert (model.eval()(batch["history"]).argmax(1) + 1 == targets).float().mean() > 0.95


class TestLosses:
    @pytest.fixture
    def layer(self, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states = torch.randn(6, 4, generator=generator)
        targets = torch.tensor([0, 3, 3, 7, 1, 0])
        return states, targets, torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)

    def test_sampling_every_item_once_is_the_full_softmax(self, layer, monkeypatch):
        monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(high))
        torch.testing.assert_close(sampled_softmax_loss(*layer, num_negatives=8), softmax_loss(*layer))
        torch.testing.assert_close(sampled_softmax_loss(*layer[:3], num_negatives=8), softmax_loss(*layer[:3]))

    def test_sampled_softmax_by_hand(self, layer, monkeypatch):
        states, targets, weight, bias = layer
        monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.tensor([3, 5]))
        scores = states @ weight.T + bias
        terms = []
        for score, target in zip(scores, targets.tolist(), strict=True):
            candidates = [target, *(item for item in (3, 5) if item != target)]
            terms.append(score[candidates].logsumexp(0) - score[target])
        torch.testing.assert_close(sampled_softmax_loss(*layer, num_negatives=2), torch.stack(terms).mean())

    def test_autocast_does_not_round_the_scores_of_the_sampled_softmax(self, layer):
        """Scores of ten and more, as cosines divided by a small temperature."""
        states, *rest = layer
        losses = []
        for low in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses.append(sampled_softmax_loss(5 * states, *rest, num_negatives=6))
        assert torch.equal(*losses)

    def test_binary_cross_entropy_of_two_items_has_one_possible_negative(self, layer):
        states, _, weight, bias = layer
        targets = torch.tensor([0, 1, 0, 1, 1, 0])
        scores = states @ weight[:2].T + bias[:2]
        labels = torch.nn.functional.one_hot(targets, 2).float()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        loss = binary_cross_entropy_loss(states, targets, weight[:2], bias[:2], num_negatives=3)
        torch.testing.assert_close(loss, expected)

    def test_negatives_are_uniform_over_the_other_items(self, generator):
        # With zero weights but one item's, the mean loss tells how often that item is drawn.
        targets, weight = torch.full((20_000,), 2), torch.zeros(5, 1)
        for item in (0, 1, 3, 4):
            bias = torch.zeros(5)
            bias[item] = 40.0
            loss = binary_cross_entropy_loss(torch.zeros(20_000, 1), targets, weight, bias)
            share = (2 * float(loss) - 2 * math.log(2)) / (40 - math.log(2))
            assert share == pytest.approx(1 / 4, abs=0.02)


class Fixed(Recommender):
    """Always prefers item 1, then 2, and so on."""

    def forward(self, history: Tensor) -> Tensor:
        return -torch.arange(self.num_items, dtype=torch.float32).expand(len(history), -1)


def evaluation_batches() -> DataLoader:
    samples = [
        {"history": torch.tensor([2]), "target": torch.tensor(3), "seen": torch.tensor([1, 2])},
        {"history": torch.tensor([4]), "target": torch.tensor(20), "seen": torch.tensor([4])},
    ]
    return DataLoader(samples, batch_size=2, collate_fn=collate)


class TestEvaluation:
    def test_a_test_reports_masked_and_unmasked(self):
        trainer = L.Trainer(**QUIET)
        (metrics,) = trainer.test(Fixed(30), evaluation_batches(), verbose=False)
        # The first target is third, and first once items 1 and 2 are out; the second is beyond the tenth.
        assert metrics["test/masked/ndcg@10"] == pytest.approx(0.5)
        assert metrics["test/unmasked/ndcg@10"] == pytest.approx(0.25)
        assert metrics["test/unmasked/recall@5"] == pytest.approx(0.5)

    @pytest.mark.parametrize(("mask_history", "expected"), [(True, 0.5), (False, 0.25)])
    def test_validation_masks_as_told(self, mask_history, expected):
        trainer = L.Trainer(**QUIET)
        (metrics,) = trainer.validate(Fixed(30, mask_history), evaluation_batches(), verbose=False)
        assert metrics["val/ndcg@10"] == pytest.approx(expected)

    def test_recall_and_ndcg_stay_apart_after_a_first_batch_without_hits(self):
        misses = [{"history": torch.tensor([1]), "target": torch.tensor(30), "seen": torch.tensor([1])}]
        batches = DataLoader([*misses, evaluation_batches().dataset[0]], batch_size=1, collate_fn=collate)
        (metrics,) = L.Trainer(**QUIET).test(Fixed(30), batches, verbose=False)
        assert metrics["test/unmasked/recall@10"] == pytest.approx(0.5)
        assert metrics["test/unmasked/ndcg@10"] == pytest.approx(0.25)

    def test_a_model_may_be_validated_before_it_is_fitted_and_fitted_on(self):
        data = SyntheticSequences(num_users=50, num_clusters=10, items_per_cluster=3)
        model, trainer = SASRec(data.num_items, hidden_size=8), L.Trainer(**{**QUIET, "max_epochs": 1})
        trainer.validate(model, data, verbose=False)
        trainer.fit(model, data)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data)
        assert trainer.callback_metrics["val/recall@10"] > 0.0

    def test_popularity_ranks_by_training_counts(self):
        data = small_data()
        (metrics,) = L.Trainer(**QUIET).test(Popularity(data.num_items), datamodule=data, verbose=False)
        counts = data.item_counts()
        sequences, hits = data.protocol.sequences, 0
        for user in range(len(sequences)):
            *seen, target = sequences[user].tolist()
            before = [item for item in range(1, data.num_items + 1) if counts[item - 1] >= counts[target - 1]]
            hits += len(set(before) - set(seen) - {target}) < 10
        assert metrics["test/masked/recall@10"] == pytest.approx(hits / len(sequences))

    def test_the_precision_of_the_weights_does_not_round_the_counts_of_popularity(self):
        """bfloat16 has eight bits: 1,000 and 1,001 would tie."""
        data = SyntheticSequences(num_users=1_200, num_clusters=5, items_per_cluster=2)
        model = Popularity(data.num_items)
        L.Trainer(**QUIET, precision="bf16-true").test(model, datamodule=data, verbose=False)
        assert data.item_counts().min() > 256
        assert model(torch.tensor([[1]]))[0].tolist() == data.item_counts().tolist()


def test_an_empty_history_is_refused_by_its_row():
    with pytest.raises(ValueError, match="row 1 of the batch has no item"):
        SASRec(num_items=9, hidden_size=8)(torch.tensor([[1, 2], [0, 0], [3, 0]]))
