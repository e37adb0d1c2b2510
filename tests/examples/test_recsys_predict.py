"""Recommendations: what is recommended, the file, what is printed, and checkpoints of another catalogue."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from examples.recsys.__main__ import comparison, main
from examples.recsys.data import Interactions, SyntheticSequences
from examples.recsys.models import Popularity, Recommender, SASRec
from examples.recsys.models.base import Recommendations
from examples.recsys.recommendations import RecommendationWriter
from examples.recsys.semantic_ids.codes import SemanticIds
from tests.distributed import processes
from tests.examples.configs import on_synthetic

ROOT = Path(__file__).parents[2]
SYNTHETIC = [*on_synthetic("sasrec"), "--data.num_users=60"]
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# ann ends with ink, bob has pens only; items are numbered red pen, blue pen, ink, [b]glue[/b], tape.
ROWS = """user,item,timestamp
ann,red pen,1
ann,blue pen,2
ann,ink,3
bob,blue pen,1
bob,red pen,2
bob,blue pen,3
cat,[b]glue[/b],1
cat,tape,2
cat,red pen,3
"""


class Fixed(Recommender):
    """Prefers item 1, then 2, and so on; ``scores`` (num_items,) say otherwise."""

    def __init__(self, num_items: int, mask_history: bool = True, scores: list[float] | None = None) -> None:
        super().__init__(num_items, mask_history)
        self.scores = torch.tensor(scores or [float(-item) for item in range(num_items)])

    def forward(self, history: Tensor) -> Tensor:
        return self.scores.expand(len(history), -1)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples.recsys"])


@pytest.fixture
def data(tmp_path) -> Interactions:
    (tmp_path / "log.csv").write_text(ROWS)
    return Interactions(str(tmp_path / "log.csv"), max_length=2, eval_batch_size=2)


def predict(model: L.LightningModule, data: L.LightningDataModule, writer: RecommendationWriter, **kwargs) -> None:
    trainer = L.Trainer(**QUIET, callbacks=[writer])
    trainer.predict(model, datamodule=data, return_predictions=False, **kwargs)


def rows(path: str | Path) -> list[dict[str, str]]:
    opener = gzip.open if Path(path).suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def recommended(path: str | Path) -> dict[str, list[str]]:
    """Titles by user, in the order of the file; ranks count from 1."""
    found: dict[str, list[str]] = {}
    for row in rows(path):
        found.setdefault(row["user"], []).append(row["title"])
        assert int(row["rank"]) == len(found[row["user"]])
    return found


class TestFile:
    def test_the_best_items_that_are_not_in_the_whole_history(self, data):
        predict(Fixed(5), data, RecommendationWriter(top_k=2, show=0))
        # ann's red pen is older than what the model sees of her history, and left out all the same.
        assert recommended("recommendations.csv") == {
            "ann": ["[b]glue[/b]", "tape"],
            "bob": ["ink", "[b]glue[/b]"],
            "cat": ["blue pen", "ink"],
        }
        header, first, *_ = Path("recommendations.csv").read_text().splitlines()
        assert (header, first) == ("user,rank,item,title,score", "ann,1,[b]glue[/b],[b]glue[/b],-3")

    def test_items_go_by_their_ids_and_have_their_titles_beside(self, tmp_path):
        (tmp_path / "titled.csv").write_text("user,item,timestamp,name\na,70,1,Pen\na,50,2,Ink\na,60,3,\n")
        data = Interactions("titled.csv", title_column="name", max_length=2, mask_history=False)
        predict(Fixed(3, mask_history=False), data, RecommendationWriter(top_k=3, show=0))
        found = [(row["item"], row["title"]) for row in rows("recommendations.csv")]
        assert found == [("70", "Pen"), ("50", "Ink"), ("60", "60")]

    def test_items_of_the_history_compete_where_the_model_does_not_mask(self, data):
        predict(Fixed(5, mask_history=False), data, RecommendationWriter(top_k=2, show=0))
        assert set(map(tuple, recommended("recommendations.csv").values())) == {("red pen", "blue pen")}

    @pytest.mark.parametrize("nothing", [-math.inf, math.nan])
    def test_items_without_a_score_are_not_recommended(self, data, nothing):
        model = Fixed(5, scores=[1.0, nothing, 3.0, nothing, nothing])
        with pytest.warns(UserWarning, match=r"3 of 3 users have fewer than top_k=2 recommendations: the model scores"):
            predict(model, data, RecommendationWriter(top_k=2, show=0))
        # ann has both, and so there is nothing to recommend to her.
        assert recommended("recommendations.csv") == {"bob": ["ink"], "cat": ["ink"]}

    def test_more_than_the_catalogue_is_all_of_it(self, data):
        with pytest.warns(UserWarning, match="fewer than top_k=10"):
            predict(Fixed(5, mask_history=False), data, RecommendationWriter(top_k=10, show=0))
        assert len(rows("recommendations.csv")) == 3 * 5

    def test_gzipped_in_a_new_folder(self, data):
        predict(Fixed(5), data, RecommendationWriter("new/folder/best.csv.gz", top_k=1))
        assert len(rows("new/folder/best.csv.gz")) == 3
        assert [path.name for path in Path("new/folder").iterdir()] == ["best.csv.gz"]

    def test_whole_or_not_at_all(self, data):
        class Breaks(Fixed):
            def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> Recommendations:
                if batch_index == 1:
                    raise RuntimeError("out of memory")
                return super().predict_step(batch, batch_index)

        Path("recommendations.csv").write_text("of another day")
        with pytest.raises(RuntimeError, match="out of memory"):
            predict(Breaks(5), data, RecommendationWriter())
        assert Path("recommendations.csv").read_text() == "of another day"
        assert list(Path().glob("*.unfinished")) == []

    @pytest.mark.parametrize(("argument", "value"), [("top_k", 0), ("show", -1)])
    def test_bad_arguments_get_a_sentence(self, argument, value):
        with pytest.raises(ValueError, match=rf"{argument} must be \d or more, got {value}"):
            RecommendationWriter(**{argument: value})

    def test_loaders_without_a_data_module_get_a_sentence(self, data):
        data.setup("predict")
        trainer = L.Trainer(**QUIET, callbacks=[RecommendationWriter()])
        with pytest.raises(TypeError, match="of a SequenceDataModule, got Fixed and NoneType: give both to Trainer"):
            trainer.predict(Fixed(5), data.predict_dataloader(), return_predictions=False)


class TestPrint:
    def test_first_users_with_titles_as_they_are(self, data, capsys):
        predict(Fixed(5), data, RecommendationWriter(top_k=2, show=2))
        printed = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
        assert lines == [
            ["ann", "blue pen", "[b]glue[/b]"],
            ["", "ink", "tape"],
            ["bob", "red pen", "ink"],
            ["", "blue pen", "[b]glue[/b]"],
        ]
        assert "Recommendations for 3 users: recommendations.csv" in printed

    def test_nobody(self, data, capsys):
        predict(Fixed(5), data, RecommendationWriter(show=0, top_k=1))
        assert "│" not in capsys.readouterr().out


class TestPredictions:
    def test_of_a_trainer_without_the_writer(self, data):
        model = Fixed(5)
        first, second = L.Trainer(**QUIET).predict(model, datamodule=data)
        assert isinstance(first, Recommendations)
        assert (first.user.tolist(), second.user.tolist()) == ([0, 1], [2])
        assert first.items.tolist() == [[4, 5, 0, 0, 0], [3, 4, 5, 0, 0]]
        assert first.scores[0].tolist() == [-3.0, -4.0, *[-math.inf] * 3]

    def test_batches_have_every_user_once_and_no_target(self, data):
        data.setup("predict")
        first, second = data.predict_dataloader()
        assert first.keys() == {"history", "seen", "user", "times"}
        assert first["user"].tolist() + second["user"].tolist() == [0, 1, 2]
        assert first["history"].tolist() == [[2, 3], [1, 2]]
        assert first["seen"].tolist() == [[1, 2, 3], [2, 1, 2]]

    def test_popularity_recommends_what_is_frequent(self, data):
        predict(Popularity(5, mask_history=False), data, RecommendationWriter(top_k=1, show=0))
        # Each user trains on the first item alone.
        assert {row["score"] for row in rows("recommendations.csv")} == {"1"}


class TestScoresOfMinusInfinity:
    def test_a_target_that_no_beam_reached_is_ranked_last(self, data):
        model = Fixed(5, scores=[1.0, *[-math.inf] * 4])
        trainer = L.Trainer(**QUIET)
        (metrics,) = trainer.test(model, datamodule=data, verbose=False)
        # Only cat's target, the red pen, has a score. Even with the history left out the others tie behind.
        assert metrics["test/unmasked/recall@5"] == 1.0  # five items are all there are
        assert metrics["test/unmasked/ndcg@5"] == pytest.approx((1 + 2 / math.log2(6)) / 3)
        (baseline,) = trainer.test(Popularity(5), datamodule=data, verbose=False)
        assert comparison("Test", "Fixed", metrics, baseline).row_count == len(metrics)


class TestCheckpointOfAnotherCatalogue:
    MESSAGE = r"of a catalogue of 30 items, but the data have 28: give the data that it was trained on, or a checkpoint"

    @pytest.fixture(params=[SASRec, Popularity])
    def saved(self, request, tmp_path) -> tuple[type[Recommender], Path, SyntheticSequences]:
        data = SyntheticSequences(num_users=20, num_clusters=10, items_per_cluster=3, max_length=10)
        trainer = L.Trainer(**QUIET)
        trainer.test(request.param(data.num_items), datamodule=data, verbose=False)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        return request.param, tmp_path / "model.ckpt", data

    def test_is_refused_by_the_trainer(self, saved):
        model_class, path, _ = saved
        other = SyntheticSequences(num_users=20, num_clusters=7, items_per_cluster=4, max_length=10)
        with pytest.raises(ValueError, match=self.MESSAGE):
            L.Trainer(**QUIET).test(model_class(28), datamodule=other, ckpt_path=path)

    def test_is_refused_by_load_from_checkpoint(self, saved):
        model_class, path, _ = saved
        with pytest.raises(ValueError, match=self.MESSAGE):
            model_class.load_from_checkpoint(path, num_items=28, weights_only=True)

    def test_is_refused_where_only_its_settings_tell(self, saved):
        model_class, path, _ = saved
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["num_items"]
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=self.MESSAGE):
            L.Trainer(**QUIET).test(model_class(28), datamodule=SyntheticSequences(num_users=9), ckpt_path=path)

    def test_the_same_catalogue_is_welcome(self, saved):
        model_class, path, data = saved
        model_class.load_from_checkpoint(path, weights_only=True)
        L.Trainer(**QUIET).predict(model_class(30), datamodule=data, ckpt_path=path)


class TestItemsInAnotherOrder:
    """New rows may number the same items differently, and nothing else would tell."""

    @staticmethod
    def data(path: Path, first: str) -> Interactions:
        events = [(user, item) for user in "ab" for item in "wxyz"]
        events.sort(key=lambda event: event[1] != first)
        rows = [f"{user},{item},{time}" for time, (user, item) in enumerate(events)]
        path.write_text("\n".join(["user,item,timestamp", *rows]))
        return Interactions(str(path), max_length=5)

    def test_are_refused_and_the_same_order_is_not(self, tmp_path):
        monday, tuesday = self.data(tmp_path / "monday.csv", "w"), self.data(tmp_path / "tuesday.csv", "z")
        trainer = L.Trainer(**{**QUIET, "max_epochs": 1})
        trainer.fit(SASRec(4, max_length=5, hidden_size=4, num_heads=1), monday)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        model = SASRec.load_from_checkpoint(tmp_path / "model.ckpt")
        L.Trainer(**QUIET).predict(model, datamodule=self.data(tmp_path / "again.csv", "w"))
        for path in (None, tmp_path / "model.ckpt"):
            with pytest.raises(ValueError, match="other items, or on items in another order, than Interactions has"):
                L.Trainer(**QUIET).predict(model, datamodule=tuesday, ckpt_path=path)


class TestCommandLine:
    def fit(self) -> Path:
        main(["fit", *SYNTHETIC, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
        (checkpoint,) = Path("logs").rglob("best-*.ckpt")
        return checkpoint

    def test_predict_writes_what_the_best_checkpoint_recommends(self, capsys):
        checkpoint = self.fit()
        assert not Path("recommendations.csv").exists(), "fit and test write none"
        capsys.readouterr()
        command = ["predict", *SYNTHETIC, "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar=false"]
        cli = main([*command, "--recommendations.path=best.csv", "--recommendations.top_k=4"])
        assert capsys.readouterr().out.count("├") == 2, "three users are printed"
        assert cli.trainer.predict_loop.predictions == [], "nothing is kept in memory"
        model, sequences = SASRec.load_from_checkpoint(checkpoint).eval(), cli.datamodule.protocol.sequences
        written = rows("best.csv")
        assert len(written) == 60 * 4
        for user in (0, 31, 59):
            history = sequences[user]
            scores = model(history[None])[0].index_fill(0, history - 1, -torch.inf)
            mine = [int(row["item"]) for row in written if row["user"] == str(user + 1)]
            assert mine == (scores.argsort(descending=True)[:4] + 1).tolist()

    def test_a_checkpoint_of_another_catalogue_gets_a_sentence(self):
        checkpoint = self.fit()
        with pytest.raises(ValueError, match="of a catalogue of 500 items, but the data have 70"):
            main(["predict", *SYNTHETIC, "--ckpt_path", str(checkpoint), "--data.num_clusters=7"])

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_random_weights_are_neither_judged_nor_asked(self, command):
        with pytest.raises(ValueError, match=f"{command} needs --ckpt_path.*SASRec has random weights"):
            main([command, *SYNTHETIC, "--trainer.logger=false"])

    def test_a_checkpoint_of_another_model_gets_a_sentence(self):
        checkpoint = str(self.fit())
        with pytest.raises(ValueError, match=r"checkpoint is of .*\.SASRec, but .*\.HSTU was given"):
            main(["test", "--model=HSTU", "--data=SyntheticSequences", "--ckpt_path", checkpoint])

    def test_a_checkpoint_of_another_length_gets_a_sentence(self):
        checkpoint = str(self.fit())
        with pytest.raises(ValueError, match="trained with max_length=15, but the model has max_length=7"):
            main(["predict", *SYNTHETIC, "--ckpt_path", checkpoint, "--data.max_length=7"])

    def test_a_checkpoint_can_be_tested_twice_without_a_logger(self):
        command = ["test", *SYNTHETIC, "--ckpt_path", str(self.fit()), "--trainer.logger=false"]
        main(command)
        main(command)

    @pytest.mark.slow
    def test_beams_and_the_place_of_the_codes_are_not_those_of_the_training(self):
        data = SyntheticSequences(num_users=20)
        codes = SemanticIds(torch.arange(data.num_items)[:, None] // torch.tensor([25, 1]) % 25)
        codes.write("codes.csv")
        sizes = [f"--model.{name}=8" for name in ("hidden_size", "head_size", "feedforward_size")]
        common = ["--model=TIGER", "--data=SyntheticSequences", "--data.num_users=20", "--trainer.accelerator=cpu"]
        common += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        begin = [*sizes, "--model.semantic_ids=codes.csv", "--model.num_beams=7", "--trainer.max_steps=1"]
        cli = main(["fit", *common, *begin])
        checkpoint = cli.trainer.checkpoint_callback.best_model_path
        Path("codes.csv").rename("moved.csv")
        used = ["--model.semantic_ids=moved.csv", "--model.num_beams=40", "--recommendations.top_k=30"]
        cli = main(["predict", *common, *used, "--ckpt_path", checkpoint])
        assert (cli.model.num_beams, cli.model.hparams.hidden_size) == (40, 8)
        # Where it is not given, it is that of the training and not the default.
        again = main(["predict", *common, used[0], "--ckpt_path", checkpoint, "--recommendations.path=again.csv"])
        assert again.model.num_beams == 7
        # Of 40 items at most 15 are in a history.
        assert set(map(len, recommended("recommendations.csv").values())) >= {30}


def predict_one_of_two(rank: int, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*arguments, "--trainer.devices=2", "--trainer.strategy=ddp"])
    return printed.getvalue()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_recommend_to_every_user_once(tmp_path):
    """37 users do not share out evenly; the files of the processes together have what one process writes."""
    cli = main(["fit", *SYNTHETIC, "--data.num_users=37", "--trainer.max_epochs=1"])
    arguments = ["predict", *SYNTHETIC, "--data.num_users=37"]
    arguments += ["--ckpt_path", str(tmp_path / cli.trainer.checkpoint_callback.best_model_path)]
    arguments += ["--data.eval_batch_size=5", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    arguments += [f"--recommendations.path={tmp_path}/best.csv", f"--trainer.default_root_dir={tmp_path}"]
    main([*arguments, "--trainer.devices=1"])
    first, second = processes.run({"predict": predict_one_of_two}, tmp_path, args=(arguments,))["predict"]
    assert first.count("Recommendations for 37 users") == 1
    assert "Recommendations for" not in second
    assert sorted(path.name for path in tmp_path.glob("*.csv*")) == ["best.csv", "rank0.best.csv", "rank1.best.csv"]
    one = [(row["user"], row["item"]) for row in rows(tmp_path / "best.csv")]
    two = [(row["user"], row["item"]) for rank in (0, 1) for row in rows(tmp_path / f"rank{rank}.best.csv")]
    assert len(one) == 37 * 10
    assert sorted(two) == sorted(one)
