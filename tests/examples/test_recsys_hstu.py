"""HSTU against its equations, its partition, what it learns, and its configurations."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.models import HSTU
from examples.recsys.models.losses import cosine_sampled_softmax_loss, sampled_softmax_loss
from lightning_muon import HybridOptimizer, Muon, ParameterRule
from tests.examples.configs import on_synthetic
from tests.lightning_helpers import QUIET

DAY = 86_400
HISTORY = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
TIMES = torch.tensor([[0, 1, 70, 70, 400 * DAY], [10 * DAY, 17 * DAY, 17 * DAY + 3, 0, 0]]) + 1_500_000_000 * (
    HISTORY > 0
)
UNEVEN = {"hidden_size": 6, "num_heads": 2, "attention_size": 4, "linear_size": 5}


def random_model(**options) -> HSTU:
    """An HSTU whose weights are far from their small beginnings, so that no part of it hides behind rounding."""
    model = HSTU(30, **{"max_length": 10, "dropout": 0.0, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def reference_states(model: HSTU, items: list[int], times: list[int] | None) -> Tensor:
    """States of one history, float64, a loop for every sum of the paper."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    heads, width = model.blocks[0].num_heads, weights["embedding.items.weight"].shape[1]
    states = [
        math.sqrt(width) * weights["embedding.items.weight"][item] + weights["embedding.positions.weight"][position]
        for position, item in enumerate(items)
    ]
    for number in range(len(model.blocks)):
        own = {name.removeprefix(f"blocks.{number}."): weight for name, weight in weights.items()}
        fused = [silu(standardise(state) @ own["uvqk"]) for state in states]
        values = own["output.weight"].shape[1] // heads
        queries = own["uvqk"].shape[1] // (2 * heads) - values
        after = []
        for i, state in enumerate(states):
            attended = torch.zeros(heads * values, dtype=torch.float64)
            for head in range(heads):
                for j in range(i + 1):
                    start = 2 * heads * values + head * queries
                    q = fused[i][start : start + queries]
                    k = fused[j][start + heads * queries : start + heads * queries + queries]
                    score = q @ k + own["relative.position_bias"][i - j]
                    if times is not None:
                        gap = max(times[i] - times[j], 1)
                        bucket = min(math.floor(math.log(gap) / 0.301), len(own["relative.time_bias"]) - 1)
                        score = score + own["relative.time_bias"][bucket]
                    start = heads * values + head * values
                    attended[head * values : (head + 1) * values] += (
                        silu(score) / model.blocks[0].max_length * fused[j][start : start + values]
                    )
            gated = fused[i][: heads * values] * standardise(attended)
            after.append(state + own["output.weight"] @ gated + own["output.bias"])
        states = after
    return torch.stack(states)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def standardise(x: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


class TestStates:
    @pytest.mark.parametrize("with_times", [False, True])
    @pytest.mark.parametrize("options", [{"hidden_size": 8}, UNEVEN, {"hidden_size": 8, "time_buckets": 20}])
    def test_equations(self, options, with_times):
        model = random_model(**options)
        expected = torch.cat(
            [
                reference_states(model, HISTORY[0].tolist(), TIMES[0].tolist() if with_times else None),
                reference_states(model, HISTORY[1, :3].tolist(), TIMES[1, :3].tolist() if with_times else None),
            ]
        )
        torch.testing.assert_close(model.double().encode(HISTORY, TIMES if with_times else None), expected)

    def test_scores_rank_by_the_cosine_with_the_item(self):
        model = random_model()
        state = model.encode(HISTORY)[4]
        items = model.embedding.items.weight[1:]
        cosines = torch.nn.functional.cosine_similarity(state, items)
        torch.testing.assert_close(model(HISTORY)[0], cosines * state.norm())

    @pytest.mark.parametrize("times", [None, TIMES[:1]])
    def test_a_position_is_blind_to_what_comes_later(self, times):
        model = random_model()
        changed, later = HISTORY[:1].clone(), None if times is None else times.clone()
        changed[0, 3:] = torch.tensor([7, 8])
        if later is not None:
            later[0, 3:] += DAY
        before, after = model.encode(HISTORY[:1], times), model.encode(changed, later)
        torch.testing.assert_close(before[:3], after[:3])
        assert not torch.allclose(before[3:], after[3:])

    @pytest.mark.parametrize("with_times", [False, True])
    def test_scores_do_not_depend_on_padding_or_the_rest_of_the_batch(self, with_times):
        model = random_model()
        batch = {"history": HISTORY} | ({"times": TIMES} if with_times else {})
        alone = [{key: value[1:, :3] for key, value in batch.items()}, {key: value[:1] for key, value in batch.items()}]
        expected = torch.cat([model.score_batch(one) for one in alone[::-1]])
        torch.testing.assert_close(model.score_batch(batch), expected, rtol=1e-4, atol=1e-4)

    def test_times_of_the_padding_do_not_matter(self):
        model = random_model()
        other = torch.where(HISTORY > 0, TIMES, 1_600_000_000)
        assert torch.equal(model.encode(HISTORY, TIMES), model.encode(HISTORY, other))

    def test_only_the_time_between_items_counts(self):
        model = random_model()
        torch.testing.assert_close(model.encode(HISTORY, TIMES), model.encode(HISTORY, TIMES + 7 * DAY))
        stretched = TIMES[:, :1] + 5 * (TIMES - TIMES[:, :1])
        assert not torch.allclose(model.encode(HISTORY, TIMES), model.encode(HISTORY, stretched), atol=1e-3)

    def test_without_times_or_buckets_there_is_no_time_bias(self):
        model = random_model()
        batch = {"history": HISTORY, "times": TIMES}
        without = random_model(time_buckets=None)
        without.load_state_dict({name: value for name, value in model.state_dict().items() if "time_bias" not in name})
        assert not torch.allclose(model.score_batch(batch), model(HISTORY), atol=1e-3)
        assert torch.equal(without.score_batch(batch), model(HISTORY))

    def test_long_times_share_the_last_bucket(self):
        model = random_model(time_buckets=4)
        weeks, years = torch.tensor([[0, 7 * DAY]]), torch.tensor([[0, 900 * DAY]])
        assert torch.equal(model.encode(HISTORY[:1, :2], weeks), model.encode(HISTORY[:1, :2], years))

    def test_the_order_of_the_history_matters(self):
        model = random_model()
        assert not torch.allclose(model(torch.tensor([[3, 1, 4]])), model(torch.tensor([[1, 3, 4]])), atol=1e-3)

    def test_mixed_precision_changes_little(self):
        model = HSTU(2_000)
        exact = model.eval().encode(HISTORY, TIMES)
        with torch.autocast("cpu", torch.bfloat16):
            states, scores = model.encode(HISTORY, TIMES), model(HISTORY)
        torch.testing.assert_close(states, exact, rtol=0.0, atol=0.02 * float(exact.abs().max()))
        assert scores.dtype == torch.float32
        assert len(scores[0].unique()) > 1_990


class TestPartition:
    @pytest.mark.parametrize(
        ("options", "shapes"),
        [({}, [(4, 64, 64)]), ({"num_heads": 2, "attention_size": 16}, [(1, 64, 64)] * 2 + [(1, 32, 64)] * 2)],
    )
    def test_uvqk_is_four_transposed_maps(self, options, shapes):
        model = HSTU(30, **options)
        for block in range(2):
            entry = model.partition()[f"blocks.{block}.uvqk"]
            assert entry.group == "matrix"
            assert entry.layout.transposed
            assert entry.layout.matrix_shapes(entry.parameter.shape) == shapes

    def test_each_map_has_an_update_of_its_own(self):
        """After one step from a gradient of unequal maps, each of the four moves by an orthogonal matrix."""
        model = HSTU(30, num_heads=2, attention_size=16)
        optimizer = HybridOptimizer.from_module(
            model, partial(Muon, lr=1.0, lr_scale="none", weight_decay=0.0), rules=model.parameter_rules
        )
        uvqk = model.blocks[0].uvqk
        before = uvqk.detach().clone()
        sizes = torch.tensor([1.0, 10.0, 100.0, 1e3]).repeat_interleave(torch.tensor([64, 64, 32, 32]))
        uvqk.grad = torch.randn(uvqk.shape) * sizes
        optimizer.step()
        for moved in (uvqk.detach() - before).split([64, 64, 32, 32], dim=1):
            values = torch.linalg.svdvals(moved)
            assert values.max() < 1.4
            assert values.median() > 0.6

    def test_the_rest_is_where_it_is_in_other_models(self):
        groups = {entry.name: entry.group for entry in HSTU(30).partition()}
        matrices = [f"blocks.{block}.{name}" for block in range(2) for name in ("uvqk", "output.weight")]
        assert [name for name, group in groups.items() if group == "matrix"] == matrices
        assert groups["blocks.0.relative.position_bias"] == groups["blocks.1.relative.time_bias"] == "other"

    def test_rules_of_the_user_apply_after_that_of_the_model(self):
        rules = [ParameterRule(pattern="*.uvqk", options={"lr": 1e-4}), ParameterRule(pattern="blocks.1.uvqk", split=2)]
        partition = HSTU(30, parameter_rules=rules).partition()
        assert partition["blocks.0.uvqk"].options == {"lr": 1e-4}
        assert partition["blocks.0.uvqk"].layout.split == (64,) * 4
        assert partition["blocks.1.uvqk"].layout.split == (128, 128)


class TestTraining:
    def test_every_parameter_is_trained_where_there_are_times(self):
        model = HSTU(30, max_length=10)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = model.configure_optimizers()
        targets = torch.where(HISTORY > 0, HISTORY.roll(-1, 1) + 1, 0)
        batch = {"history": HISTORY, "times": TIMES, "targets": targets}
        model.log = lambda *_, **__: None
        for _ in range(3):
            model.training_step(batch, 0).backward()
            optimizer.step()
        assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []

    def test_checkpoint_restores_model_and_settings(self, tmp_path):
        data = SyntheticSequences(num_users=60, max_length=10)
        trainer = L.Trainer(max_steps=2, **QUIET)
        model = HSTU(data.num_items, max_length=10, **UNEVEN)
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = HSTU.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
        torch.testing.assert_close(loaded(HISTORY), model.eval()(HISTORY))
        assert loaded.partition().layouts() == model.partition().layouts()

    def test_evaluation_uses_the_times(self):
        model = random_model()
        batch = {"history": HISTORY, "times": TIMES, "seen": HISTORY, "target": torch.tensor([7, 8])}
        loader = torch.utils.data.DataLoader([batch], batch_size=None)
        seen = []
        model.encode, encode = lambda history, times: seen.append(times) or encode(history, times), model.encode
        trainer = L.Trainer(**{**QUIET, "limit_val_batches": 1})
        trainer.validate(model, loader, verbose=False)
        trainer.test(model, loader, verbose=False)
        assert [torch.equal(times, TIMES) for times in seen] == [True, True]

    def test_overfits_a_few_sequences(self):
        ring = {"num_clusters": 40, "items_per_cluster": 1, "num_strides": 1, "noise": 0.0}
        data = SyntheticSequences(num_users=32, max_length=15, **ring)
        data.setup("fit")
        optimizers = {
            "matrix_optimizer": partial(Muon, lr=1e-2, weight_decay=0.0),
            "other_optimizer": partial(torch.optim.AdamW, lr=1e-2),
        }
        model = HSTU(data.num_items, max_length=15, dropout=0.0, **optimizers)
        L.Trainer(max_steps=60, max_epochs=-1, **QUIET).fit(model, data)
        batch = next(iter(data.train_dataloader()))
        last = (batch["history"] > 0).sum(1) - 1
        targets = batch["targets"][torch.arange(len(last)), last]
        assert (model.eval()(batch["history"]).argmax(1) + 1 == targets).float().mean() > 0.95

    def test_learns_from_the_times_alone(self):
        """Users with the same items, of which the time since the first tells the next one."""
        model = HSTU(6, max_length=2, hidden_size=16, num_negatives=64, temperature=0.1, dropout=0.0)
        history = torch.tensor([[1, 2]]).repeat(4, 1)
        gaps = torch.tensor([[0, 60], [0, DAY], [0, 30 * DAY], [0, 700 * DAY]])
        batch = {"history": history, "times": gaps, "targets": torch.tensor([[0, 3], [0, 4], [0, 5], [0, 6]])}
        model.log = lambda *_, **__: None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            optimizer.step()
        assert model.score_batch(batch).argmax(1).tolist() == [2, 3, 4, 5]


class TestLoss:
    def test_lengths_do_not_matter_and_temperature_divides(self, generator, monkeypatch):
        monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(high))
        states, weight = torch.randn(6, 4, generator=generator), torch.randn(8, 4, generator=generator)
        targets = torch.tensor([0, 3, 3, 7, 1, 0])
        terms = []
        for state, target in zip(states.double(), targets.tolist(), strict=True):
            cosines = [float(state @ item / (state.norm() * item.norm())) / 0.1 for item in weight.double()]
            terms.append(math.log(sum(map(math.exp, cosines))) - cosines[target])
        loss = cosine_sampled_softmax_loss(3 * states, targets, 5 * weight, num_negatives=8, temperature=0.1)
        assert float(loss) == pytest.approx(sum(terms) / 6)

    def test_of_unit_vectors_it_is_the_sampled_softmax(self, generator):
        unit = torch.nn.functional.normalize
        states, weight = unit(torch.randn(6, 4, generator=generator)), unit(torch.randn(8, 4, generator=generator))
        torch.manual_seed(0)
        expected = sampled_softmax_loss(states, torch.arange(6), weight, num_negatives=3)
        torch.manual_seed(0)
        loss = cosine_sampled_softmax_loss(states, torch.arange(6), weight, num_negatives=3, temperature=1.0)
        torch.testing.assert_close(loss, expected)

    def test_the_model_uses_it_as_told(self, monkeypatch):
        monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(*size))
        model, targets = random_model(num_negatives=3, temperature=0.2), torch.tensor([4, 0])
        states = model.encode(HISTORY)[[4, 7]]
        cosines = torch.nn.functional.cosine_similarity(states[:, None], model.embedding.items.weight[1:], dim=2)
        # The second target is among the negatives 0, 1 and 2 and counts once.
        logits = [cosines[0, [4, 0, 1, 2]] / 0.2, cosines[1, [0, 1, 2]] / 0.2]
        expected = sum(row.logsumexp(0) - row[0] for row in logits) / 2
        torch.testing.assert_close(model.loss(states, targets), expected)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=64: give attention_size and linear_size"),
            ({"num_heads": 3, "linear_size": 8}, "num_heads=3 does not divide hidden_size=64"),
            ({"num_heads": 0}, "num_heads must be 1 or more, got 0"),
            ({"num_blocks": 0}, "num_blocks must be 1 or more, got 0"),
            ({"attention_size": 0}, "attention_size must be 1 or more, got 0"),
            ({"time_buckets": 0}, "time_buckets must be 1 or more, got 0"),
            ({"num_negatives": 0}, "num_negatives must be 1 or more, got 0"),
            ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ],
    )
    def test_bad_ones_get_a_sentence(self, options, message):
        with pytest.raises(ValueError, match=message):
            HSTU(30, **options)

    def test_heads_need_not_divide_where_widths_are_given(self):
        assert HSTU(30, num_heads=3, attention_size=8, linear_size=8)(HISTORY).shape == (2, 30)

    def test_a_long_history_gets_a_sentence(self):
        with pytest.raises(ValueError, match="The history has 5 items, but max_length=4"):
            HSTU(30, max_length=4)(HISTORY)

    def test_times_of_another_shape_get_a_sentence(self):
        with pytest.raises(ValueError, match=r"times must have the shape of the history, \(2, 5\), got \(2, 4\)"):
            HSTU(30).encode(HISTORY, TIMES[:, :4])


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["examples.recsys"])

    def test_fit(self, capsys):
        quick = ["--trainer.max_epochs=1", "--data.num_users=200", "--trainer.enable_progress_bar=false"]
        cli = main(["fit", *on_synthetic("hstu"), *quick])
        assert cli.test_metrics["test/masked/ndcg@10"] > 0
        assert "HSTU" in capsys.readouterr().out
        assert list(Path("logs").rglob("best-*.ckpt"))
