"""GRU4Rec against its equations, and the choice of the loss that it shares with Caser."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.models import GRU4Rec
from examples.recsys.models.losses import binary_cross_entropy_loss, sampled_softmax_loss, softmax_loss
from lightning_muon import Muon
from tests.examples.configs import on_synthetic
from tests.lightning_helpers import QUIET

SYNTHETIC = [*on_synthetic("gru4rec"), "--trainer.enable_progress_bar=false"]
HISTORIES = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6, 5, 3]), torch.tensor([8])]


def reference_states(model: GRU4Rec, items: list[int]) -> Tensor:
    """The state after each item, by the equations of the gated recurrent unit."""
    states = [model.embedding.weight[item] for item in items]
    for layer in range(model.gru.num_layers):
        maps = [getattr(model.gru, f"{kind}_l{layer}") for kind in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        (w_r, w_z, w_n), (b_r, b_z, b_n), (u_r, u_z, u_n), (c_r, c_z, c_n) = (each.chunk(3) for each in maps)
        h, outputs = torch.zeros_like(b_r), []
        for x in states:
            r = torch.sigmoid(w_r @ x + b_r + u_r @ h + c_r)
            z = torch.sigmoid(w_z @ x + b_z + u_z @ h + c_z)
            n = torch.tanh(w_n @ x + b_n + r * (u_n @ h + c_n))
            h = (1 - z) * n + z * h
            outputs.append(h)
        states = outputs
    return torch.stack(states)


def small_data(**kwargs) -> SyntheticSequences:
    data = SyntheticSequences(num_users=60, num_clusters=10, items_per_cluster=3, max_length=10, **kwargs)
    data.setup("fit")
    return data


class TestModel:
    def test_size_and_partition_at_industrial(self):
        """3,687 x 64 embedded items, two maps of 192 x 64 with bias, and 64 -> 3,686 with bias: 0.50 M in the study."""
        model = GRU4Rec(num_items=3_686)
        partition = model.partition()
        matrices = {entry.name: entry.layout.split for entry in partition if entry.group == "matrix"}
        size = sum(parameter.numel() for parameter in model.parameters())
        assert size == 235_968 + 24_576 + 384 + 235_904 + 3_686 == 500_518
        assert round(size / 1e6, 2) == 0.50
        assert matrices == {"gru.weight_ih_l0": (64, 64, 64), "gru.weight_hh_l0": (64, 64, 64)}
        assert [partition[name].role for name in ("embedding.weight", "head.weight")] == ["embedding", "head"]

    def test_items_are_drawn_small_and_padding_is_zero(self):
        weight = GRU4Rec(num_items=2_000).embedding.weight.detach()
        assert weight[1:].std() == pytest.approx(0.01, rel=0.02)
        assert not weight[0].any()

    @pytest.mark.parametrize("num_layers", [1, 2])
    def test_states_and_scores_are_those_of_the_equations(self, num_layers):
        model = GRU4Rec(30, hidden_size=6, num_layers=num_layers).double().eval()
        torch.nn.init.normal_(model.embedding.weight[1:].detach())
        expected = [reference_states(model, history.tolist()) for history in HISTORIES]
        batch = pad_sequence(HISTORIES, batch_first=True)
        torch.testing.assert_close(model.encode(batch), torch.cat(expected))
        scores = torch.stack([model.head.weight @ states[-1] + model.head.bias for states in expected])
        torch.testing.assert_close(model(batch), scores)

    def test_a_position_is_blind_to_later_items(self):
        model = GRU4Rec(30).eval()
        before = model.encode(torch.tensor([[3, 1, 4, 1, 5]]))
        after = model.encode(torch.tensor([[3, 1, 4, 9, 2]]))
        assert torch.equal(before[:3], after[:3])
        assert not torch.isclose(before[3:], after[3:]).all(1).any()

    def test_padding_and_the_rest_of_the_batch_do_not_matter(self):
        model = GRU4Rec(30).eval()
        batch = torch.nn.functional.pad(pad_sequence(HISTORIES, batch_first=True), (0, 4))
        torch.testing.assert_close(model(batch), torch.cat([model(history[None]) for history in HISTORIES]))

    def test_dropout_acts_on_items_layers_and_states_in_training_alone(self):
        model, batch = GRU4Rec(30, num_layers=2, dropout=0.5), pad_sequence(HISTORIES, batch_first=True)
        inputs = []
        model.gru.register_forward_pre_hook(lambda gru, arguments: inputs.append(arguments[0].data))
        for part in (model.encode(batch), inputs[0]):
            assert (part == 0).float().mean() == pytest.approx(0.5, abs=0.1)
        assert model.gru.dropout == 0.5
        assert not (model.eval().encode(batch) == 0).any()
        assert not (inputs[1] == 0).any()
        assert torch.equal(model.encode(batch), model.encode(batch))

    def test_mixed_precision_scores_in_float32(self):
        model = GRU4Rec(30).eval()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(pad_sequence(HISTORIES, batch_first=True))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, model(pad_sequence(HISTORIES, batch_first=True)), atol=0.02, rtol=0)


class TestLoss:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, binary_cross_entropy_loss),
            ({"num_negatives": 5}, partial(binary_cross_entropy_loss, num_negatives=5)),
            ({"loss": "sampled_softmax"}, partial(sampled_softmax_loss, num_negatives=1024)),
            ({"loss": "sampled_softmax", "num_negatives": 5}, partial(sampled_softmax_loss, num_negatives=5)),
            ({"loss": "softmax"}, softmax_loss),
        ],
    )
    def test_is_the_one_that_was_chosen(self, options, expected, generator):
        model = GRU4Rec(30, hidden_size=4, **options)
        states, targets = torch.randn(6, 4, generator=generator), torch.tensor([0, 3, 29, 7, 1, 0])
        torch.manual_seed(1)
        loss = model.loss(states, targets)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, expected(states, targets, model.head.weight, model.head.bias))

    @pytest.mark.parametrize(
        ("loss", "samples"), [("bce", "sequence"), ("sampled_softmax", "sequence"), ("softmax", "prefix")]
    )
    def test_trains_every_parameter_but_the_padding(self, loss, samples):
        data = small_data(samples=samples)
        model = GRU4Rec(data.num_items, loss=loss)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        L.Trainer(**{**QUIET, "max_steps": 3}).fit(model, data)
        assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
        assert not model.embedding.weight[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 1}, "num_items must be 2 or more, got 1"),
        ({"max_length": 0}, "max_length must be 1 or more, got 0"),
        ({"hidden_size": 0}, "hidden_size must be 1 or more, got 0"),
        ({"num_layers": 0}, "num_layers must be 1 or more, got 0"),
        ({"dropout": 1.5, "num_layers": 2}, "got 1.5"),
        ({"loss": "hinge"}, "Unknown loss 'hinge': choose one of bce, sampled_softmax, softmax"),
        ({"num_negatives": 0}, "num_negatives must be 1 or more, got 0"),
        ({"loss": "softmax", "num_negatives": 8}, "num_negatives=8 has no meaning with loss='softmax'"),
    ],
)
def test_bad_arguments_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        GRU4Rec(**{"num_items": 30, **options})


def test_a_long_history_gets_a_sentence():
    with pytest.raises(ValueError, match="The history has 11 items, but max_length=10: keep the latest ones"):
        GRU4Rec(30, max_length=10)(torch.ones(1, 11, dtype=torch.long))


def test_checkpoint_restores_model_and_settings(tmp_path):
    data = small_data()
    trainer = L.Trainer(**{**QUIET, "max_steps": 2})
    model = GRU4Rec(data.num_items, num_layers=2, loss="sampled_softmax", num_negatives=7)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = GRU4Rec.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    torch.testing.assert_close(loaded(HISTORIES[0][None]), model.eval()(HISTORIES[0][None]))
    assert loaded.loss_function.keywords == {"num_negatives": 7}


def test_learns_32_random_sequences_by_heart():
    data = SyntheticSequences(num_users=32, items_per_cluster=1, noise=1.0, min_length=8, max_sequence_length=8)
    data.setup("fit")
    optimizers = {
        "matrix_optimizer": partial(Muon, lr=1e-2, weight_decay=0.0),
        "other_optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }
    model = GRU4Rec(data.num_items, dropout=0.0, loss="softmax", **optimizers)
    L.Trainer(**{**QUIET, "max_steps": 300, "max_epochs": -1}).fit(model, data)
    batch = next(iter(data.train_dataloader()))
    assert (model.eval()(batch["history"]).argmax(1) + 1 == batch["targets"][:, -1]).float().mean() > 0.95


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["examples.recsys"])

    @pytest.mark.slow
    def test_beats_popularity_threefold_on_a_third_of_the_budget(self):
        cli = main(["fit", *SYNTHETIC, "--trainer.max_epochs=10"])
        assert cli.test_metrics["test/masked/ndcg@10"] > 3 * cli.baseline_metrics["test/masked/ndcg@10"]
