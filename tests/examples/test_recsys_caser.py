"""Caser against its equations, window by window."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.models import Caser
from examples.recsys.models.caser import latest_items
from lightning_muon import Muon
from tests.examples.configs import on_synthetic
from tests.lightning_helpers import QUIET

SYNTHETIC = [*on_synthetic("caser"), "--trainer.enable_progress_bar=false"]
HISTORIES = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]), torch.tensor([8])]


def reference_state(model: Caser, items: list[int]) -> Tensor:
    """The state of one window, number by number."""
    d = model.embedding.embedding_dim
    image = torch.zeros(model.window, d, dtype=torch.float64)
    for row, item in enumerate(items):
        image[row] = model.embedding.weight[item]
    state = []
    for filters in model.horizontal:
        for weight, bias in zip(filters.weight, filters.bias, strict=True):
            height = weight.shape[1]
            tops = range(model.window - height + 1)
            answers = [(weight.T * image[top : top + height]).sum() + bias for top in tops]
            state.append(max(answers).clamp(min=0))
    for column in range(d):
        for weight, bias in zip(model.vertical.weight, model.vertical.bias, strict=True):
            state.append(((weight * image[:, column]).sum() + bias).clamp(min=0))
    return torch.stack(state)


def wide_awake(model: Caser) -> Caser:
    """Without dropout, and with items that differ by more than the bias."""
    torch.nn.init.normal_(model.embedding.weight[1:].detach())
    return model.eval()


class TestModel:
    def test_size_and_partition_at_industrial(self):
        """3,687 x 64 embedded items, 16 filters of 2, 3 and 4 x 64, one of 10 x 1, and 112 -> 3,686: 0.66 M."""
        model = Caser(num_items=3_686)
        partition = model.partition()
        matrices = {
            entry.name: entry.layout.describe(entry.parameter.shape) for entry in partition if entry.group == "matrix"
        }
        size = sum(parameter.numel() for parameter in model.parameters())
        assert size == 235_968 + (2_064 + 3_088 + 4_112) + 11 + 412_832 + 3_686 == 661_761
        assert round(size / 1e6, 2) == 0.66
        assert matrices == {
            "horizontal.0.weight": "16 x 128",
            "horizontal.1.weight": "16 x 192",
            "horizontal.2.weight": "16 x 256",
        }
        assert [partition[name].role for name in ("embedding.weight", "head.weight")] == ["embedding", "head"]

    def test_several_vertical_filters_are_a_matrix(self):
        entry = Caser(num_items=30, vertical_filters=4).partition()["vertical.weight"]
        assert (entry.group, entry.layout.describe(entry.parameter.shape)) == ("matrix", "4 x 10")

    def test_is_drawn_as_in_the_study(self):
        model = Caser(num_items=2_000, horizontal_filters=400)
        assert model.embedding.weight[1:].detach().std() == pytest.approx(0.01, rel=0.02)
        assert not model.embedding.weight[0].any()
        for filters, height in zip(model.horizontal, (2, 3, 4), strict=True):
            image = torch.nn.init.xavier_normal_(torch.empty(400, 1, height, 64))
            assert filters.weight.detach().std() == pytest.approx(float(image.std()), rel=0.02)
            assert (filters.bias == 0.1).all()

    @pytest.mark.parametrize(
        "options", [{}, {"window": 4, "heights": [1, 4], "horizontal_filters": 3, "vertical_filters": 2}]
    )
    def test_states_and_scores_are_those_of_the_equations(self, options):
        model = wide_awake(Caser(30, max_length=20, hidden_size=6, **options).double())
        windows = [
            history[max(0, end - model.window) : end].tolist()
            for history in HISTORIES
            for end in range(1, len(history) + 1)
        ]
        expected = torch.stack([reference_state(model, window) for window in windows])
        batch = pad_sequence(HISTORIES, batch_first=True)
        torch.testing.assert_close(model.encode(batch), expected)
        last = torch.tensor([len(history) for history in HISTORIES]).cumsum(0) - 1
        scores = expected[last] @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(batch), scores)

    def test_windows_keep_the_latest_items(self):
        history = torch.tensor([[3, 1, 4, 1], [5, 0, 0, 0]])
        assert latest_items(history, 3).tolist() == [[3, 0, 0], [3, 1, 0], [3, 1, 4], [1, 4, 1], [5, 0, 0]]

    def test_a_position_is_blind_to_later_items(self):
        model = wide_awake(Caser(30))
        before = model.encode(torch.tensor([[3, 1, 4, 1, 5]]))
        after = model.encode(torch.tensor([[3, 1, 4, 9, 2]]))
        assert torch.equal(before[:3], after[:3])
        assert not torch.isclose(before[3:], after[3:]).all(1).any()

    def test_items_before_the_window_do_not_matter(self):
        model = wide_awake(Caser(30, window=4))
        assert torch.equal(model(torch.tensor([[3, 1, 4, 1, 5]])), model(torch.tensor([[9, 1, 4, 1, 5]])))
        assert not torch.allclose(model(torch.tensor([[3, 1, 4, 1, 5]])), model(torch.tensor([[3, 9, 4, 1, 5]])))

    def test_padding_and_the_rest_of_the_batch_do_not_matter(self):
        model = wide_awake(Caser(30, max_length=20))
        batch = torch.nn.functional.pad(pad_sequence(HISTORIES, batch_first=True), (0, 4))
        torch.testing.assert_close(model(batch), torch.cat([model(history[None]) for history in HISTORIES]))

    def test_dropout_acts_in_training_alone(self):
        model, batch = Caser(30, max_length=20, dropout=0.5), pad_sequence(HISTORIES, batch_first=True)
        assert (model.encode(batch) == 0).float().mean() == pytest.approx(0.5, abs=0.1)
        assert torch.equal(model.eval().encode(batch), model.encode(batch))

    def test_mixed_precision_scores_in_float32(self):
        model, batch = wide_awake(Caser(30, max_length=20)), pad_sequence(HISTORIES, batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(batch)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, model(batch), atol=0.05, rtol=0)


@pytest.mark.parametrize("samples", ["sequence", "prefix"])
def test_trains_every_parameter_but_the_padding(samples):
    data = SyntheticSequences(num_users=60, num_clusters=10, items_per_cluster=3, max_length=12, samples=samples)
    data.setup("fit")
    model = Caser(data.num_items, max_length=12, loss="sampled_softmax", num_negatives=8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    L.Trainer(**{**QUIET, "max_steps": 3}).fit(model, data)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    assert not model.embedding.weight[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 1}, "num_items must be 2 or more, got 1"),
        ({"hidden_size": 0}, "hidden_size must be 1 or more, got 0"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"horizontal_filters": 0}, "horizontal_filters must be 1 or more, got 0"),
        ({"vertical_filters": -1}, "vertical_filters must be 1 or more, got -1"),
        ({"heights": []}, r"heights must be one or more sizes from 1 to window=10, got \[\]"),
        ({"heights": [0, 2]}, r"from 1 to window=10, got \[0, 2\]"),
        ({"window": 3}, r"from 1 to window=3, got \[2, 3, 4\]"),
        ({"dropout": 1.5}, "got 1.5"),
        ({"loss": "hinge"}, "Unknown loss 'hinge'"),
    ],
)
def test_bad_arguments_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Caser(**{"num_items": 30, **options})


def test_a_long_history_gets_a_sentence():
    with pytest.raises(ValueError, match="The history has 11 items, but max_length=10: keep the latest ones"):
        Caser(30)(torch.ones(1, 11, dtype=torch.long))


def test_checkpoint_restores_model_and_settings(tmp_path):
    data = SyntheticSequences(num_users=60, num_clusters=10, items_per_cluster=3, max_length=10)
    trainer = L.Trainer(**{**QUIET, "max_steps": 2})
    model = Caser(data.num_items, heights=(2, 5), window=6)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Caser.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    torch.testing.assert_close(loaded(HISTORIES[0][None]), model.eval()(HISTORIES[0][None]))


def test_learns_32_random_sequences_by_heart():
    data = SyntheticSequences(num_users=32, items_per_cluster=1, noise=1.0, min_length=8, max_sequence_length=8)
    data.setup("fit")
    optimizers = {
        "matrix_optimizer": partial(Muon, lr=1e-2, weight_decay=0.0),
        "other_optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }
    model = Caser(data.num_items, max_length=50, dropout=0.0, **optimizers)
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
