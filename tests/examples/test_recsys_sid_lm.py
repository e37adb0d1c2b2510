"""The language model of semantic ids: scores and loss against plain computations, partition, what it learns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.models.causal import align_right, next_code_scorer, small_qwen3
from examples.recsys.models.sid_lm import SemanticIdLM
from examples.recsys.semantic_ids.codes import SemanticIds
from lightning_muon import Muon
from lightning_muon.schedules import Cosine
from tests.examples.configs import CONFIGS, on_synthetic
from tests.lightning_helpers import QUIET

HISTORY = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [8, 0, 0, 0, 0]])
TARGETS = torch.tensor([[1, 4, 1, 5, 7], [2, 6, 10, 0, 0], [2, 0, 0, 0, 0]])
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
LEVELS, CODES = 3, 4


def item_codes(num_items: int) -> Tensor:
    """Codes of as many items as there are, all distinct up to 64 of them."""
    items = torch.arange(num_items)
    return torch.stack([items % CODES, items // CODES % CODES, items // CODES**2 % CODES], dim=1)


@pytest.fixture
def codes_file(tmp_path) -> str:
    SemanticIds(item_codes(40)).write(tmp_path / "codes.csv")
    return str(tmp_path / "codes.csv")


@pytest.fixture
def make(codes_file):
    """A model of 40 items whose weights are far from their small beginnings."""

    def random_model(**options) -> SemanticIdLM:
        model = SemanticIdLM(40, codes_file, **{**TINY, "dropout": 0.0, "num_beams": 40, **options}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return random_model


def text(items: list[int]) -> list[int]:
    """What the model reads for a history, written from its definition."""
    tokens = [1]
    for item in items:
        tokens += [2 + level * CODES + code for level, code in enumerate(item_codes(40)[item - 1].tolist())]
    return tokens


def log_probabilities(model: SemanticIdLM, tokens: list[int]) -> Tensor:
    """(S, vocabulary) of the token after each, from one row without padding or cache."""
    return model.lm(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)


def small_models() -> dict[str, torch.nn.Module]:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    return {
        "qwen3": small_qwen3(40, **TINY, tied=True),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
    }


class TestScorer:
    PROMPTS = torch.tensor([[7, 3, 9, 5, 2, 8], [4, 6, 2, 0, 0, 0], [5, 0, 0, 0, 0, 0]])
    CODE_TOKENS = torch.arange(10, 40).view(3, 10)

    def scorer(self, model):
        return next_code_scorer(model.eval(), *align_right(self.PROMPTS, self.PROMPTS > 0), self.CODE_TOKENS)

    @pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
    @torch.no_grad()
    def test_equals_every_beam_in_a_row_of_its_own(self, name, generator):
        model = small_models()[name]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        scorer = self.scorer(model)
        # Depths out of order: nothing of one call may be left in the cache for the next.
        for depth in (0, 2, 1, 2):
            prefixes = torch.randint(10, (3, 5, depth), generator=generator)
            scores = scorer(prefixes)
            assert scores.shape == (3, 5, 10)
            for row, prompt in enumerate(self.PROMPTS):
                for beam, codes in enumerate(prefixes[row]):
                    tokens = [*prompt[prompt > 0], *(10 + 10 * level + code for level, code in enumerate(codes))]
                    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                    expected = logits.log_softmax(-1)[self.CODE_TOKENS[depth]]
                    torch.testing.assert_close(scores[row, beam], expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_the_prompt_is_read_once_whatever_the_beams(self, generator):
        model = small_models()["qwen3"]
        read = []
        model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0].shape))
        scorer = self.scorer(model)
        scorer(torch.randint(10, (3, 1, 0), generator=generator))
        scorer(torch.randint(10, (3, 7, 1), generator=generator))
        scorer(torch.randint(10, (3, 7, 2), generator=generator))
        assert [tuple(shape) for shape in read] == [(3, 6), (3, 7), (3, 14)]

    @torch.no_grad()
    def test_bfloat16_gives_float32_scores_near_the_exact_ones(self, generator):
        model = small_models()["qwen3"]
        prefixes = torch.randint(10, (3, 5, 2), generator=generator)
        exact = self.scorer(model)(prefixes)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = self.scorer(model)(prefixes)
        true = self.scorer(model.bfloat16())(prefixes)
        for scores in (mixed, true):
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, exact, rtol=0.0, atol=0.02)
            assert len(scores[0, 0].unique()) == 10


class TestScores:
    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_beams_for_all_items_equal_scoring_every_item(self, make, tied):
        model = make(tied=tied)
        scores = model(HISTORY)
        for row, history in enumerate(HISTORY):
            items = history[history > 0].tolist()
            for item in range(1, 41):
                tokens = text([*items, item])
                follow = log_probabilities(model, tokens[:-1])[-LEVELS:]
                expected = follow[range(LEVELS), tokens[-LEVELS:]].sum()
                assert float(scores[row, item - 1]) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)

    @torch.no_grad()
    def test_few_beams_find_the_best(self, make):
        few, all_items = make(num_beams=12), make()
        all_items.load_state_dict(few.state_dict())
        scores, exact = few(HISTORY), all_items(HISTORY)
        assert scores.isfinite().sum(1).tolist() == [12] * 3
        assert torch.equal(scores.argmax(1), exact.argmax(1))
        torch.testing.assert_close(scores[scores.isfinite()], exact[scores.isfinite()])

    def test_an_empty_history_is_refused_by_its_row(self, make):
        with pytest.raises(ValueError, match="row 1 of the batch has no item"):
            make()(torch.tensor([[1, 2], [0, 0]]))


class TestLoss:
    @pytest.mark.parametrize("last_only", [False, True])
    def test_is_the_mean_over_the_codes_of_the_targets(self, make, last_only):
        model = make()
        model.log = lambda *_, **__: None
        last = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]])
        targets = TARGETS * last if last_only else TARGETS
        terms = []
        for history, wanted in zip(HISTORY, targets, strict=True):
            for position, target in enumerate(wanted.tolist()):
                if target:
                    tokens = text([*history[: position + 1].tolist(), target])
                    follow = log_probabilities(model, tokens[:-1])[-LEVELS:]
                    terms += (-follow[range(LEVELS), tokens[-LEVELS:]]).tolist()
        assert len(terms) == LEVELS * (3 if last_only else 9)
        loss = model.training_step({"history": HISTORY, "targets": targets}, 0)
        assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-4)

    def test_dropout_is_of_training_only(self, make):
        model = make(dropout=0.5)
        model.log = lambda *_, **__: None
        batch = {"history": HISTORY, "targets": TARGETS}
        exact = float(model.training_step(batch, 0))
        assert float(model.training_step(batch, 0)) == exact
        assert float(model.train().training_step(batch, 0)) != pytest.approx(exact, rel=1e-3)

    @pytest.mark.parametrize(
        "place", ["embed_tokens", *(f"layers.{n}.{half}" for n in range(2) for half in ("self_attn.o_proj", "mlp"))]
    )
    def test_each_place_of_dropout_is_used(self, make, place, generator):
        """The embedding, and the two halves of each layer: at a rate of 1, all that they give in training is zero."""
        module = make(dropout=1.0).lm.base_model.get_submodule(place)
        inputs = torch.tensor([[1, 2, 3]]) if place == "embed_tokens" else torch.randn(1, 3, 32, generator=generator)
        assert module(inputs).all()
        assert not module.train()(inputs).any()

    def test_dropout_leaves_the_residuals_alone(self, make, generator):
        model = make(dropout=1.0).train().lm.base_model
        states = torch.randn(1, 3, 32, generator=generator)
        assert torch.equal(model(inputs_embeds=states).last_hidden_state, model.norm(states))


class TestPartition:
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_every_parameter(self, make, tied):
        entries = {entry.name.removeprefix("lm."): entry for entry in make(tied=tied).partition()}
        matrices = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
        matrices += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        hidden = {f"model.layers.{layer}.{name}" for layer in range(2) for name in matrices}
        assert {name for name, entry in entries.items() if entry.group == "matrix"} == hidden
        assert {entries[name].role for name in hidden} == {"hidden"}
        assert entries["model.embed_tokens.weight"].role == "embedding"
        assert ("lm_head.weight" in entries) == (not tied)
        assert tied or entries["lm_head.weight"].role == "head"
        rest = entries.keys() - hidden - {"model.embed_tokens.weight", "lm_head.weight"}
        assert {entries[name].role for name in rest} == {"vector"}

    def test_parameters_at_four_levels_of_256(self, tmp_path):
        SemanticIds(torch.randint(256, (300, 4)).index_fill(0, torch.tensor([0]), 255)).write(tmp_path / "codes.csv")
        model = SemanticIdLM(300, str(tmp_path / "codes.csv"))
        layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 512 + 2 * 128 + 2 * 32
        assert sum(parameter.numel() for parameter in model.parameters()) == 1_026 * 128 + 4 * layer + 128
        assert 1.1e6 < 1_026 * 128 + 4 * layer + 128 < 1.13e6


class TestTraining:
    @pytest.mark.parametrize("samples", ["sequence", "prefix"])
    def test_every_parameter_is_trained(self, codes_file, samples):
        data = SyntheticSequences(20, num_clusters=40, items_per_cluster=1, max_length=10, samples=samples)
        model = SemanticIdLM(40, codes_file, **TINY)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        L.Trainer(max_steps=3, **QUIET).fit(model, data)
        assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []

    def test_checkpoint_restores_model_and_settings(self, codes_file, tmp_path):
        data = SyntheticSequences(20, num_clusters=40, items_per_cluster=1, max_length=10)
        trainer = L.Trainer(max_steps=2, **QUIET)
        model = SemanticIdLM(40, codes_file, **TINY, tied=False)
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = SemanticIdLM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
        torch.testing.assert_close(loaded(HISTORY), model.eval()(HISTORY))
        SemanticIds(item_codes(40).flip(0)).write(codes_file)
        with pytest.raises(ValueError, match="trained on other semantic ids"):
            SemanticIdLM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)

    def test_true_bfloat16_trains_and_validates(self, codes_file):
        data = SyntheticSequences(20, num_clusters=40, items_per_cluster=1, max_length=10)
        model = SemanticIdLM(40, codes_file, **TINY)
        trainer = L.Trainer(max_epochs=1, precision="bf16-true", **{**QUIET, "limit_val_batches": 1})
        trainer.fit(model, data)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert 0 <= float(trainer.callback_metrics["val/ndcg@10"]) <= 1

    def test_learns_32_random_sequences_by_heart(self, tmp_path):
        """Of ten items at random, so that the last two of a history tell 30 of the 32 targets at best."""
        data = SyntheticSequences(
            num_users=32, num_clusters=10, items_per_cluster=1, noise=1.0, min_length=6, max_sequence_length=6
        )
        data.setup("fit")
        optimizers = {
            "matrix_optimizer": partial(Muon, lr=2e-2, weight_decay=0.0),
            "other_optimizer": partial(torch.optim.AdamW, lr=2e-2),
            "schedule": Cosine(),
        }
        SemanticIds(item_codes(10)).write(tmp_path / "few.csv")
        model = SemanticIdLM(10, str(tmp_path / "few.csv"), num_beams=10, **TINY, dropout=0.0, **optimizers)
        L.Trainer(max_steps=80, max_epochs=-1, **QUIET).fit(model, data)
        (batch,) = data.train_dataloader()
        with torch.no_grad():
            best = model.eval()(batch["history"]).argmax(1) + 1
        assert (best == batch["targets"][:, -1]).float().mean() > 0.95


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=32 into even widths"),
            ({"num_heads": 32, "num_kv_heads": 32}, "num_heads=32 does not divide hidden_size=32 into even widths"),
            ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
            ({"num_layers": 0}, "num_layers must be 1 or more, got 0"),
            ({"num_beams": 0}, "num_beams must be 1 or more, got 0"),
        ],
    )
    def test_bad_ones_get_a_sentence(self, codes_file, options, message):
        with pytest.raises(ValueError, match=message):
            SemanticIdLM(40, codes_file, **{**TINY, **options})

    def test_codes_of_another_catalogue_get_a_sentence(self, codes_file):
        with pytest.raises(ValueError, match=r"has the codes of 40 items, 1 to 40\. The catalogue has 41"):
            SemanticIdLM(41, codes_file)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["examples.recsys"])

    def test_fit_of_the_shipped_codes(self):
        quick = ["--trainer.max_epochs=2", "--data.num_users=100", "--trainer.enable_progress_bar=false"]
        codes = f"--model.semantic_ids={CONFIGS / 'semantic_ids/synthetic.csv'}"
        cli = main(["fit", *on_synthetic("sid_lm"), codes, *quick])
        assert cli.test_metrics["test/masked/recall@10"] >= 0
        assert list(Path("logs").rglob("best-*.ckpt"))
