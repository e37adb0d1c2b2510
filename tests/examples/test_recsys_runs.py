"""Runs are called after model and data, and configs in an order that undoes one of them are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from examples.recsys.__main__ import main
from examples.recsys.runs import fault_in_order
from tests.examples.configs import CONFIGS, files, on_synthetic

SASREC = files("model/sasrec")
BEAUTY = files("data/beauty")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([*SASREC, *BEAUTY], "SASRec_Beauty"),
        ([*BEAUTY, *SASREC, "--data.category=Toys_and_Games"], "SASRec_Toys_and_Games"),
        ([*SASREC, *files("data/ml1m")], "SASRec_MovieLens1M"),
        ([*SASREC, *files("data/interactions"), "--data.path=some/mine.csv.gz"], "SASRec_mine"),
        ([*SASREC, *BEAUTY, "--trainer.logger=TensorBoardLogger"], "SASRec_Beauty"),
        ([*SASREC, *BEAUTY, "--trainer.logger.name=mine"], "mine"),
    ],
)
def test_a_config_is_printed_with_the_name_of_the_run(recommender_parser, words, name):
    dumped = yaml.safe_load(recommender_parser.dump(recommender_parser.parse_args(words)))
    assert dumped["trainer"]["logger"]["init_args"]["name"] == name


@pytest.mark.slow
def test_what_is_printed_is_what_is_saved_and_finds_its_checkpoint_and_folder_again(capsys):
    words = [*on_synthetic("sasrec"), "--data.num_users=60", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit):
        main(["fit", *words, "--print_config="])
    printed = capsys.readouterr().out
    main(["fit", *words])
    folder = Path("logs/SASRec_SyntheticSequences/version_0")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == yaml.safe_load(printed)
    (checkpoint,) = folder.glob("checkpoints/best-*.ckpt")
    again = ["-c", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)]
    resumed = main(["fit", *again, "--trainer.max_epochs=2"])
    assert resumed.trainer.current_epoch == 2
    assert Path(resumed.trainer.log_dir) == folder.with_name("version_1")
    assert main(["test", *again]).trainer.callback_metrics["test/masked/ndcg@10"] > 0


@pytest.mark.parametrize(
    ("pieces", "key"),
    [
        (["semantic_ids/beauty", "preset/tiger_leave_one_out"], "data.init_args.max_length"),
        (["trainer/gpu", "trainer/cpu_small"], "trainer.max_epochs"),
        (["callbacks/diagnostics"], "trainer.callbacks"),
    ],
)
def test_a_file_that_would_undo_an_earlier_one_is_named(pieces, key):
    before, data = [CONFIGS / f"{name}.yaml" for name in pieces], CONFIGS / "data/beauty.yaml"
    said = f"{data} would undo {key} of {before[-1]}: give the files that choose model and data first."
    assert fault_in_order([*before, data]) == said
    assert fault_in_order([data, *before]) is None


def test_a_piece_before_model_and_data_that_they_leave_alone_is_welcome():
    assert fault_in_order([CONFIGS / f"{name}.yaml" for name in ("trainer/gpu", "model/sasrec", "data/beauty")]) is None


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model/sasrec", "trainer/cpu_small", "data/beauty"], "give the files that choose model and data first"),
        (["optimizer/normuon", "model/sasrec", "data/beauty"], "class before it: --model CLASS, or a config that has"),
        (["model/tiger", "data/ml1m"], "needs semantic ids: add the file of the data set in configs/semantic_ids"),
    ],
)
def test_what_cannot_be_combined_gets_a_sentence(capsys, names, sentence):
    with pytest.raises(SystemExit):
        main(files(*names), run=False)
    assert sentence in capsys.readouterr().err


def test_codes_of_another_data_set_are_refused(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # the file names its codes from there
    with pytest.raises(ValueError, match=r"codes of 500 items.* The catalogue has 3706 items"):
        main([*files("model/tiger", "data/ml1m", "semantic_ids/synthetic"), "--trainer.logger=false"], run=False)
