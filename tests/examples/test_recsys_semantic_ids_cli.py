"""The command line that makes semantic ids."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.recsys.semantic_ids.__main__ import CodesFile, _warn_of_poor_codes, main, shared_rows
from examples.recsys.semantic_ids.codes import SemanticIds
from examples.recsys.semantic_ids.features import ItemFeatures, SyntheticFeatures
from examples.recsys.semantic_ids.kmeans import residual_kmeans
from examples.recsys.semantic_ids.quality import collisions_and_error, complaint, kmeans_explained
from examples.recsys.semantic_ids.quantization import Quantization
from examples.recsys.semantic_ids.rqvae import RQVAE
from tests.distributed import processes
from tests.examples.configs import CONFIGS, files

ROOT = Path(__file__).parents[2]
SYNTHETIC = [*files("semantic_ids/rqvae", "semantic_ids/features/synthetic"), "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys.semantic_ids"])


@pytest.fixture(scope="module")
def parser():
    """One for all files: to make it takes longer than to parse a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["examples.recsys.semantic_ids"])
        return main([*SYNTHETIC, "--trainer.logger=false"], run=False).parser


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_fit_writes_the_codes_of_its_best_checkpoint_and_reports(precision, capsys, monkeypatch):
    validated = []
    losses = RQVAE.losses
    monkeypatch.setattr(RQVAE, "losses", lambda *args: [validated.append(losses(*args)), validated[-1]][1])
    options = ["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=1", f"--trainer.precision={precision}"]
    cli = main(["fit", *SYNTHETIC, *options])
    printed = capsys.readouterr().out
    assert "share of the codes in use, level 4" in printed
    assert f"{int((cli.ids.codes[:, 3] > 0).sum())} have a digit above 0" in " ".join(printed.split())
    assert torch.equal(cli.ids.codes[:, :3], validated[-1].codes)
    assert "encoder.*.weight" in printed
    written = SemanticIds.read("semantic_ids/synthetic.csv", num_items=500)
    (checkpoint,) = Path("logs").rglob("best-*.ckpt")
    best = RQVAE.load_from_checkpoint(checkpoint, weights_only=True).to(cli.model.dtype)
    assert torch.equal(written.codes, cli.ids.codes)
    assert torch.equal(written.codes[:, :3], best.codes(cli.datamodule.features()))
    assert (written.levels, written.collisions()) == (4, 0)


@pytest.mark.parametrize("monitor", ["val/collisions", "val/collisions_and_error"])
@pytest.mark.parametrize("save_top_k", [1, 2])
def test_of_checkpoints_with_equal_collisions_the_one_that_explains_most_is_kept(monitor, save_top_k, monkeypatch):
    """The figures are told for five epochs, of which the third is the best."""
    told = iter([(40, 0.02), (30, 0.1), (30, 0.24), (30, 0.2), (31, 0.9), (30, 0.24)])

    def compute(self):
        collisions, explained = next(told)
        return {"collisions": torch.tensor(float(collisions)), "explained": torch.tensor(explained)}

    monkeypatch.setattr("examples.recsys.semantic_ids.__main__.SemanticIdsCLI.after_fit", lambda self: None)
    monkeypatch.setattr("examples.recsys.semantic_ids.quality.QuantizationQuality.compute", compute)
    callback = (
        f"{{class_path: ModelCheckpoint, init_args: {{monitor: {monitor}, mode: min, save_top_k: {save_top_k}}}}}"
    )
    options = ["--trainer.max_epochs=5", "--trainer.check_val_every_n_epoch=1", f"--trainer.callbacks=[{callback}]"]
    cli = main(["fit", *SYNTHETIC, *options])
    kept = sorted(Path(path).stem for path in cli.trainer.checkpoint_callback.best_k_models)
    assert Path(cli.trainer.checkpoint_callback.best_model_path).stem == "best-step=6"
    assert kept == ["best-step=6", "best-step=8"][:save_top_k]


def test_ties_are_broken_whatever_the_number_of_items():
    quality = [(30.0, 0.9), (30.0, 0.8999), (30.0, -5.0), (31.0, 0.99), (1e7, 0.9), (1e7, 0.8999), (1e7 + 1, 1.0)]
    numbers = [
        float(collisions_and_error({"collisions": torch.tensor(count), "explained": torch.tensor(share)}))
        for count, share in quality
    ]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == len(numbers)
    assert [int(number) for number in numbers] == [int(count) for count, _ in quality]


def test_without_a_checkpoint_the_last_weights_count():
    options = ["--trainer.callbacks=null", "--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    cli = main(
        ["fit", *SYNTHETIC, "--trainer.max_epochs=1", *options, "--codes.uniqueness=none", "--codes.path=a.csv.gz"]
    )
    codes = cli.model.codes(cli.datamodule.features())
    assert torch.equal(SemanticIds.read("a.csv.gz", num_items=500).codes, codes)


def test_kmeans_trains_nothing_and_writes_codes(capsys):
    cli = main(["kmeans", *SYNTHETIC, "--codes.path=km.csv", "--seed=4"])
    expected, _ = residual_kmeans(cli.datamodule.features(), levels=3, codebook_size=16, seed=4)
    assert torch.equal(SemanticIds.read("km.csv", num_items=500).codes[:, :3], expected)
    assert "share of the variance explained" in capsys.readouterr().out
    assert not Path("logs").exists()


def test_size_of_the_features_comes_from_the_data():
    cli = main(["partition", *SYNTHETIC, "--data.num_clusters=6"])
    assert cli.model.encoder[0].in_features == cli.datamodule.num_features == 3


class TestPoorCodes:
    def test_codes_of_weights_that_were_hardly_trained_are_named(self):
        options = ["--trainer.max_epochs=1", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]
        rates = ["--model.matrix_optimizer.lr=1e-6", "--model.other_optimizer.lr=1e-6"]
        with pytest.warns(UserWarning, match=r"The codes in a.csv explain .*less than half of the 9\d.\d% that RQ-k-m"):
            main(["fit", *SYNTHETIC, *options, *rates, "--trainer.logger=false", "--codes.path=a.csv"])

    def test_codes_of_kmeans_that_say_next_to_nothing_are_named(self):
        torch.manual_seed(0)
        torch.save(torch.randn(2000, 64), "noise.pt")
        data = ["--data=examples.recsys.semantic_ids.EmbeddingFile", "--data.path=noise.pt", "--codes.path=a.csv"]
        size = ["--model.levels=2", "--model.codebook_size=2", "--trainer.logger=false"]
        with pytest.warns(UserWarning, match=r"The codes in a.csv explain .*, so that they say next to nothing of an"):
            main(["kmeans", *data, *size])

    def test_codes_as_good_as_those_of_kmeans_are_not(self, recwarn):
        main(["kmeans", *SYNTHETIC, "--codes.path=km.csv"])
        assert not [warning for warning in recwarn if "The codes in" in str(warning.message)]

    @pytest.mark.parametrize(
        ("explained", "kmeans", "expected"),
        [
            (0.87, 0.97, None),
            (0.50, 0.97, None),
            (0.48, 0.97, "explain 48.0% of the variance of the features, less than half of the 97.0%"),
            (0.02, 0.99, "less than half of the 99.0%"),
            (-0.3, 0.2, "explain -30.0%"),
            (0.2, 0.3, None),
            (0.09, 0.1, "so that they say next to nothing of an item"),
        ],
    )
    def test_the_yardstick_is_half_of_kmeans_and_a_tenth_at_least(self, explained, kmeans, expected):
        said = complaint(explained, kmeans)
        assert said is None if expected is None else expected in said

    def test_it_is_told_where_uniqueness_made_them_poor(self):
        with pytest.warns(UserWarning, match=r"Before codes.uniqueness=sinkhorn moved items to other codes they expla"):
            _warn_of_poor_codes(CodesFile("a.csv", "sinkhorn"), 0.9, 0.2, 0.95)

    def test_the_yardstick_is_close_to_kmeans_of_all_items(self):
        features = SyntheticFeatures(50, 10).features()
        codes, codebooks = residual_kmeans(features, 3, 8)
        left = features - Quantization(features, codes, codebooks).sums()
        explained = 1 - float(left.square().sum() / features.square().sum())
        assert kmeans_explained(features, 3, 8) == pytest.approx(explained, abs=0.05)
        assert kmeans_explained(features, 3, 8, max_items=100) == pytest.approx(explained, abs=0.1)


class TestUniqueness:
    """Three items around two code vectors, two of them with the same codes."""

    QUANTIZATION = Quantization(
        vectors=torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 1.0]]),
        codes=torch.tensor([[0, 0], [0, 0], [1, 0]]),
        codebooks=torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.1, 0.0]]]),
    )

    @pytest.mark.parametrize(
        ("uniqueness", "expected"),
        [
            ("digit", [[0, 0, 0], [0, 0, 1], [1, 0, 0]]),
            ("sinkhorn", [[0, 0], [0, 1], [1, 0]]),
            ("none", [[0, 0], [0, 0], [1, 0]]),
        ],
    )
    def test_each_way_gives_its_codes(self, uniqueness, expected):
        assert CodesFile(uniqueness=uniqueness).unique(self.QUANTIZATION).tolist() == expected

    def test_a_digit_with_more_codes_than_a_level_gets_a_warning(self):
        codes = torch.tensor([[0, 0]] * 3 + [[1, 0]] * 2)
        quantization = Quantization(torch.rand(5, 2), codes, self.QUANTIZATION.codebooks)
        with pytest.warns(UserWarning, match=r"3 items have the same codes.* grows from 2 to as many: take features"):
            assert CodesFile().unique(quantization)[:, 2].tolist() == [0, 1, 2, 0, 1]
        with pytest.raises(ValueError, match="3 items have"):
            CodesFile(uniqueness="sinkhorn").unique(quantization)

    def test_a_digit_with_as_many_codes_as_a_level_gets_none(self, recwarn):
        CodesFile().unique(self.QUANTIZATION)
        assert not recwarn

    def test_distances_of_the_last_level_are_those_of_what_is_left(self):
        left = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
        distances: Tensor = self.QUANTIZATION.last_level_distances()
        torch.testing.assert_close(distances, torch.cdist(left, self.QUANTIZATION.codebooks[1]).square())

    def test_the_command_line_takes_it(self):
        cli = main(["kmeans", *SYNTHETIC, "--codes.uniqueness=sinkhorn", "--model.codebook_size=32"])
        assert (cli.ids.levels, cli.ids.collisions()) == (3, 0)


def test_rows_that_equal_another_are_counted():
    assert shared_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])) == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("semantic_ids/features/*.yaml")), ids=lambda path: path.stem)
def test_codes_go_to_the_file_of_the_features_and_the_run_is_called_after_it(parser, path):
    """All but the files that it reads and the encoder of texts are made of it, in either order of the configs."""
    words = files("semantic_ids/rqvae", f"semantic_ids/features/{path.stem}")
    config = parser.parse_args(words)
    assert issubclass(locate(config.data.class_path), ItemFeatures)
    assert config.codes.path == f"semantic_ids/{path.stem}.csv"
    assert config.model.levels == 3
    assert config.model.matrix_optimizer.class_path == "lightning_muon.Muon"
    assert config.trainer.callbacks[0].init_args.monitor == "val/collisions"
    assert f"name: RQVAE_{path.stem}\n" in parser.dump(config)
    assert parser.dump(config) == parser.dump(parser.parse_args([*words[2:], *words[:2]]))


def test_unknown_ways_of_uniqueness_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["kmeans", *SYNTHETIC, "--codes.uniqueness=hash"])
    assert "sinkhorn" in capsys.readouterr().err


def test_a_missing_file_of_attributes_gets_a_sentence():
    with pytest.raises(FileNotFoundError, match=r"path='nowhere.gz' does not exist"):
        main(["kmeans", *files("semantic_ids/rqkmeans", "semantic_ids/features/beauty"), "--data.path=nowhere.gz"])


@pytest.mark.slow
def test_the_synthetic_configuration_uses_its_codebooks():
    cli = main(["fit", *SYNTHETIC])
    first = cli.ids.codes[:, :3]
    assert min(len(level.unique()) for level in first.T) >= 15
    assert len(first.unique(dim=0)) > 300


def fit_one_of_two(rank: int, folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    options = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=1", "--trainer.callbacks=null"]
    options += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false"]
    options += ["--trainer.enable_checkpointing=false", "--data.num_clusters=167", "--data.items_per_cluster=3"]
    cli = main(["fit", *SYNTHETIC, *options])
    return {
        "codebooks": cli.model.quantizer.codebooks.detach(),
        "counts": cli.model.counts,
        "codes": cli.model.codes(cli.datamodule.features()),
        "collisions": float(cli.trainer.callback_metrics["val/collisions"]),
    }


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_keep_the_same_codebooks_and_count_every_item_once(tmp_path):
    """Codebooks are set and replaced by all processes together: DDP would not even them out."""
    first, second = processes.run({"fit": fit_one_of_two}, tmp_path, args=(tmp_path,))["fit"]
    assert torch.equal(first["codebooks"], second["codebooks"])
    assert torch.equal(first["counts"], second["counts"])
    assert first["counts"].sum(1).tolist() == [502] * 3  # 501 items, one of them twice to even out the processes
    assert first["collisions"] == second["collisions"] == SemanticIds(first["codes"]).collisions()
