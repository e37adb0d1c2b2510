"""Every shipped configuration of a recommender makes a model and its data, and combines with the partial ones."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from pydoc import locate

import pytest
import torch
import yaml

import lightning_muon
from examples.recsys.__main__ import main
from examples.recsys.models import (
    HSTU,
    TIGER,
    Caser,
    GRU4Rec,
    MiniOneRec,
    PaperSASRec,
    SASRec,
    SemanticIdLM,
)
from examples.recsys.semantic_ids.codes import SemanticIds
from lightning_muon import MatrixOptimizer, WeightAwareOptimizer
from tests.lightning_helpers import fit

CONFIGS = Path(__file__).parents[2] / "configs"
RECOMMENDERS = sorted(path for path in CONFIGS.glob("*.yaml") if "-m examples.recsys fit" in path.read_text())
PIECES = sorted((CONFIGS / "optimizer").glob("*.yaml"))
CLASSES = {
    "sasrec": SASRec,
    "sasrec_paper": PaperSASRec,
    "hstu": HSTU,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "tiger": TIGER,
    "sid_lm": SemanticIdLM,
    "minionerec": MiniOneRec,
}
MODELS = ("sasrec", "hstu", "gru4rec", "caser", "tiger", "sid_lm")
TITLED = ("industrial", "office")
SETS = ("synthetic", "beauty", "toys", "sports", *TITLED, "instruments")


@pytest.fixture(scope="module")
def parser():
    """One for all files: to make it takes longer than to parse a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["examples.recsys"])
        return main(["--config", str(CONFIGS / "sasrec_synthetic.yaml"), "--trainer.logger=false"], run=False).parser


@pytest.mark.slow
@pytest.mark.parametrize("path", RECOMMENDERS, ids=lambda path: path.stem)
def test_a_configuration_is_complete(parser, path, tmp_path):
    config = parser.parse_args(["--config", str(path)])
    settings = config.model.init_args
    if "semantic_ids" in settings:  # that file is made by a command of its own
        data = locate(config.data.class_path)(**config.data.init_args.as_dict())
        codes = torch.arange(data.num_items)
        SemanticIds(torch.stack([codes // 256, codes % 256], 1)).write(tmp_path / "codes.csv")
        settings.semantic_ids = str(tmp_path / "codes.csv")
    if "checkpoint" in settings:  # pretrained weights are on the web
        settings.checkpoint = None
    made = parser.instantiate_classes(config)
    assert type(made.model) is max((name, kind) for name, kind in CLASSES.items() if path.stem.startswith(name))[1]
    assert (made.model.num_items, made.model.mask_history) == (made.data.num_items, made.data.mask_history)
    assert {assignment.group for assignment in made.model.partition().assignments} == {"matrix", "other"}


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES, ids=lambda path: path.stem)
def test_a_piece_for_the_optimizer_combines_with_a_model_and_trains(parser, piece):
    """Its classes and learning rates override those of the model's file, and weights stay finite."""
    chosen = yaml.safe_load(piece.read_text())["model"]["init_args"]
    files = ["-c", str(CONFIGS / "sasrec_synthetic.yaml"), "-c", str(piece)]
    made = parser.instantiate_classes(parser.parse_args([*files, "--data.num_users=64"]))
    trainer = fit(made.model, made.data, max_steps=2)
    (optimizer,) = trainer.optimizers
    rates = {group["name"].split("/")[0]: group["lr"] for group in optimizer.param_groups}
    for owner in ("matrix", "other"):
        settings = chosen[f"{owner}_optimizer"]
        assert type(optimizer.optimizers[owner]).__name__ == settings["class_path"].rpartition(".")[2]
        assert rates[owner] == settings["init_args"]["lr"]
    assert trainer.global_step == 2
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_every_rule_has_a_piece():
    texts = "".join(piece.read_text() for piece in PIECES)
    rules = [name for name in lightning_muon.__all__ if _is_rule(getattr(lightning_muon, name))]
    assert len(rules) >= 17
    assert [name for name in rules if f"lightning_muon.{name}," not in texts] == []


def _is_rule(value):
    bases = (MatrixOptimizer, WeightAwareOptimizer)
    return isinstance(value, type) and issubclass(value, MatrixOptimizer) and value not in bases


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpu", {"accelerator": "gpu", "precision": "bf16-mixed"}),
        ("cpu_small", {"accelerator": "cpu", "max_epochs": 2}),
    ],
)
def test_pieces_for_the_trainer_combine_with_a_model_and_an_optimizer(parser, name, expected):
    files = ("hstu_beauty.yaml", "optimizer/normuon.yaml", f"trainer/{name}.yaml")
    config = parser.parse_args([word for file in files for word in ("-c", str(CONFIGS / file))])
    assert config.model.class_path == "examples.recsys.models.HSTU"
    assert config.model.init_args.matrix_optimizer.class_path == "lightning_muon.NorMuon"
    assert expected.items() <= config.trainer.as_dict().items()
    assert config.trainer.logger.init_args.name == "hstu_beauty"


@pytest.mark.parametrize("path", RECOMMENDERS, ids=lambda path: path.stem)
def test_a_configuration_says_how_to_run_it_and_logs_under_its_name(path):
    text = path.read_text()
    comment = re.match(r"(#.*\n)+", text)[0]
    assert re.search(rf"fit (-c|--config) configs/{path.name}\b", comment)
    assert yaml.safe_load(text)["trainer"]["logger"]["init_args"]["name"] == path.stem


def test_there_is_one_a_model_and_data_set():
    """Except that MiniOneRec needs data with titles, and MovieLens has no semantic ids."""
    names = {f"{model}_{data}" for model, data in product(MODELS, SETS)}
    names |= {f"{model}_ml1m" for model in MODELS[:4]}
    names |= {f"{model}_{data}" for model, data in product(("minionerec", "minionerec_small"), TITLED)}
    names |= {f"{model}_paper_{data}" for model, data in product(("sasrec", "gru4rec", "caser"), TITLED)}
    names |= {"minionerec_synthetic", "sasrec_paper_beauty"}
    assert {path.stem for path in RECOMMENDERS} == names
