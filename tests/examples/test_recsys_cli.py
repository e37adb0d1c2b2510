"""The command line of the examples: fit, test, partition, and configurations that combine."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import pytest

from examples.recsys.__main__ import main
from examples.recsys.models import PaperSASRec, SASRec
from tests.distributed import processes
from tests.examples.configs import files, on_synthetic

ROOT = Path(__file__).parents[2]
BEAUTY = files("model/sasrec", "data/beauty")
SYNTHETIC = on_synthetic("sasrec")
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])


def test_fit_prints_partition_and_comparison_and_tests_the_best(capsys):
    main(["fit", *SYNTHETIC, "--trainer.max_epochs=2", "--data.num_users=200", QUIET])
    printed = capsys.readouterr().out
    assert "blocks.*." in printed
    assert "popularity" in printed
    assert "masked/ndcg@10" in printed
    assert "Test of the best checkpoint" in printed
    (checkpoint,) = Path("logs").rglob("best-*.ckpt")
    (log,) = Path("logs").rglob("metrics.csv")
    rows = list(csv.DictReader(log.open()))
    best = max((row for row in rows if row["val/ndcg@10"]), key=lambda row: float(row["val/ndcg@10"]))
    assert checkpoint.stem == f"best-step={int(best['step']) + 1}"
    assert rows[-1]["test/masked/ndcg@10"]


def test_without_a_monitored_checkpoint_the_last_weights_are_tested(capsys):
    short = ["--trainer.max_steps=1", "--data.num_users=60", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    main(["fit", "--model=SASRec", "--data=SyntheticSequences", *short, QUIET])
    assert "Test of the weights after the last step" in capsys.readouterr().out


def test_size_of_the_catalogue_and_history_come_from_the_data():
    cli = main(["partition", *SYNTHETIC, "--data.num_clusters=7", "--data.items_per_cluster=3", "--data.max_length=9"])
    assert cli.model.embedding.items.weight.shape == (22, 64)
    assert cli.model.embedding.positions.weight.shape == (9, 64)


def test_popularity_has_its_own_line():
    cli = main(["test", "--model=Popularity", "--data=SyntheticSequences", "--trainer.logger=false"])
    assert 0 < cli.trainer.callback_metrics["test/masked/ndcg@10"] < 0.1


@pytest.mark.parametrize(("name", "model"), [("sasrec", SASRec), ("muonrec_sasrec", PaperSASRec)])
def test_partition_of_a_configuration(name, model, capsys):
    cli = main(["partition", *files(f"model/{name}", "data/industrial")])
    assert "param groups:" in capsys.readouterr().out
    assert isinstance(cli.model, model)
    groups = {group["name"]: group for group in cli.model.configure_optimizers().param_groups}
    assert {name.split("/")[0] for name in groups} == {"matrix", "other"}


def test_unknown_category_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["partition", *BEAUTY, "--data.category=Books"])
    assert "Toys_and_Games" in capsys.readouterr().err


def test_missing_codes_get_a_sentence():
    with pytest.raises(FileNotFoundError, match=r"no semantic ids at .*nowhere.csv: make them with .*/rqvae.yaml -c "):
        main(["fit", *on_synthetic("tiger"), "--model.semantic_ids=nowhere.csv"])


def test_missing_data_dir_gets_a_sentence():
    with pytest.raises(FileNotFoundError, match=r"data_dir='nowhere' has no Beauty.txt"):
        main(["fit", *BEAUTY, "--data.data_dir=nowhere"])


@pytest.mark.slow
def test_sasrec_and_hstu_beat_popularity_on_a_third_of_the_budget():
    sasrec, hstu = (main(["fit", *on_synthetic(name), "--trainer.max_epochs=10", QUIET]) for name in ("sasrec", "hstu"))
    baseline = main(["test", "--model=Popularity", "--data=SyntheticSequences", "--trainer.logger=false"])
    popularity = float(baseline.trainer.callback_metrics["test/masked/ndcg@10"])
    for cli in (sasrec, hstu):
        assert cli.baseline_metrics["test/masked/ndcg@10"] == pytest.approx(popularity)
    ndcg = sasrec.test_metrics["test/masked/ndcg@10"]
    assert ndcg > 3 * popularity
    assert hstu.test_metrics["test/masked/ndcg@10"] > max(5 * popularity, 0.9 * ndcg)


def fit_one_of_two(rank: int, folder: Path) -> str:
    options = ["--trainer.max_epochs=1", "--data.num_users=200", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    options += ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={folder}", QUIET]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["fit", *SYNTHETIC, *options])
    return printed.getvalue()


@pytest.mark.distributed
def test_two_processes_fit_test_and_compare(tmp_path):
    """The popularity baseline is judged by all processes of the Trainer: one alone would wait for the others."""
    first, second = processes.run({"fit": fit_one_of_two}, tmp_path, args=(tmp_path,))["fit"]
    assert first.count("Test of the best checkpoint") == 1
    assert "Test of" not in second
