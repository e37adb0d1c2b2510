"""Configurations of recommenders combine as documented, and each combination makes a model and its data."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from pydoc import locate

import pytest
import torch
import yaml

import lightning_muon
from examples.recsys.semantic_ids.codes import SemanticIds
from lightning_muon import (
    MatrixOptimizer,
    MomentumOptimizer,
    OrthogonalizingOptimizer,
    WeightAwareOptimizer,
    experimental,
)
from tests.examples.configs import CONFIGS, files, on_synthetic
from tests.lightning_helpers import fit

ROOT = CONFIGS.parent
PIECES = sorted((CONFIGS / "optimizer").glob("*.yaml"))


def documented():
    """Rows of the table of combinations: names of models, of data sets, and of what is added to them."""
    rows = re.findall(r"^\| (\w+.*) \| (\w+.*) \|(.*) ?\|$", (CONFIGS / "README.md").read_text(), re.MULTILINE)
    return [[cell.strip().split(", ") if cell.strip() else [] for cell in row] for row in rows if row[0] != "MODEL"]


def combination(model, data, added):
    """Names of the files."""
    return [
        f"model/{model}",
        f"data/{data}",
        *(name.replace("MODEL", model).replace("DATA", data) for name in added),
    ]


def enough_of(models, sets):
    """Pairs with each model and each data set: their files set different things, so that others hold no surprise."""
    for number in range(max(len(models), len(sets))):
        yield models[number % len(models)], sets[number % len(sets)]


COMBINATIONS = [combination(*pair, added) for *both, added in documented() for pair in enough_of(*both)]


def settings_of(path):
    """Values of a file by dotted keys."""

    def flat(settings, prefix=""):
        for key, value in settings.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return dict(flat(yaml.safe_load(path.read_text())))


def test_files_of_models_and_of_data_set_different_things():
    """So they combine in any order, and any model with any data set."""
    models, sets = ([settings_of(path) for path in (CONFIGS / kind).glob("*.yaml")] for kind in ("model", "data"))
    assert len(models) >= 11
    assert len(sets) >= 9
    for model, data in product(models, sets):
        assert model.keys() & data.keys() == set()


def test_every_file_is_documented():
    used = {name for *both, added in documented() for pair in product(*both) for name in combination(*pair, added)}
    kinds = ("model", "data", "preset", "semantic_ids")
    files = {f"{kind}/{path.stem}" for kind in kinds for path in (CONFIGS / kind).glob("*.yaml")}
    assert files - used == {"semantic_ids/rqvae", "semantic_ids/rqkmeans"}
    assert used <= files


@pytest.mark.slow
@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "-".join(name.partition("/")[2] for name in names))
def test_a_combination_makes_a_model_and_its_data(recommender_parser, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("user,item,timestamp\n" + "".join(f"a,{item},{item}\n" for item in range(4)))
    own = ["--data.path=mine.csv"] if "data/interactions" in names else []
    config = recommender_parser.parse_args([*files(*names), *own])
    settings = config.model.init_args
    if "checkpoint" in settings:  # pretrained weights are on the web
        settings.checkpoint = None
    if "semantic_ids" in settings:  # these files are made by a command, or lie outside of the repository
        data = locate(config.data.class_path)(**config.data.init_args.as_dict())
        codes = torch.arange(data.num_items)
        SemanticIds(torch.stack([codes // 256, codes % 256], 1)).write("codes.csv")
        settings.semantic_ids = "codes.csv"
    made = recommender_parser.instantiate_classes(config)
    assert type(made.model) is locate(config.model.class_path)
    assert (made.model.num_items, made.model.mask_history) == (made.data.num_items, made.data.mask_history)
    assert {assignment.group for assignment in made.model.partition().assignments} == {"matrix", "other"}


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES, ids=lambda path: path.stem)
def test_a_piece_for_the_optimizer_combines_with_a_model_and_trains(recommender_parser, piece):
    """Its classes and learning rates override those of the model's file, and weights stay finite."""
    chosen = yaml.safe_load(piece.read_text())["model"]["init_args"]
    words = [*on_synthetic("sasrec"), *files(f"optimizer/{piece.stem}")]
    made = recommender_parser.instantiate_classes(recommender_parser.parse_args([*words, "--data.num_users=64"]))
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
    paths = [f"lightning_muon.{name}" for name in lightning_muon.__all__ if _is_rule(getattr(lightning_muon, name))]
    paths += [f"lightning_muon.experimental.{name}" for name in experimental.__all__]
    assert len(paths) >= 17
    assert [path for path in paths if f"{path}," not in texts] == []


def _is_rule(value):
    bases = (MatrixOptimizer, MomentumOptimizer, OrthogonalizingOptimizer, WeightAwareOptimizer)
    return isinstance(value, type) and issubclass(value, MatrixOptimizer) and value not in bases


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpu", {"accelerator": "gpu", "precision": "bf16-mixed"}),
        ("cpu_small", {"accelerator": "cpu", "max_epochs": 2}),
    ],
)
def test_pieces_for_the_trainer_combine_with_a_model_and_an_optimizer(recommender_parser, name, expected):
    config = recommender_parser.parse_args(files("model/hstu", "data/beauty", "optimizer/normuon", f"trainer/{name}"))
    assert config.model.class_path == "examples.recsys.models.HSTU"
    assert config.model.init_args.matrix_optimizer.class_path == "lightning_muon.NorMuon"
    assert expected.items() <= config.trainer.as_dict().items()


@pytest.mark.parametrize("folder", ["configs", "examples", "docs", "README.md", "Makefile"])
def test_commands_name_files_that_exist(folder):
    """In comments, docstrings and documents; a name with capitals is a placeholder."""
    places = [ROOT / folder] if (ROOT / folder).is_file() else sorted((ROOT / folder).rglob("*.*"))
    written = [path for path in places if "_build" not in path.parts]
    texts = [path.read_text() for path in written if path.suffix in ("", ".yaml", ".md", ".py")]
    named = {name for text in texts for name in re.findall(r"\bconfigs/[a-z0-9_/]+\.(?:yaml|csv)", text)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_presets_say_what_they_go_with():
    for *both, added in documented():
        for model, data in product(*both):
            for name in combination(model, data, added)[2:]:
                if name.startswith("preset/"):
                    first = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
                    goes_with = re.sub(r"(\w*)\{([\w,]+)\}", _alternatives, first)
                    assert re.search(rf"configs/model/\S*\b{model}\b", goes_with), name
                    assert re.search(rf"configs/data/\S*\b{data}\b", goes_with), name


def _alternatives(found):
    """``a_{b,c}`` as ``a_b,a_c``."""
    return ",".join(found[1] + each for each in found[2].split(","))
