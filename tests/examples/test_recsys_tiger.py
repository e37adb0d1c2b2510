"""TIGER against plain T5 of transformers, one row and one beam at a time, without padding."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.decoding import beam_search
from examples.recsys.models import TIGER
from examples.recsys.models.generative import draw_targets
from examples.recsys.semantic_ids.codes import SemanticIds
from lightning_muon import Muon
from lightning_muon.schedules import Cosine
from tests.lightning_helpers import QUIET, weights

CODEBOOK_SIZE, NUM_ITEMS = 5, 30
CODES = [[item % 3, item // 3 % 5, item // 15 + 2 * (item % 2)] for item in range(NUM_ITEMS)]
"""Of items 1 to 30, three levels; no two are equal."""
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_size": 8, "feedforward_size": 24}

PAD, START, END = 0, 1, 2
HISTORIES = [[3, 17, 4], [8], [30, 1, 2, 9, 25, 14, 7]]


def code_file(folder: Path, codes: list[list[int]] = CODES) -> str:
    SemanticIds(torch.tensor(codes)).write(folder / "codes.csv")
    return str(folder / "codes.csv")


@pytest.fixture
def path(tmp_path) -> str:
    return code_file(tmp_path)


def tiger(path: str, spread: bool = True, **kwargs) -> TIGER:
    """A small model with weights so large that all positions and tokens matter."""
    model = TIGER(NUM_ITEMS, path, **{**SIZES, **kwargs})
    if spread:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def padded(rows: list[list[int]], width: int = 9) -> Tensor:
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def item_tokens(item: int) -> list[int]:
    return [3 + level * CODEBOOK_SIZE + code for level, code in enumerate(CODES[item - 1])]


def read_tokens(history: list[int], user_token: int | None = None) -> list[int]:
    """Expected input tokens of the encoder."""
    tokens = [token for item in history for token in item_tokens(item)]
    return [*([] if user_token is None else [user_token]), *tokens, END]


def plain_log_probs(model: TIGER, read: list[int], written: list[int]) -> Tensor:
    """(l + 1, tokens) of the next token after the start and after each generated one, by one row of the plain model."""
    with torch.no_grad():
        output = model.t5(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([[START, *written]]))
    return output.logits[0].log_softmax(-1)


def plain_item_scores(model: TIGER, read: list[int]) -> list[float]:
    scores = []
    for item in range(1, NUM_ITEMS + 1):
        tokens = item_tokens(item)
        scores.append(float(plain_log_probs(model, read, tokens[:-1])[range(len(tokens)), tokens].sum()))
    return scores


class TestModel:
    def test_size_and_partition_at_the_paper_sizes(self, tmp_path):
        """1,027 x 128 tokens, 24 matrices of the encoder and 40 of the decoder, 22 norms and two tables of 32 x 6."""
        model = TIGER(300, code_file(tmp_path, [*torch.randint(255, (299, 4)).tolist(), [255] * 4]))
        attention, feedforward = 4 * 384 * 128, 2 * 1024 * 128
        matrices = 4 * (attention + feedforward) + 4 * (2 * attention + feedforward)
        size = sum(parameter.numel() for parameter in model.parameters())
        assert size == 1_027 * 128 + matrices + 22 * 128 + 2 * 32 * 6 == 4_591_104

        entries = list(model.partition())
        hidden = [entry for entry in entries if entry.group == "matrix"]
        assert {entry.role for entry in hidden} == {"hidden"}
        kinds = Counter(entry.name.split(".")[-2] for entry in hidden)
        assert kinds == {"q": 12, "k": 12, "v": 12, "o": 12, "wi": 8, "wo": 8}
        assert sum(entry.parameter.numel() for entry in hidden) == matrices == 4_456_448
        others = Counter(entry.name.split(".")[-2] for entry in entries if entry.group == "other")
        assert others == {"shared": 1, "relative_attention_bias": 2, "layer_norm": 20, "final_layer_norm": 2}
        assert model.partition()["t5.shared.weight"].role == "embedding"
        assert {entry.role for entry in entries if "layer_norm" in entry.name} == {"vector"}
        assert model.t5.get_output_embeddings().weight is model.t5.shared.weight

    def test_user_tokens_come_on_top(self, path):
        tokens = [tiger(path, num_user_tokens=users).t5.shared.num_embeddings for users in (0, 7)]
        assert tokens == [3 + 3 * CODEBOOK_SIZE, 3 + 3 * CODEBOOK_SIZE + 7]

    def test_encoder_reads_codes_oldest_first_and_an_end_after_the_last(self, path):
        tokens = tiger(path).encoder_tokens({"history": padded(HISTORIES)})
        for row, history in zip(tokens.tolist(), HISTORIES, strict=True):
            expected = read_tokens(history)
            assert row == expected + [PAD] * (len(row) - len(expected))

    def test_the_token_of_the_user_comes_first(self, path):
        batch = {"history": padded(HISTORIES), "user": torch.tensor([0, 6, 11])}
        tokens = tiger(path, num_user_tokens=7).encoder_tokens(batch)
        for row, history, user in zip(tokens.tolist(), HISTORIES, (0, 6, 4), strict=True):
            expected = read_tokens(history, user_token=3 + 3 * CODEBOOK_SIZE + user)
            assert row == expected + [PAD] * (len(row) - len(expected))

    def test_written_codes_are_the_tokens_of_their_level(self, path):
        model = tiger(path)
        assert model.written(torch.tensor(CODES)).tolist() == [item_tokens(item + 1) for item in range(NUM_ITEMS)]
        assert model.written(torch.tensor([[[4, 1]]])).tolist() == [[[7, 9]]]

    def test_evaluation_has_no_dropout(self, path):
        model, history = tiger(path, dropout=0.5), padded(HISTORIES)
        assert torch.equal(model(history), model(history))
        batch = {"history": padded([[3, 17, 4]]), "targets": padded([[0, 0, 5]])}
        losses = [model.train().training_step(batch, 0) for _ in range(2)]
        assert not torch.equal(*losses)

    @pytest.mark.parametrize("name", [*SIZES, "num_beams"])
    def test_sizes_below_one_get_a_sentence(self, path, name):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            TIGER(NUM_ITEMS, path, **{**SIZES, name: 0})

    @pytest.mark.parametrize("options", [{"num_user_tokens": -1}, {"dropout": 1.5}, {"attention": "flash"}])
    def test_other_bad_arguments_get_a_sentence(self, path, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            TIGER(NUM_ITEMS, path, **{**SIZES, **options})

    def test_a_batch_without_users_gets_a_sentence(self, path):
        with pytest.raises(ValueError, match=r"user"):
            tiger(path, num_user_tokens=7)(padded(HISTORIES))

    def test_an_empty_history_is_refused_by_its_row(self, path):
        with pytest.raises(ValueError, match="row 1 of the batch has no item"):
            tiger(path)(padded([[3], [], [2]]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
class TestDecoding:
    @pytest.mark.parametrize("users", [0, 7])
    def test_beams_in_one_row_are_plain_rows(self, path, attention, users, generator):
        model = tiger(path, attention=attention, num_user_tokens=users).double()
        assert model.t5.config._attn_implementation == attention
        user_tokens = [3 + 3 * CODEBOOK_SIZE + user % 7 if users else None for user in (2, 9, 5)]
        scorer = model.next_code_scorer({"history": padded(HISTORIES), "user": torch.tensor([2, 9, 5])})
        for level in range(3):
            prefixes = torch.randint(CODEBOOK_SIZE, (3, 4, level), generator=generator)
            found = scorer(prefixes)
            assert found.shape == (3, 4, CODEBOOK_SIZE)
            for row, history in enumerate(HISTORIES):
                for beam, codes in enumerate(prefixes[row].tolist()):
                    written = [3 + at * CODEBOOK_SIZE + code for at, code in enumerate(codes)]
                    plain = plain_log_probs(model, read_tokens(history, user_tokens[row]), written)[-1]
                    expected = plain[3 + level * CODEBOOK_SIZE :][:CODEBOOK_SIZE]
                    torch.testing.assert_close(found[row, beam].double(), expected, atol=1e-5, rtol=1e-5)

    def test_enough_beams_score_every_item_as_plain_rows_do(self, path, attention):
        model = tiger(path, attention=attention, num_beams=NUM_ITEMS)
        scores = model(padded(HISTORIES))
        for row, history in zip(scores.tolist(), HISTORIES, strict=True):
            expected = plain_item_scores(model, read_tokens(history))
            assert row == pytest.approx(expected, abs=1e-4)
            assert torch.tensor(row).argsort().tolist() == torch.tensor(expected).argsort().tolist()

    @pytest.mark.parametrize("num_beams", [1, 4, 9])
    def test_agrees_with_the_search_of_transformers(self, path, attention, num_beams):
        model = tiger(path, attention=attention)
        tokens = {tuple(item_tokens(item)): item - 1 for item in range(1, NUM_ITEMS + 1)}

        def allowed(_: int, written: Tensor) -> list[int]:
            prefix = tuple(written.tolist()[1:])
            return sorted({item[len(prefix)] for item in tokens if item[: len(prefix)] == prefix})

        read = model.encoder_tokens({"history": padded(HISTORIES)})
        found = model.t5.generate(
            input_ids=read,
            attention_mask=(read != PAD).long(),
            prefix_allowed_tokens_fn=allowed,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=3,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        leaves, scores = beam_search(model.next_code_scorer({"history": padded(HISTORIES)}), model.tree, 3, num_beams)
        items = [model.tree.leaf_of_item.tolist().index(leaf) for leaf in leaves.flatten().tolist()]
        assert [tokens[tuple(each[1:])] for each in found.sequences.tolist()] == items
        if num_beams > 1:
            torch.testing.assert_close(found.sequences_scores, scores.flatten(), atol=1e-4, rtol=1e-4)

    def test_padding_and_the_rest_of_the_batch_do_not_matter(self, path, attention):
        model = tiger(path, attention=attention, num_beams=6)
        scores = model(padded(HISTORIES, width=12))
        for row, history in zip(scores, HISTORIES, strict=True):
            torch.testing.assert_close(row[None], model(torch.tensor([history])), atol=1e-4, rtol=1e-4)

    def test_steps_wait_for_nothing_from_the_device(self, path, attention):
        """Fake tensors have no values, so code that needs one raises, as the mask of the encoder does."""
        model, batch = tiger(path, attention=attention), {"history": padded(HISTORIES)}
        scorer = model.next_code_scorer(batch)
        with FakeTensorMode(allow_non_fake_inputs=True):
            leaves, _ = beam_search(scorer, model.tree, batch_size=3, num_beams=4)
            assert leaves.shape == (3, 4)
            with pytest.raises(DataDependentOutputException):
                leaves.max().item()


class TestTraining:
    @pytest.mark.parametrize("users", [0, 7])
    def test_loss_is_that_of_plain_rows(self, path, users):
        model = tiger(path, dropout=0.0, num_user_tokens=users).double().train()
        targets = [5, 30, 11]
        last = [[0] * (len(history) - 1) + [target] for history, target in zip(HISTORIES, targets, strict=True)]
        batch = {"history": padded(HISTORIES), "targets": padded(last), "user": torch.tensor([2, 9, 5])}
        terms = []
        for history, target, user in zip(HISTORIES, targets, (2, 2, 5), strict=True):
            tokens = item_tokens(target)
            read = read_tokens(history, 3 + 3 * CODEBOOK_SIZE + user if users else None)
            terms.append(-plain_log_probs(model, read, tokens[:-1])[range(3), tokens])
        torch.testing.assert_close(model.training_step(batch, 0), torch.stack(terms).mean())

    def test_sequences_train_on_one_of_their_targets_after_its_own_history(self, path):
        """The loss of a draw equals that of the prefix sample of one of the targets, and every target is drawn."""
        model = tiger(path, dropout=0.0).train()
        sequence = [8, 3, 17, 4, 22]
        prefixes = [(sequence[:end], sequence[end]) for end in range(1, 5)]
        losses = [
            model.training_step({"history": padded([history]), "targets": padded([[0] * (end) + [target]])}, 0)
            for end, (history, target) in enumerate(prefixes)
        ]
        batch = {"history": padded([sequence[:-1]]), "targets": padded([sequence[1:]])}
        drawn = torch.stack([model.training_step(batch, 0) for _ in range(60)])
        distances = (drawn[:, None] - torch.stack(losses)).abs()
        assert distances.min(1).values.max() < 1e-5
        assert distances.argmin(1).unique().tolist() == [0, 1, 2, 3]

    def test_targets_are_drawn_uniformly_with_the_history_before_them(self):
        history, targets = padded([[8, 3, 17, 4]] * 4_000), padded([[3, 17, 4, 22]] * 4_000)
        histories, drawn = draw_targets(history, targets)
        assert (histories.shape, drawn.shape) == (history.shape, (4_000,))
        sequence = [8, 3, 17, 4, 22]
        for row, target in zip(histories.tolist(), drawn.tolist(), strict=True):
            assert row == padded([sequence[: sequence.index(target)]]).flatten().tolist()
        counts = drawn.bincount(minlength=23)[[3, 17, 4, 22]]
        assert ((counts - 1_000).abs() < 140).all()  # five standard deviations

    def test_rows_draw_for_themselves_and_never_padding(self):
        history, targets = padded([[8, 3, 17], [6], [9, 2, 1]]), padded([[3, 0, 4], [7], [0, 0, 5]])
        seen = Counter()
        for _ in range(100):
            histories, drawn = draw_targets(history, targets)
            assert histories[1:].tolist() == padded([[6], [9, 2, 1]]).tolist()
            seen[tuple(drawn.tolist())] += 1
        assert set(seen) == {(3, 7, 5), (4, 7, 5)}

    @pytest.mark.parametrize("samples", ["sequence", "prefix"])
    def test_two_steps_train_every_parameter(self, path, samples):
        data = small_data(samples=samples)
        model = tiger(path, spread=False, num_user_tokens=7).train()
        before = weights(model)
        trainer = L.Trainer(**{**QUIET, "max_steps": 2})
        trainer.fit(model, data)
        assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
        first = 3 + 3 * CODEBOOK_SIZE
        moved = (model.t5.shared.weight - before["t5.shared.weight"])[first:].abs().sum(1) > 0
        assert moved.all()

    @pytest.mark.slow
    def test_learns_32_random_sequences_by_heart(self, tmp_path):
        data = SyntheticSequences(
            num_users=32, items_per_cluster=1, noise=1.0, min_length=6, max_sequence_length=6, samples="prefix"
        )
        data.setup("fit")
        codes = [[item // 16, item // 4 % 4, item % 4] for item in range(50)]
        optimizers = {
            "matrix_optimizer": partial(Muon, lr=2e-2, weight_decay=0.0),
            "other_optimizer": partial(torch.optim.AdamW, lr=2e-2),
            "schedule": Cosine(),
        }
        sizes = {**SIZES, "hidden_size": 32, "head_size": 16, "feedforward_size": 64, "num_layers": 1}
        model = TIGER(50, code_file(tmp_path, codes), dropout=0.0, num_beams=10, **sizes, **optimizers)
        L.Trainer(**{**QUIET, "max_steps": 250, "max_epochs": -1}).fit(model, data)
        data.protocol.samples = "sequence"
        (batch,) = data.train_dataloader()
        with torch.no_grad():
            best = model.eval()(batch["history"]).argmax(1) + 1
        assert (best == batch["targets"][:, -1]).float().mean() > 0.95


def small_data(**kwargs) -> SyntheticSequences:
    data = SyntheticSequences(num_users=40, num_clusters=10, items_per_cluster=3, max_length=8, **kwargs)
    data.setup("fit")
    return data


class TestTrainer:
    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
    def test_half_precision_evaluates_close_to_full(self, path, precision):
        data, results = small_data(), []
        for kind in ("32-true", precision):
            torch.manual_seed(5)
            model, trainer = tiger(path, spread=False, num_beams=NUM_ITEMS), L.Trainer(**QUIET, precision=kind)
            (metrics,) = trainer.test(model, datamodule=data, verbose=False)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                scores = model.score_batch(next(iter(data.test_dataloader())))
            assert scores.dtype == torch.float32
            assert len(scores[0].unique()) == NUM_ITEMS
            results.append((metrics, scores))
        torch.testing.assert_close(results[1][1], results[0][1], atol=0.15, rtol=0)
        assert results[1][0] == pytest.approx(results[0][0], abs=0.25)

    def test_checkpoint_restores_model_and_settings(self, path, tmp_path):
        model, data = tiger(path, spread=False, num_user_tokens=3, num_beams=8).train(), small_data()
        trainer = L.Trainer(**{**QUIET, "max_steps": 2})
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = TIGER.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
        assert loaded.num_beams == 8
        batch = next(iter(data.test_dataloader()))
        torch.testing.assert_close(loaded.score_batch(batch), model.eval().score_batch(batch))
        moved = SemanticIds(torch.tensor(CODES))
        moved.write(tmp_path / "elsewhere.csv")
        TIGER.load_from_checkpoint(tmp_path / "model.ckpt", semantic_ids=str(tmp_path / "elsewhere.csv"))
        SemanticIds(torch.tensor(CODES[::-1])).write(tmp_path / "other.csv")
        with pytest.raises(ValueError, match="semantic"):
            TIGER.load_from_checkpoint(tmp_path / "model.ckpt", semantic_ids=str(tmp_path / "other.csv"))

    def test_resumed_is_as_if_never_stopped(self, path, tmp_path):
        def fit(epochs: int, **kwargs) -> TIGER:
            torch.manual_seed(5)
            model = tiger(path, spread=False, dropout=0.0).train()
            trainer = L.Trainer(**{**QUIET, "max_steps": -1, "max_epochs": epochs})
            data = small_data(samples="prefix", batch_size=500)  # one batch, whose order does not matter
            trainer.fit(model, data, **kwargs)
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return model

        fit(2)
        resumed, whole = fit(4, ckpt_path=str(tmp_path / "2.ckpt")), fit(4)
        torch.testing.assert_close(weights(resumed), weights(whole), atol=1e-4, rtol=1e-3)

    def test_configuration_file_runs(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["examples.recsys"])
        sizes = "".join(f"    {name}: {size}\n" for name, size in SIZES.items())
        Path("tiger.yaml").write_text(
            "data:\n"
            "  class_path: SyntheticSequences\n"
            "  init_args: {num_users: 40, num_clusters: 10, items_per_cluster: 3, samples: prefix}\n"
            "model:\n"
            "  class_path: TIGER\n"
            "  init_args:\n"
            f"    semantic_ids: {path}\n{sizes}"
            "    matrix_optimizer: {class_path: lightning_muon.Muon, init_args: {lr: 1.0e-3}}\n"
        )
        cli = main(["fit", "--config=tiger.yaml", "--data.group_by_length=true", "--trainer.fast_dev_run=true"])
        assert cli.trainer.global_step == 1
        assert cli.model.num_items == NUM_ITEMS
        groups = cli.trainer.optimizers[0].param_groups
        assert sum(len(group["params"]) for group in groups if group["name"].startswith("matrix")) == 32
