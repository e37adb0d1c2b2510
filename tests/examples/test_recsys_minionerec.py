"""MiniOneRec: what its loss counts, its scores, checkpoints, LoRA, partition, what it learns."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from examples.recsys.__main__ import main
from examples.recsys.data import SyntheticSequences
from examples.recsys.models.minionerec import MiniOneRec, stack_examples
from examples.recsys.models.prompts import Example, Task, draw_example
from examples.recsys.semantic_ids.codes import SemanticIds
from tests.examples.configs import files
from tests.lightning_helpers import QUIET

NUM_ITEMS, LEVELS, CODES = 40, 3, 4
TASKS = get_args(Task)
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48, "dropout": 0.0}
HISTORY = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [8, 0, 0, 0, 0]])
TARGETS = torch.tensor([[0, 0, 0, 0, 7], [0, 0, 10, 0, 0], [2, 0, 0, 0, 0]])


class Shop(SyntheticSequences):
    """Users who take one thing after the other; all things have titles, every other one a description."""

    def __init__(self, num_users: int = 32, max_length: int = 10, **kwargs) -> None:
        ring = {"num_clusters": NUM_ITEMS, "items_per_cluster": 1, "num_strides": 1, "noise": 0.0}
        super().__init__(num_users, max_length=max_length, **ring, **kwargs)

    def item_titles(self) -> list[str]:
        return [f"Thing {item}" for item in range(1, NUM_ITEMS + 1)]

    def item_descriptions(self) -> list[str]:
        return [f"Rather {item}-ish." if item % 2 else "" for item in range(1, NUM_ITEMS + 1)]


def item_codes() -> Tensor:
    items = torch.arange(NUM_ITEMS)
    return torch.stack([items % CODES, items // CODES % CODES, items // CODES**2 % CODES], dim=1)


def written(item: int) -> str:
    """The codes of an item as text."""
    return "".join(f"<{letter}_{code}>" for letter, code in zip("abc", item_codes()[item - 1].tolist(), strict=True))


@pytest.fixture
def codes_file(tmp_path) -> str:
    SemanticIds(item_codes()).write(tmp_path / "codes.csv")
    return str(tmp_path / "codes.csv")


@pytest.fixture
def make(codes_file):
    """A tiny model that knows the titles of the shop."""

    def ready(**options) -> MiniOneRec:
        model = MiniOneRec(NUM_ITEMS, codes_file, **{**TINY, "num_beams": NUM_ITEMS, **options}).eval()
        model.log = lambda *_, **__: None
        trainer = L.Trainer(**QUIET)
        trainer.datamodule, model.trainer = Shop(), trainer
        model.setup("fit")
        return model

    return ready


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with a byte-pair tokenizer and a tiny Qwen2 in bfloat16 that has five spare rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the next item of the history is the thing"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    config = Qwen2Config(
        vocab_size=len(fast) + 5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, mean=1.0, std=0.1)
    model.bfloat16().save_pretrained(tmp_path / "qwen")
    fast.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


class TestPrompts:
    def test_the_text_is_encoded_as_a_whole_would_be(self, make, checkpoint):
        model = make(checkpoint=str(checkpoint))
        prompt, response = draw_example(["titles_to_codes"], model.writer, [3, 1], 4, model.item_tokens)
        text = "A shopper took items with these titles, the latest last:\nThing 3\nThing 1\nThe next item is:\n"
        assert model.tokenizer.decode([*prompt, *response]) == f"{text}{written(4)}<|end|>"
        assert response == [*model.tokenizer.encode(written(4), add_special_tokens=False), model.tokenizer.eos_token_id]

    @torch.no_grad()
    def test_a_cut_history_is_scored_by_what_remains(self, make):
        history = torch.arange(1, 31)[None]
        model = make(cutoff=101, tasks=["next_item"])
        scores = model(history)
        prompt = model.tokenizer.decode(model.writer.next_item(history[0].tolist(), model.item_tokens))
        assert written(30) in prompt
        kept = prompt.count("<a_")
        assert 1 <= kept < 30
        torch.testing.assert_close(scores, model(history[:, -kept:]))


class TestLoss:
    @pytest.mark.parametrize("task", ["next_item", "titles"])
    def test_is_the_mean_over_the_responses(self, make, task):
        model = make(tasks=[task])
        terms = []
        for history, target in zip(HISTORY, (7, 10, 2), strict=True):
            items = history[history > 0].tolist()
            prompt, response = model.writer.of_history(task, items, target, model.item_tokens)
            logits = model.lm(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
            terms += [-float(logits[len(prompt) + i - 1, token].detach()) for i, token in enumerate(response)]
        loss = model.training_step({"history": HISTORY, "targets": TARGETS}, 0)
        assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)

    def test_labels_are_those_of_the_responses(self):
        tokens, labels = stack_examples([Example([5, 6, 7], [8, 9]), Example([3], [4])])
        assert tokens.tolist() == [[5, 6, 7, 8], [3, 0, 0, 0]]
        assert labels.tolist() == [[-100, -100, 8, 9], [4, -100, -100, -100]]

    def test_processes_draw_tasks_and_items_of_their_own(self, make):
        """`seed_everything` leaves all of them with the same random state."""
        drawn = []
        for rank in (0, 1):
            torch.manual_seed(0)
            model = make(tasks=["item_text"])
            model.trainer = SimpleNamespace(global_rank=rank, training=True, datamodule=None)
            model.on_fit_start()
            drawn.append(torch.randint(1_000, (20,), generator=model.draws).tolist())
        assert drawn[0] != drawn[1]

    def test_of_several_targets_one_is_drawn_with_its_history(self, make):
        model = make(tasks=["next_item"])
        targets = torch.tensor([[1, 4, 1, 5, 7]])
        seen = set()
        model.writer.of_history = lambda task, history, target, items: seen.add((*history, target)) or Example([5], [6])
        for _ in range(60):
            model.training_step({"history": HISTORY[:1], "targets": targets}, 0)
        assert seen == {(3, 1, 4, 1, 5, 7)[:length] for length in range(2, 7)}


class TestScores:
    @torch.no_grad()
    def test_beams_for_all_items_equal_scoring_every_item(self, make):
        model = make(tasks=["next_item"])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        scores = model(HISTORY)
        for row, history in enumerate(HISTORY):
            prompt = model.writer.next_item(history[history > 0].tolist(), model.item_tokens)
            text = model.tokenizer.decode(prompt)
            for item in range(1, NUM_ITEMS + 1):
                tokens = model.tokenizer.encode(text + written(item), add_special_tokens=False)
                assert len(tokens) == len(prompt) + LEVELS
                follow = model.lm(torch.tensor([tokens])).logits[0].double().log_softmax(-1)[-LEVELS - 1 : -1]
                expected = float(follow[range(LEVELS), tokens[-LEVELS:]].sum())
                assert float(scores[row, item - 1]) == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_true_bfloat16_trains_and_validates(self, codes_file):
        model = MiniOneRec(NUM_ITEMS, codes_file, num_beams=4, **TINY)
        trainer = L.Trainer(
            max_epochs=1, limit_train_batches=1, precision="bf16-true", **{**QUIET, "limit_val_batches": 1}
        )
        trainer.fit(model, Shop(8))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            scores = model.eval()(HISTORY)
        assert scores.dtype == torch.float32
        assert scores.isfinite().sum(1).tolist() == [4] * 3


class TestCheckpoint:
    def test_keeps_its_weights_and_gets_new_tokens_like_the_others(self, make, checkpoint):
        pretrained = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        known = len(AutoTokenizer.from_pretrained(checkpoint))
        model = make(checkpoint=str(checkpoint))
        assert model.code_tokens.flatten().tolist() == list(range(known, known + LEVELS * CODES))
        for name, parameter in pretrained.named_parameters():
            ours, rows = model.lm.get_parameter(name), known if "embed" in name else None
            assert ours.dtype == torch.float32
            assert torch.equal(ours[:rows], parameter[:rows])
        new = model.lm.get_input_embeddings().weight[known:]
        assert len(new) == LEVELS * CODES
        assert float(new.detach().mean()) == pytest.approx(1.0, abs=0.05)
        assert float(new.detach().std()) == pytest.approx(0.1, abs=0.02)
        assert model.lm.get_output_embeddings().weight is model.lm.get_input_embeddings().weight

    def test_code_tokens_that_are_there_are_kept(self, make, checkpoint):
        first = make(checkpoint=str(checkpoint))
        for part in (first.lm, first.tokenizer):
            part.save_pretrained(checkpoint.with_name("tuned"))
        again = make(checkpoint=str(checkpoint.with_name("tuned")))
        assert torch.equal(again.code_tokens, first.code_tokens)
        assert len(again.tokenizer) == len(first.tokenizer)
        with torch.no_grad():
            torch.testing.assert_close(again(HISTORY), first(HISTORY))

    def test_a_missing_one_gets_an_error(self, codes_file, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            MiniOneRec(NUM_ITEMS, codes_file, checkpoint=str(tmp_path / "nowhere"))

    def test_a_tokenizer_alone_goes_with_a_new_model(self, make, checkpoint):
        model = make(tokenizer=str(checkpoint))
        assert model.lm.get_input_embeddings().num_embeddings == len(model.tokenizer) < 300
        assert model.lm.config.hidden_size == 32

    @pytest.mark.parametrize("lora", [None, {"r": 2}])
    def test_of_lightning_restores_model_and_settings(self, codes_file, checkpoint, tmp_path, lora):
        trainer = L.Trainer(max_steps=2, **QUIET)
        model = MiniOneRec(NUM_ITEMS, codes_file, checkpoint=str(checkpoint), lora=lora)
        trainer.fit(model, Shop())
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = MiniOneRec.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(HISTORY), model.eval()(HISTORY))
        assert loaded.tasks == list(TASKS)


class TestLora:
    @pytest.fixture(autouse=True)
    def peft(self):
        pytest.importorskip("peft")

    @pytest.mark.parametrize("tied", [True, False])
    def test_factors_and_codes_train_and_nothing_else(self, codes_file, tied):
        model = MiniOneRec(NUM_ITEMS, codes_file, lora={"r": 2, "lora_alpha": 4}, tied=tied, **TINY)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        L.Trainer(max_steps=3, **QUIET).fit(model, Shop())
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        factors = {
            f"lm.model.layers.{i}.{layer}.lora_{f}.default.weight" for i in (0, 1) for layer in layers for f in "AB"
        }
        tables = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
        codes = {f"lm.{table}.token_adapter.trainable_tokens_delta.default" for table in tables}
        assert changed == factors | codes
        partition = model.partition()
        assert {
            entry.name for entry in partition if entry.group == "matrix" and entry.parameter.requires_grad
        } == factors
        assert {partition[name].group for name in codes} == {"other"}
        assert {partition[name].parameter.shape for name in codes} == {(LEVELS * CODES, 32)}

    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_scores_are_those_of_the_whole_model(self, make, tied):
        model = make(tasks=["next_item"], lora={"r": 2}, tied=tied)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        scores = model(HISTORY)
        prompt = model.writer.next_item([9, 2, 6], model.item_tokens)
        tokens = [*prompt, *model.item_tokens.codes[10]]
        follow = model.lm(torch.tensor([tokens])).logits[0].double().log_softmax(-1)[-LEVELS - 1 : -1]
        expected = float(follow[range(LEVELS), tokens[-LEVELS:]].sum())
        assert float(scores[1, 9]) == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_options_are_those_of_peft(self, codes_file):
        model = MiniOneRec(NUM_ITEMS, codes_file, lora={"r": 3, "target_modules": ["q_proj"]}, **TINY)
        factors = [parameter.shape for name, parameter in model.named_parameters() if "lora_A" in name]
        assert factors == [(3, 32)] * 2
        with pytest.raises(ValueError, match=r"lora=\{'rank': 3\} is not what peft.LoraConfig takes"):
            MiniOneRec(NUM_ITEMS, codes_file, lora={"rank": 3}, **TINY)
        with pytest.raises(ValueError, match="query"):
            MiniOneRec(NUM_ITEMS, codes_file, lora={"target_modules": ["query"]}, **TINY)

    def test_without_peft_there_is_a_sentence(self, codes_file, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            MiniOneRec(NUM_ITEMS, codes_file, lora={"r": 2}, **TINY)


class TestPartition:
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_every_parameter(self, make, tied):
        entries = {entry.name.removeprefix("lm."): entry for entry in make(tied=tied).partition()}
        matrices = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
        matrices += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        hidden = {f"model.layers.{layer}.{name}" for layer in range(2) for name in matrices}
        assert {name for name, entry in entries.items() if entry.group == "matrix"} == hidden
        roles = {name: entry.role for name, entry in entries.items() if name not in hidden}
        assert roles.pop("model.embed_tokens.weight") == "embedding"
        assert roles.pop("lm_head.weight", None) == (None if tied else "head")
        assert set(roles.values()) == {"vector"}


class TestTraining:
    def test_gradient_checkpointing_changes_no_gradient(self, codes_file, make):
        plain, saving = make(tasks=["next_item"]), make(tasks=["next_item"], gradient_checkpointing=True)
        saving.load_state_dict(plain.state_dict())
        calls = []
        saving.lm.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
        for model in (plain, saving):
            model.train().training_step({"history": HISTORY, "targets": TARGETS}, 0).backward()
        for (name, first), second in zip(plain.named_parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad, msg=name)
        assert len(calls) == 2


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"tasks": ["next_item", "haiku"]},
                r"tasks must be one or more of next_item, .*, got \['next_item', 'haiku'\]",
            ),
            ({"tasks": []}, r"tasks must be one or more of next_item, .*, got \[\]"),
            ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ],
    )
    def test_bad_ones_get_a_sentence(self, codes_file, options, message):
        with pytest.raises(ValueError, match=message):
            MiniOneRec(NUM_ITEMS, codes_file, **{**TINY, **options})

    def test_codes_of_another_catalogue_get_a_sentence(self, codes_file):
        with pytest.raises(ValueError, match=r"has the codes of 40 items, 1 to 40\. The catalogue has 50"):
            MiniOneRec(50, codes_file, **TINY)

    def test_data_without_titles_get_a_sentence(self, codes_file):
        data = SyntheticSequences(9, num_clusters=NUM_ITEMS, items_per_cluster=1)
        model = MiniOneRec(NUM_ITEMS, codes_file, tasks=["next_item", "titles"], **TINY)
        message = r"The tasks titles need the titles of the items, and SyntheticSequences has none. Set tasks to \[next"
        with pytest.raises(ValueError, match=message):
            L.Trainer(max_steps=1, **QUIET).fit(model, data)
        L.Trainer(max_steps=1, **QUIET).fit(MiniOneRec(NUM_ITEMS, codes_file, tasks=["next_item"], **TINY), data)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["examples.recsys"])

    @pytest.mark.parametrize("name", ["minionerec", "minionerec_small"])
    def test_configuration_is_complete(self, name, checkpoint, capsys):
        SemanticIds(torch.randint(256, (3_686, 3))).write("codes.csv")
        options = [*files(f"model/{name}", "data/industrial", f"preset/{name}"), "--model.semantic_ids=codes.csv"]
        if name == "minionerec":
            options.append(f"--model.checkpoint={checkpoint}")
        cli = main(["partition", *options])
        assert "param groups:" in capsys.readouterr().out
        assert isinstance(cli.model, MiniOneRec)
        assert cli.model.tasks == list(TASKS)
        assert cli.model.partition()["lm.model.layers.0.mlp.up_proj.weight"].group == "matrix"
        assert cli.model.lm.config.model_type == ("qwen2" if name == "minionerec" else "qwen3")

    def test_tasks_and_lora_from_the_shell(self, codes_file):
        pytest.importorskip("peft")
        data = ["--data=SyntheticSequences", "--data.num_clusters=40", "--data.items_per_cluster=1"]
        model = [f"--model.semantic_ids={codes_file}", "--model.tasks=[next_item,fusion]", "--model.lora={r: 2}"]
        cli = main(["partition", "--model=examples.recsys.models.minionerec.MiniOneRec", *data, *model])
        assert cli.model.tasks == ["next_item", "fusion"]
        assert any("lora_A" in name for name, _ in cli.model.named_parameters())
