"""Features of items: values, scale and refused input of each source."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.recsys.data import Interactions, SequenceDataModule, SyntheticSequences
from examples.recsys.semantic_ids.features import (
    AttributeFeatures,
    EmbeddingFile,
    ItemFeatures,
    SyntheticFeatures,
    standardize,
)
from examples.recsys.semantic_ids.text_features import TextFeatures, encode

SHARED = Path(__file__).parents[3] / "shared" / "data" / "amazon2014"


def attributes_file(path: Path, content: object) -> str:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return str(path)


class Rows(ItemFeatures):
    """The numbers 0, 1, 2, ... as one feature."""

    def __init__(self, count: int = 10, **kwargs) -> None:
        super().__init__(**kwargs)
        self.count = count

    def load_features(self) -> Tensor:
        return torch.arange(float(self.count))[:, None]


class TestItemFeatures:
    def test_they_are_centred_and_scaled_by_one_number(self):
        raw = torch.randn(50, 4) * torch.tensor([1.0, 2.0, 0.1, 5.0]) + 3
        scaled = standardize(raw)
        ratio = torch.pdist(scaled) / torch.pdist(raw)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
        assert scaled.mean(0).abs().max() < 1e-5
        assert float(scaled.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-5)

    def test_training_shuffles_and_validation_keeps_the_order(self):
        data = Rows(100, batch_size=8, eval_batch_size=16)
        shuffled = torch.cat(list(data.train_dataloader()))
        in_order = torch.cat(list(data.val_dataloader()))
        assert torch.equal(in_order, data.features())
        assert not torch.equal(shuffled, in_order)
        assert torch.equal(shuffled.sort(dim=0).values, in_order)
        assert [len(batch) for batch in data.train_dataloader()] == [8] * 12 + [4]
        assert (data.num_items, data.num_features) == (100, 1)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (torch.tensor([[1.0], [math.inf]]), "features of item 2 are not all finite"),
            (torch.full((5, 3), 0.1), "All 5 items have the same features"),
        ],
    )
    def test_useless_features_get_a_sentence(self, features, message):
        with pytest.raises(ValueError, match=message):
            standardize(features)

    def test_bad_sizes_get_a_sentence(self):
        with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
            Rows(batch_size=0)


class TestAttributeFeatures:
    CONTENT = {"1": [7, "red"], "3": [7], "4": ["red", "red", 9]}  # noqa: RUF012

    def test_rows_are_multi_hot_and_bare_items_are_zero(self, tmp_path):
        data = AttributeFeatures(attributes_file(tmp_path / "a.gz", self.CONTENT))
        with pytest.warns(UserWarning, match="1 of 4 items have no attributes"):
            assert data.load_features().tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1]]

    def test_the_catalogue_may_be_larger_than_the_file(self, tmp_path):
        data = AttributeFeatures(attributes_file(tmp_path / "a.gz", self.CONTENT), num_items=6)
        with pytest.warns(UserWarning, match="3 of 6 items have no attributes"):
            assert (data.num_items, data.num_features) == (6, 3)

    def test_all_components_keep_the_distances_and_fewer_the_largest(self, tmp_path):
        content = {str(item): sorted({item % 5, 5 + item % 3, 8 + item % 7}) for item in range(1, 41)}
        path = attributes_file(tmp_path / "a.gz", content)
        raw = AttributeFeatures(path).load_features()
        full = AttributeFeatures(path, num_components=15).load_features()
        torch.testing.assert_close(torch.cdist(full, full), torch.cdist(raw, raw), atol=1e-3, rtol=0)
        few = AttributeFeatures(path, num_components=2).load_features()
        values = torch.linalg.svdvals((raw - raw.mean(0)).double())
        torch.testing.assert_close(torch.linalg.svdvals(few.double()), values[:2], rtol=0.03, atol=0)
        assert torch.equal(few, AttributeFeatures(path, num_components=2).load_features())

    def test_beauty_has_the_rows_that_bound_its_collisions(self):
        if not SHARED.exists():
            pytest.skip("no ../shared/data")
        data = AttributeFeatures(str(SHARED / "Beauty.item2attributes.json.gz"))
        assert (data.num_items, data.num_features) == (12_101, 637)
        _, counts = data.load_features().unique(dim=0, return_counts=True)
        assert (len(counts), int(counts[counts > 1].sum()), int(counts.max())) == (3_116, 10_456, 201)

    @pytest.mark.parametrize(
        ("content", "arguments", "message"),
        [
            ({}, {}, r'must hold {"item": \[attribute, ...\]}, got \'{}\''),
            ([1, 2], {}, r"must hold .* got '\[1, 2\]'"),
            ({"B00": [1]}, {}, "has names of items, such as 'B00': give the data module with these names as source"),
            ({"1": 5}, {}, "expected a list of attributes for item '1', got 5"),
            ({"1": [[5]]}, {}, r"expected a list of attributes for item '1', got \[\[5\]\]"),
            ({"0": [5]}, {}, "has item 0, which is outside of the catalogue"),
            ({"1": [5], "9": [6]}, {"num_items": 8}, r"has item 9, which is outside of the catalogue 1..8"),
            (
                {"1": [5], "2": [6]},
                {"num_components": 3},
                "num_components=3 is too large for 2 items with 2 features",
            ),
        ],
    )
    def test_bad_files_get_a_sentence(self, tmp_path, content, arguments, message):
        data = AttributeFeatures(attributes_file(tmp_path / "a.gz", content), **arguments)
        with pytest.raises(ValueError, match=message):
            data.features()

    def test_a_file_need_not_be_gzipped(self, tmp_path):
        (tmp_path / "a.json").write_text('{"1": [2], "2": [3]}')
        assert AttributeFeatures(str(tmp_path / "a.json")).load_features().tolist() == [[1, 0], [0, 1]]

    def test_a_file_that_is_not_json_gets_a_sentence(self, tmp_path):
        (tmp_path / "a.json").write_text("1: 2")
        with pytest.raises(ValueError, match=r"a.json is not JSON"):
            AttributeFeatures(str(tmp_path / "a.json")).features()

    def test_a_missing_file_gets_a_sentence(self):
        with pytest.raises(FileNotFoundError, match=r"path='nowhere.gz' does not exist"):
            AttributeFeatures("nowhere.gz").features()


class TestAttributesByName:
    """Items have their names in the data module, which may be other numbers than 1, 2, ..."""

    @pytest.fixture(params=[("pen", "ink", "nib"), ("17", "4", "1"), (17, 4, 1)], ids=["words", "digits", "numbers"])
    def source(self, request, tmp_path) -> Interactions:
        names = request.param
        if isinstance(names[0], int):
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            path = tmp_path / "log.parquet"
            pq.write_table(pa.table({"user": [1, 1, 1], "item": names, "timestamp": [1, 2, 3]}), path)
        else:
            path = tmp_path / "log.csv"
            rows = [f"a,{name},{time}" for time, name in enumerate(names)]
            path.write_text("\n".join(["user,item,timestamp", *rows]))
        return Interactions(str(path))

    def test_rows_are_in_the_order_of_the_data_module(self, source, tmp_path):
        first, second, third = source.item_names()
        path = attributes_file(tmp_path / "a.gz", {third: ["red"], first: ["blue", "red"], second: []})
        data = AttributeFeatures(path, source=source)
        with pytest.warns(UserWarning, match="1 of 3 items have no attributes"):
            assert data.load_features().tolist() == [[1, 1], [0, 0], [0, 1]]
        assert (data.num_items, data.num_features) == (3, 2)

    def test_items_that_one_of_both_lacks_are_counted(self, source, tmp_path, recwarn):
        first, second, _ = source.item_names()
        path = attributes_file(tmp_path / "a.gz", {"other": ["green"], first: ["blue"], second: ["red"]})
        assert AttributeFeatures(path, source=source).load_features().tolist() == [[1, 0], [0, 1], [0, 0]]
        messages = [str(warning.message) for warning in recwarn]
        assert any(
            "1 of 3 items in" in message and "are not among those of Interactions" in message for message in messages
        )
        assert any("1 of 3 items have no attributes" in message for message in messages)

    def test_a_file_of_other_items_gets_a_sentence(self, source, tmp_path):
        path = attributes_file(tmp_path / "a.gz", {"other": ["green"]})
        with pytest.raises(ValueError, match=r"none of the items of Interactions: it has names such as 'other'"):
            AttributeFeatures(path, source=source).features()

    def test_a_size_beside_the_data_module_is_refused(self, source):
        with pytest.raises(ValueError, match=r"num_items=3 is given beside source, which knows its size: leave it out"):
            AttributeFeatures("a.gz", num_items=3, source=source)


class TestEmbeddingFile:
    @pytest.mark.parametrize("kind", ["npy", "pt"])
    def test_both_kinds_of_file_hold_the_rows(self, tmp_path, kind):
        matrix = torch.randn(6, 4, dtype=torch.float64)
        path = tmp_path / f"items.{kind}"
        np.save(path, matrix.numpy()) if kind == "npy" else torch.save(matrix, path)
        loaded = EmbeddingFile(str(path)).load_features()
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, matrix.float())

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(4), r"must hold a matrix \(items, width\) of real numbers, got \(4,\)"),
            ({"weight": torch.zeros(2, 2)}, "got dict"),
            (torch.zeros(2, 2, dtype=torch.complex64), "of real numbers"),
        ],
    )
    def test_other_contents_get_a_sentence(self, tmp_path, value, message):
        torch.save(value, tmp_path / "items.pt")
        with pytest.raises(ValueError, match=message):
            EmbeddingFile(str(tmp_path / "items.pt")).features()

    def test_objects_are_not_unpickled(self, tmp_path):
        np.save(tmp_path / "items.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        torch.save(Path("code"), tmp_path / "items.pt")
        for kind in ("npy", "pt"):
            with pytest.raises(ValueError, match=f"items.{kind} does not hold a plain array or tensor"):
                EmbeddingFile(str(tmp_path / f"items.{kind}")).features()

    def test_other_names_get_a_sentence(self):
        with pytest.raises(ValueError, match=r"path='items.csv' must end in .npy or .pt"):
            EmbeddingFile("items.csv")


class TestSyntheticFeatures:
    def test_items_are_those_of_the_sequences(self):
        features, sequences = SyntheticFeatures(7, 4), SyntheticSequences(num_clusters=7, items_per_cluster=4)
        raw = features.load_features()
        assert features.num_items == sequences.num_items == 28
        for item in range(1, 29):
            cluster, rank = (item - 1) % 7, (item - 1) // 7
            place = [math.cos(2 * math.pi * cluster / 7), math.sin(2 * math.pi * cluster / 7)]
            expected = torch.tensor([*place, 0.5 * (rank / 3 - 0.5)])
            torch.testing.assert_close(raw[item - 1], expected, atol=1e-6, rtol=0)

    def test_bad_weights_get_a_sentence(self):
        with pytest.raises(ValueError, match="rank_weight must be above 0, got 0"):
            SyntheticFeatures(rank_weight=0)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "blue", "steel", "screw", "soap"]


class Named(SequenceDataModule):
    """Four items with titles, two of them with a description."""

    num_items = 4
    prepared = 0

    def load_sequences(self):
        raise NotImplementedError

    def prepare_data(self) -> None:
        self.prepared += 1

    def item_titles(self) -> list[str]:
        return ["blue soap", "steel screw", "screw", "soap"]

    def item_descriptions(self) -> list[str]:
        return ["", "blue blue steel", "", "soap"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A random BERT of width 16 with a vocabulary of four words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


class TestTextFeatures:
    def test_embeddings_are_the_normalised_mean_of_the_tokens(self, encoder):
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
        model = transformers.AutoModel.from_pretrained(encoder).eval()
        texts = ["blue soap", "steel", "screw soap blue steel"]
        embeddings = encode(texts, encoder, batch_size=2)
        for text, embedding in zip(texts, embeddings, strict=True):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = states.mean(0)
            torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("saved", ["T5Model", "T5EncoderModel"])
    def test_of_a_model_with_a_decoder_the_encoder_is_run(self, saved, tmp_path):
        transformers = pytest.importorskip("transformers")
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁blue", -1.0), ("▁steel", -1.0), ("▁soap", -1.0)]
        transformers.T5TokenizerFast(vocab=words, extra_ids=0).save_pretrained(tmp_path)
        torch.manual_seed(0)
        config = transformers.T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        getattr(transformers, saved)(config).save_pretrained(tmp_path)
        assert TextFeatures(Named(), str(tmp_path)).num_features == 16
        tokens = {"blue soap": [3, 5, 1], "steel": [4, 1]}
        model = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
        for embedding, ids in zip(encode([*tokens], str(tmp_path)), tokens.values(), strict=True):
            with torch.no_grad():
                mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
            torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=1e-4)

    def test_long_texts_are_cut(self, encoder):
        # Two of the four tokens mark start and end.
        cut, short = encode(["blue soap steel screw", "blue soap"], encoder, max_tokens=4)
        torch.testing.assert_close(cut, short)

    def test_titles_and_descriptions_are_encoded_once(self, encoder, tmp_path, monkeypatch):
        data = TextFeatures(Named(), encoder, cache_dir=str(tmp_path))
        assert (data.num_items, data.num_features) == (4, 16)
        with pytest.raises(RuntimeError, match=r"not encoded yet: call prepare_data\(\) first"):
            data.features()
        data.prepare_data()
        expected = encode(["blue soap", "steel screw blue blue steel", "screw", "soap soap"], encoder)
        torch.testing.assert_close(data.load_features(), expected)
        assert data.source.prepared == 1
        again = TextFeatures(Named(), encoder, cache_dir=str(tmp_path))
        monkeypatch.setattr("examples.recsys.semantic_ids.text_features.encode", None)
        again.prepare_data()
        assert torch.equal(again.features(), data.features())

    def test_other_texts_or_settings_are_another_file(self, encoder, tmp_path):
        class Renamed(Named):
            def item_titles(self) -> list[str]:
                return ["soap", "soap", "soap", "screw"]

        paths = {
            TextFeatures(Named(), encoder, cache_dir=str(tmp_path)).path,
            TextFeatures(Renamed(), encoder, cache_dir=str(tmp_path)).path,
            TextFeatures(Named(), encoder, max_tokens=7, cache_dir=str(tmp_path)).path,
        }
        assert len(paths) == 3

    def test_a_source_without_titles_gets_a_sentence(self, encoder, tmp_path):
        """Ids are not titles, although they are the names in the data module."""
        (tmp_path / "log.csv").write_text("user,item,timestamp\na,B001,1\na,B002,2\na,B003,3\n")
        for source in (SyntheticSequences(num_users=3), Interactions(str(tmp_path / "log.csv"))):
            data = TextFeatures(source, encoder, cache_dir=str(tmp_path))
            name = type(source).__name__
            with pytest.raises(ValueError, match=f"{name} has no titles of its items: use AttributeFeatures"):
                data.prepare_data()
