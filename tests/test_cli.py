"""Command lines: plain LightningCLI and MuonCLI, settings from YAML and shell, subcommands, checkpoints, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_muon import HybridOptimizer, Muon, MuonCLI, ParameterRule
from lightning_muon import cli as cli_module
from lightning_muon.callbacks import PartitionSummary
from lightning_muon.command_line import SaveConfigBeside
from lightning_muon.schedules import Cosine
from tests.lightning_helpers import QUIET, Bare, Items, NeedsItems, Net, WithOptimizer, assert_same, weights

HELPERS = "tests.lightning_helpers"


@pytest.fixture(autouse=True)
def only_the_arguments_given(monkeypatch):
    """Hide pytest's own arguments from the CLI, and do not wrap long lines."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "200")


def run(*args, cli=MuonCLI, classes=(Net, Items), **kwargs):
    """Run a command line; returns the CLI object."""
    defaults = {**QUIET, "max_steps": 3, **kwargs.pop("trainer_defaults", {})}
    settings = {"save_config_callback": None, "seed_everything_default": 1, "trainer_defaults": defaults}
    return cli(*classes, args=[str(arg) for arg in args], **{**settings, **kwargs})


def instantiate(*args, **kwargs):
    """The same without running; then arguments have no subcommand."""
    return run(*args, run=False, **kwargs)


def failure(capsys, *args, **kwargs):
    """The output of a refused command line."""
    with pytest.raises(SystemExit) as error:
        run(*args, **kwargs)
    assert error.value.code == 2
    return capsys.readouterr().err


def child(cli, name):
    """A child optimizer after fit."""
    return cli.trainer.optimizers[0].optimizers[name]


def config_file(path: Path, config) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


BOTH = pytest.mark.parametrize("cli", [LightningCLI, MuonCLI])


# Settings of a module with the mixin


@BOTH
def test_settings_from_yaml(cli, tmp_path):
    config = {
        "width": 12,
        "matrix_optimizer": {"class_path": "lightning_muon.Muon", "init_args": {"lr": 2.0e-2, "method": "svd"}},
        "other_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
        "schedule": {"class_path": "lightning_muon.schedules.Cosine", "init_args": {"warmup": 0.02, "final": 0.1}},
        "parameter_rules": [
            {"pattern": "layers.up.weight", "group": "other"},
            {"role": "embedding", "options": {"lr": 3.0e-3, "weight_decay": 0.0}},
        ],
    }
    path = config_file(tmp_path / "c.yaml", {"model": config})
    module = run("fit", "-c", path, cli=cli).model
    assert isinstance(module.schedule, Cosine)
    assert vars(module.schedule) == {"warmup": 0.02, "final": 0.1}
    assert module.parameter_rules[0] == ParameterRule(pattern="layers.up.weight", group="other")
    module.schedule = None
    children = module.configure_optimizers().optimizers
    (matrix,) = children["matrix"].param_groups
    assert (matrix["lr"], matrix["method"], matrix["param_names"]) == (2e-2, "svd", ["layers.down.weight"])
    tables = [group for group in children["other"].param_groups if group["param_names"] == ["layers.embed.weight"]]
    assert tables[0]["weight_decay"] == 0.0


@BOTH
def test_settings_from_the_shell_by_short_class_name(cli):
    module = run(
        "fit", "--model.matrix_optimizer=Muon", "--model.matrix_optimizer.lr=0.02", "--model.schedule=Cosine",
        "--model.schedule.warmup=2", "--model.other_optimizer=SGD", "--model.other_optimizer.lr=0.5", cli=cli,
    ).model  # fmt: skip
    assert vars(module.schedule) == {"warmup": 2, "final": 0.0}
    module.schedule = None
    children = module.configure_optimizers().optimizers
    assert type(children["matrix"]) is Muon  # not torch.optim.Muon
    assert children["matrix"].param_groups[0]["lr"] == 0.02
    assert type(children["other"]) is torch.optim.SGD


def test_torchs_own_muon_is_meant_by_its_path():
    cli = run("fit", "--model.matrix_optimizer=torch.optim.Muon")
    assert type(child(cli, "matrix")) is torch.optim.Muon


@BOTH
def test_a_baseline_has_its_own_defaults(cli):
    """jsonargparse passes defaults of a default class to the class that replaces it, so there must be none."""
    fitted = run("fit", "--model.matrix_optimizer=torch.optim.SGD", "--model.other_optimizer=torch.optim.Adam", cli=cli)
    matrix, other = child(fitted, "matrix").defaults, child(fitted, "other").defaults
    plain = torch.optim.SGD([torch.zeros(1)]).defaults
    assert {key: matrix[key] for key in plain} == plain
    assert other["weight_decay"] == 0.0
    assert other["lr"] == 1e-3


A = {"lr": 3e-3}  # arguments without a class
NORMUON = {"class_path": "NorMuon", "init_args": {"weight_decay": 0.3}}
SGD = "torch.optim.SGD"


@pytest.mark.parametrize("by_path", [False, True], ids=["class", "class path"])
@pytest.mark.parametrize(
    ("configs", "options", "expected"),
    [
        ([], [".lr=3e-3"], ("Muon", 3e-3, 0.1)),
        ([], [".lr=3e-3", ".weight_decay=0.2"], ("Muon", 3e-3, 0.2)),
        ([], ["=NorMuon", ".lr=3e-3"], ("NorMuon", 3e-3, 0.1)),
        ([], [".lr=3e-3", "=NorMuon"], ("NorMuon", 3e-3, 0.1)),
        ([], [".lr=3e-3", f"={SGD}"], ("SGD", 3e-3, 0.0)),
        ([A], [], ("Muon", 3e-3, 0.1)),
        ([A], [".lr=0.5"], ("Muon", 0.5, 0.1)),
        ([A], [f"={SGD}"], ("SGD", 3e-3, 0.0)),
        ([NORMUON], [".lr=0.5"], ("NorMuon", 0.5, 0.3)),
        ([NORMUON, A], [], ("NorMuon", 3e-3, 0.3)),
        ([A, NORMUON], [], ("NorMuon", 3e-3, 0.3)),
        ([A, SGD], [], ("SGD", 3e-3, 0.0)),
        ([SGD, A], [], ("SGD", 3e-3, 0.0)),
    ],
    ids=str,
)
def test_arguments_without_a_class_are_muons_and_of_no_other_class(configs, options, expected, by_path, tmp_path):
    """If a class is given too, they are its arguments, and it keeps its own defaults."""
    words = [f"--model={HELPERS}.Net"] if by_path else []
    for number, value in enumerate(configs):
        settings = {"matrix_optimizer": value}
        model = {"class_path": f"{HELPERS}.Net", "init_args": settings} if by_path else settings
        words += ["-c", config_file(tmp_path / f"{number}.yaml", {"model": model})]
    words += [f"--model.matrix_optimizer{option}" for option in options]
    module = instantiate(*words, classes=() if by_path else (Net, Items)).model
    matrix = module.configure_optimizers().optimizers["matrix"]
    assert (type(matrix).__name__, matrix.defaults["lr"], matrix.defaults["weight_decay"]) == expected
    assert "momentum" not in matrix.defaults or matrix.defaults["momentum"] == (0.0 if expected[0] == "SGD" else 0.95)


@BOTH
def test_arguments_of_the_other_optimizer_without_a_class_are_adamws(cli):
    module = run("fit", "--model.other_optimizer.lr=0.5", "--model.matrix_optimizer.lr=0.25", cli=cli).model
    children = module.configure_optimizers().optimizers
    assert (type(children["other"]), children["other"].defaults["lr"]) == (torch.optim.AdamW, 0.5)
    assert (type(children["matrix"]), children["matrix"].defaults["lr"]) == (Muon, 0.25)


def test_arguments_without_a_class_at_the_top_level():
    fitted = run("fit", "--matrix_optimizer.lr", "0.25", "--other_optimizer.lr", "0.5", classes=(Bare, Items))
    assert (type(child(fitted, "matrix")), child(fitted, "matrix").defaults["lr"]) == (Muon, 0.25)
    assert (type(child(fitted, "other")), child(fitted, "other").defaults["lr"]) == (torch.optim.AdamW, 0.5)


def test_a_class_chosen_over_a_config_takes_over_only_what_the_config_sets(tmp_path):
    """Values of the file are kept if the new class has an argument of that name, as jsonargparse merges them."""
    config = {"model": {"matrix_optimizer": {"class_path": "lightning_muon.Muon", "init_args": {"lr": 0.02}}}}
    path = config_file(tmp_path / "c.yaml", config)
    fitted = run("fit", "-c", path, "--model.matrix_optimizer=torch.optim.SGD")
    assert child(fitted, "matrix").defaults["momentum"] == 0.0
    assert child(fitted, "matrix").defaults["weight_decay"] == 0.0
    assert child(fitted, "matrix").defaults["lr"] == 0.02


def test_rules_of_a_second_config_replace_or_extend(tmp_path):
    first = config_file(
        tmp_path / "a.yaml", {"model": {"parameter_rules": [{"pattern": "*.up.weight", "group": "other"}]}}
    )
    others = [{"role": "head", "name": "head"}, {"role": "embedding", "name": "table"}]
    second = config_file(tmp_path / "b.yaml", {"model": {"parameter_rules": others}})
    module = instantiate("-c", first, "-c", second).model
    assert [(rule.role, rule.pattern) for rule in module.parameter_rules] == [("head", None), ("embedding", None)]
    module = instantiate("-c", first, "--model.parameter_rules+={'role': 'head', 'name': 'head'}").model
    assert [rule.pattern or rule.role for rule in module.parameter_rules] == ["*.up.weight", "head"]
    appended = config_file(tmp_path / "c.yaml", {"model": {"parameter_rules+": [{"role": "head", "name": "head"}]}})
    module = instantiate("-c", first, "-c", appended).model
    assert [rule.pattern or rule.role for rule in module.parameter_rules] == ["*.up.weight", "head"]


@pytest.mark.parametrize("classes", [(Net, Items), ()], ids=["classes", "class paths"])
def test_help_shows_the_settings_before_the_trainer(classes, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--help", classes=classes)
    shown = capsys.readouterr().out
    for name in ("matrix_optimizer", "other_optimizer", "schedule", "parameter_rules", "parameter_rules+"):
        assert (f"--model.{name} " in shown) == bool(classes)
        assert f"--{name} " in shown
    assert shown.index("--parameter_rules ") < shown.index("\nTrainer:\n") < shown.index("--trainer.max_epochs ")
    assert "Optimizers of a module without MuonMixin" in shown
    assert "Optimizer of the hidden matrices; Muon unless given." in shown
    for internal in ("--optimizer", ":class:", "``", "PartitionTrainer", "<class"):
        assert internal not in shown


def test_help_of_a_model_class_describes_the_settings(capsys):
    with pytest.raises(SystemExit):
        run("fit", f"--model.help={HELPERS}.Net", classes=())
    assert "Optimizer of the hidden matrices; Muon unless given." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "options", "places"),
    [
        ((Net, Items), (), ["model"]),
        ((Bare, Items), (), [""]),
        ((), (f"--model={HELPERS}.Net",), ["model.init_args"]),
        ((), (f"--model={HELPERS}.Bare",), [""]),
    ],
)
def test_settings_appear_once_in_a_printed_config(classes, options, places, capsys):
    with pytest.raises(SystemExit):
        run("fit", *options, "--print_config", classes=classes)
    printed = yaml.safe_load(capsys.readouterr().out)
    found = []
    for place in ("", "model", "model.init_args"):
        section = printed
        for key in filter(None, place.split(".")):
            section = section.get(key, {})
        found += [place] if "matrix_optimizer" in section else []
    assert found == places


def test_saved_config_runs_again(tmp_path):
    first = MuonCLI(
        Net,
        Items,
        args=["fit", "--model.matrix_optimizer=Muon", "--model.matrix_optimizer.lr=0.02", "--model.schedule=Cosine"],
        seed_everything_default=1,
        trainer_defaults={**QUIET, "max_steps": 3, "default_root_dir": str(tmp_path), "logger": True},
    )
    saved = Path(first.trainer.log_dir) / "config.yaml"
    again = run("fit", "-c", saved, "--trainer.logger=false")
    assert_same(weights(again.model), weights(first.model))


def test_runs_in_one_folder_keep_all_their_configs(tmp_path, capsys):
    folder = {"logger": False, "default_root_dir": str(tmp_path)}
    for width in (8, 12, 16):
        options = {"save_config_callback": SaveConfigBeside, "trainer_defaults": folder}
        run("fit", f"--model.width={width}", "--trainer.logger=false", **options)
    names = ("config.yaml", "config-v1.yaml", "config-v2.yaml")
    assert [yaml.safe_load((tmp_path / name).read_text())["model"]["width"] for name in names] == [8, 12, 16]


def test_a_config_is_overwritten_where_that_is_asked_for(tmp_path):
    for width in (8, 12):
        MuonCLI(
            Net, Items, args=["fit", f"--model.width={width}"], save_config_kwargs={"overwrite": True},
            trainer_defaults={**QUIET, "max_steps": 1, "default_root_dir": str(tmp_path)},
        )  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["width"] == 12


# Errors: tests/test_cli_errors.py has those of single options and settings


def test_optimizer_flag_of_a_plain_lightning_cli_is_refused():
    with pytest.raises(RuntimeError, match=r"Net\.configure_optimizers of MuonMixin was replaced .*--optimizer"):
        run("fit", "--optimizer=AdamW", "--optimizer.lr=0.1", cli=LightningCLI)


def test_muon_cli_has_no_optimizer_flag(capsys):
    printed = failure(capsys, "fit", "--optimizer=AdamW")
    assert "No option '--optimizer'" in printed
    assert "--model.matrix_optimizer or --model.other_optimizer" in printed


def test_rule_without_match_is_an_error():
    with pytest.raises(ValueError, match=r"layers\.upp\.\*"):
        run("fit", "--model.parameter_rules=[{'pattern': 'layers.upp.*', 'group': 'other'}]")


def test_bad_setting_of_a_schedule_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"warmup must be 0 or more, got -1"):
        run("fit", "--model.schedule=Cosine", "--model.schedule.warmup=-1")


# Modules by class path, links, modules without the mixin


def test_model_and_data_by_class_path(capsys):
    cli = run("fit", f"--model={HELPERS}.Net", "--model.width=12", f"--data={HELPERS}.Items", classes=())
    assert cli.model.layers.up.weight.shape == (24, 12)
    assert isinstance(cli.trainer.optimizers[0], HybridOptimizer)


@pytest.mark.parametrize("by_path", [False, True], ids=["classes", "class paths"])
def test_data_gives_the_model_what_it_knows(by_path, tmp_path):
    if by_path:
        paths = (f"--model={HELPERS}.NeedsItems", f"--data={HELPERS}.Items")
        cli = run("fit", *paths, "--data.catalogue=31", classes=(), links=["num_items", "num_users"])
    else:
        cli = run("fit", "--data.catalogue=31", classes=(NeedsItems, Items), links=["num_items", "num_users"])
    assert cli.model.layers.head.weight.shape == (31, 8)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(NeedsItems.load_from_checkpoint(tmp_path / "a.ckpt")), weights(cli.model))


def test_a_model_that_takes_no_linked_argument_is_left_alone(tmp_path):
    cli = run(
        "fit", f"--model={HELPERS}.Unlinked", f"--data={HELPERS}.Items", classes=(), links=["num_items"],
    )  # fmt: skip
    assert "num_items" not in cli.model.hparams
    assert "num_items" not in cli.model.hparams_initial
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(cli.model).load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(loaded), weights(cli.model))


def test_a_model_without_its_linked_data_takes_the_argument_itself():
    data = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    paths = (f"--model={HELPERS}.NeedsItems", f"--data={data}")
    cli = instantiate(*paths, "--model.num_items=31", classes=(), links=["num_items"])
    assert cli.model.layers.head.weight.shape == (31, 8)


def test_settings_for_a_module_without_the_mixin():
    cli = run(
        "fit", "--matrix_optimizer=Muon", "--matrix_optimizer.lr=0.02", "--schedule=Cosine", "--schedule.warmup=1",
        "--parameter_rules=[{'pattern': 'layers.up.weight', 'group': 'other'}]", classes=(Bare, Items),
    )  # fmt: skip
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, HybridOptimizer)
    (matrix,) = optimizer.optimizers["matrix"].param_groups
    assert matrix["initial_lr"] == 0.02
    assert matrix["param_names"] == ["layers.down.weight"]
    assert cli.trainer.lr_scheduler_configs[0].name == "lr"


def test_a_module_with_an_optimizer_of_its_own_is_told_that_it_is_replaced():
    with pytest.warns(UserWarning, match=r"MuonCLI replaces WithOptimizer\.configure_optimizers: its SGD\(lr=0\.1"):
        cli = run("fit", classes=(WithOptimizer, Items))
    assert isinstance(cli.trainer.optimizers[0], HybridOptimizer)


def test_top_level_settings_for_a_module_with_the_mixin_point_to_its_own():
    with pytest.raises(ValueError, match=r"Net has it: use --model\.schedule \(model\.schedule in YAML"):
        run("fit", "--schedule=Cosine")


def test_a_model_without_hyperparameters_may_stand_beside_links():
    cli = run("fit", f"--model={HELPERS}.Silent", f"--data={HELPERS}.Items", classes=(), links=["num_items"])
    assert not cli.model.hparams


def test_trainer_class_without_partition_is_refused():
    with pytest.raises(TypeError, match=r"trainer_class must be a subclass of lightning_muon\.cli\.PartitionTrainer"):
        run("fit", trainer_class=Trainer)


# Subcommands


def test_partition_prints_the_table_and_trains_nothing(capsys, monkeypatch):
    monkeypatch.setattr(Items, "dataset", lambda self: pytest.fail("data was touched"))
    before = weights(instantiate().model)
    cli = run("partition", "--model.parameter_rules=[{'role': 'embedding', 'name': 'tables'}]")
    printed = capsys.readouterr().out
    assert printed.count("layers.up.weight") == 1
    assert "tables" in printed
    assert_same(weights(cli.model), before)
    assert cli.trainer.global_step == 0


def test_partition_needs_no_data_and_no_accelerator_and_applies_top_level_rules(capsys):
    arguments = ("--parameter_rules=[{'role': 'embedding', 'name': 'tables'}]", "--trainer.accelerator=gpu")
    run("partition", f"--model={HELPERS}.Bare", *arguments, classes=())
    assert "tables" in capsys.readouterr().out


def test_validate_and_test_run():
    cli = run("validate", "--trainer.limit_val_batches=2")
    assert cli.trainer.callback_metrics["loss"] > 0
    assert run("test").trainer.callback_metrics["test_loss"] > 0


@BOTH
def test_fit_prints_the_partition_unless_summaries_are_off(cli, capsys):
    run("fit", "--trainer.enable_model_summary=true", cli=cli)
    assert capsys.readouterr().out.count("layers.up.weight") == 1
    run("fit", "--trainer.enable_model_summary=false", cli=cli)
    assert "layers.up.weight" not in capsys.readouterr().out


def test_a_partition_summary_of_the_config_is_not_doubled(capsys):
    callback = {"class_path": "lightning_muon.callbacks.PartitionSummary"}
    cli = run("fit", "--trainer.enable_model_summary=true", f"--trainer.callbacks={[callback]}")
    assert sum(isinstance(callback, PartitionSummary) for callback in cli.trainer.callbacks) == 1
    assert capsys.readouterr().out.count("layers.up.weight") == 1


def test_console_script_finds_modules_in_the_current_directory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import lightning as L\nfrom torch import nn\n\n"
        "class Model(L.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
    )
    root = str(Path(cli_module.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_muon", "partition", "--model", "mine.Model"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "body.0.weight" in done.stdout


# Checkpoints of a command line


@BOTH
@pytest.mark.parametrize("by_path", [False, True], ids=["class", "class path"])
def test_load_from_checkpoint_restores_the_settings(cli, by_path, tmp_path):
    arguments = [
        "--model.width=12",
        "--model.matrix_optimizer=Muon",
        "--model.matrix_optimizer.lr=0.02",
        "--model.schedule=Cosine",
        "--model.parameter_rules=[{'pattern': '*.up.weight', 'group': 'other'}]",
    ]
    if by_path:
        arguments = [f"--model={HELPERS}.Net", f"--data={HELPERS}.Items", *arguments]
    fitted = run("fit", *arguments, cli=cli, classes=() if by_path else (Net, Items))
    fitted.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(loaded), weights(fitted.model))
    assert isinstance(loaded.schedule, Cosine)
    assert loaded.parameter_rules == [ParameterRule(pattern="*.up.weight", group="other")]
    loaded.schedule = None
    assert loaded.configure_optimizers().optimizers["matrix"].param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("by_path", [False, True], ids=["class", "class path"])
def test_resume_through_ckpt_path_is_exact(by_path, tmp_path):
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path),
            "filename": "{epoch}",
            "save_top_k": -1,
            "enable_version_counter": False,
        },
    }
    config = {
        "model": {
            "matrix_optimizer": {"class_path": "Muon", "init_args": {"lr": 0.02}},
            "schedule": {"class_path": "Cosine", "init_args": {"warmup": 2}},
            "parameter_rules": [{"role": "embedding", "options": {"lr": 0.01}}],
        },
        "trainer": {"max_steps": -1, "max_epochs": 3, "callbacks": [checkpoint], "enable_checkpointing": True},
    }
    if by_path:
        config["model"] = {"class_path": f"{HELPERS}.Net", "init_args": config["model"]}
        config["data"] = f"{HELPERS}.Items"
    classes = () if by_path else (Net, Items)
    path = config_file(tmp_path / "c.yaml", config)
    whole = weights(run("fit", "-c", path, classes=classes).model)
    resumed = run("fit", "-c", path, "--ckpt_path", tmp_path / "epoch=0.ckpt", "--seed_everything=2", classes=classes)
    assert_same(weights(resumed.model), whole)


def test_the_parent_class_loads_the_checkpoint_of_a_command_line(tmp_path):
    fitted = run("fit", "--model.width=12", "--model.matrix_optimizer=Muon", "--model.schedule=Cosine")
    fitted.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not {"matrix_optimizer", "other_optimizer", "schedule", "parameter_rules"} & set(saved["hyper_parameters"])
    assert_same(weights(Bare.load_from_checkpoint(tmp_path / "a.ckpt")), weights(fitted.model))


def test_settings_given_on_resume_count_and_others_come_from_the_checkpoint(tmp_path):
    first = run(
        "fit", "--model.matrix_optimizer=Muon", "--model.matrix_optimizer.lr=0.02", "--model.schedule=Cosine",
        "--trainer.max_steps=-1", "--trainer.max_epochs=1",
    )  # fmt: skip
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ["fit", "--trainer.max_steps=-1", "--trainer.max_epochs=2", "--ckpt_path", tmp_path / "a.ckpt"]
    resumed = run(*again)
    assert isinstance(resumed.model.schedule, Cosine)
    assert resumed.trainer.optimizers[0].param_groups[-1]["initial_lr"] == 0.02
    with pytest.warns(UserWarning, match=r"saved run had the schedule Cosine.*goes on at step 5 with Linear"):
        run(*again, "--model.schedule=Linear")
    with pytest.warns(UserWarning, match=r"learning rates of its checkpoint, .*matrix 0\.02 \(given now: 0\.5\)"):
        run(*again, "--model.matrix_optimizer=Muon", "--model.matrix_optimizer.lr=0.5")
