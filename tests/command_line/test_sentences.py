"""A wrong command line ends in at most eight lines with the cause and similar names."""

import subprocess
import sys

import pytest
import yaml
from lightning.pytorch import LightningModule

from lightning_muon import MuonCLI
from lightning_muon.cli import main
from lightning_muon.command_line.report import read_report
from tests.lightning_helpers import QUIET, Bare, Items, NeedsItems, Net

HELPERS = "tests.lightning_helpers"
FIXED, BARE, BY_PATH = (Net, Items), (Bare, Items), ()
PATHS = (f"--model={HELPERS}.Net", f"--data={HELPERS}.Items")


@pytest.fixture(autouse=True)
def only_the_arguments_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("LIGHTNING_MUON_FULL_ERRORS", raising=False)


def refusal(capsys, classes, *args):
    """The output to stderr of a refused command line; at most eight lines."""
    with pytest.raises(SystemExit) as error:
        MuonCLI(*classes, args=[str(arg) for arg in args], save_config_callback=None, trainer_defaults=QUIET)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) <= 8
    assert printed.startswith("error: ")
    assert "Union" not in printed
    assert "usage:" not in printed
    return printed


def config(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def of_model(settings, by_path):
    """A config with these settings of the model."""
    if by_path:
        return {"model": {"class_path": f"{HELPERS}.Net", "init_args": settings}, "data": f"{HELPERS}.Items"}
    return {"model": settings}


BOTH_WAYS = pytest.mark.parametrize("by_path", [False, True], ids=["class", "class path"])


OPTIONS = [
    (FIXED, ["fitt"], "No subcommand 'fitt'. Did you mean fit?"),
    (FIXED, [], "A subcommand is missing: fit, validate"),
    (FIXED, ["fit", "--modle.width=3"], "No option '--modle.width'. Did you mean --model.width?"),
    (FIXED, ["fit", "--model.widht=3"], "No option '--model.widht'. Did you mean --model.width?"),
    (FIXED, ["fit", "--data.batchs", "3"], "No option '--data.batchs'. Did you mean --data.batches?"),
    (FIXED, ["fit", "--trainer.max_epoch=3"], "Did you mean --trainer.max_epochs?"),  # no abbreviation
    (FIXED, ["fit", "--max_epochs=3"], "Did you mean --trainer.max_epochs?"),
    (FIXED, ["fit", "--seed_evrything=3"], "Did you mean --seed_everything?"),
    (FIXED, ["fit", "--model.lr=3"], "Did you mean --model.matrix_optimizer.lr or --model.other_optimizer.lr?"),
    (BARE, ["fit", "--matrix_optimiser=Muon"], "Did you mean --matrix_optimizer?"),
    (BARE, ["fit", "--matrix_optimiser.lr=1"], "Did you mean --matrix_optimizer.lr?"),
    (BY_PATH, ["fit", *PATHS, "--model.widht=3"], f"model: {HELPERS}.Net has no argument 'widht'. Did you mean width?"),
    (BY_PATH, ["fit", *PATHS, "--data.batchs=3"], "has no argument 'batchs'. Did you mean batches?"),
    (FIXED, ["fit", "word"], "Unexpected: word."),
    (FIXED, ["fit", "--model.width"], "--model.width needs a value"),
    (FIXED, ["fit", "--optimizer=SGD"], "use --model.matrix_optimizer or --model.other_optimizer"),
    (FIXED, ["fit", "--optimizer.lr=1"], "use --model.matrix_optimizer or --model.other_optimizer"),
    (BARE, ["fit", "--lr_scheduler=StepLR"], "use --schedule"),
    (FIXED, ["fit", "--model.width=wide"], "model.width must be of type int, got 'wide'"),
    (BY_PATH, ["fit", *PATHS, "--model.width=wide"], "model.width must be of type int, got 'wide'"),
    (FIXED, ["fit", "--trainer.max_steps=many"], "trainer.max_steps must be of type int, got 'many'"),
    (FIXED, ["fit", "--trainer.precision=bf17"], "got 'bf17'. Did you mean bf16?"),
    (FIXED, ["fit", "--trainer.strategy=dpp"], "No strategy 'dpp'. Did you mean ddp?"),
    (FIXED, ["fit", "--trainer.accelerator=gppu"], "No accelerator 'gppu'. Did you mean gpu?"),
    (FIXED, ["fit", "--trainer.logger=TensorBordLogger"], "No logger 'TensorBordLogger'. Did you mean TensorBoard"),
    (FIXED, ["fit", "--trainer.callbacks=LearningRateMonitr"], "No callback 'LearningRateMonitr'. Did you mean Learn"),
    (FIXED, ["fit", "--trainer.callbacks+=SpectralNormMonitr"], "Did you mean SpectralNormMonitor?"),
    (
        FIXED,
        ["fit", "--trainer.callbacks+=SpectralNormMonitor", "--trainer.callbacks.every_n_step=3"],
        "SpectralNormMonitor has no argument 'every_n_step'. Did you mean every_n_steps?",
    ),
    (BY_PATH, ["fit", "--model=Nett"], "model: No model 'Nett'. Did you mean Net?"),
    (BY_PATH, ["fit", f"--model={HELPERS}.Nett"], f"No model 'Nett' in {HELPERS}. Did you mean {HELPERS}.Net?"),
    (
        FIXED,
        ["fit", "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoin"],
        "Did you mean lightning.pytorch.callbacks.ModelCheckpoint?",  # not the module model_checkpoint beside it
    ),
    (FIXED, ["fit", "--model.matrix_optimizer=torch.optimm.AdamW"], "Did you mean torch.optim?"),
    (BY_PATH, ["fit", "--model=tests.lightning_helper.Net"], f"Did you mean {HELPERS}?"),
    (BY_PATH, ["fit", "--model=testz.lightning_helpers.Net"], "No module 'testz'"),
    (BY_PATH, ["fit", PATHS[0], "--data=Itemz"], "data: No data module 'Itemz'. Did you mean Items?"),
    (BY_PATH, ["fit", "--model=torch.nn.Linear"], "torch.nn.Linear is no model: it is not a subclass of Lightning"),
    (BY_PATH, ["fit", PATHS[1]], "Needed: model. Give --model CLASS"),
    ((NeedsItems, Items), ["fit"], "Needed: model.num_items. Give --model.num_items VALUE"),
    (BY_PATH, ["fit", f"--model={HELPERS}.NeedsItems"], f"{HELPERS}.NeedsItems needs model.num_items"),
]


@pytest.mark.parametrize(("classes", "args", "expected"), OPTIONS, ids=[" ".join(case[1])[-50:] for case in OPTIONS])
def test_options_classes_and_values(classes, args, expected, capsys):
    assert expected in refusal(capsys, classes, *args)


SETTINGS = [
    (["matrix_optimizer=Moun"], "matrix_optimizer: No optimizer 'Moun'. Did you mean Muon?"),
    (["matrix_optimizer=lightning_muon.Moun"], "No optimizer 'Moun' in lightning_muon. Did you mean lightning_muon.Mu"),
    (["matrix_optimizer=torch.optim.AdamWW"], "No optimizer 'AdamWW' in torch.optim. Did you mean torch.optim.AdamW?"),
    (["schedule=lightning_muon.schedules.Cosin"], "Did you mean lightning_muon.schedules.Cosine?"),
    (["other_optimizer=AdmW"], "other_optimizer: No optimizer 'AdmW'. Did you mean AdamW?"),
    (["schedule=Cosin"], "schedule: No schedule 'Cosin'. Did you mean Cosine?"),
    (["schedule.warmup=3"], "schedule needs a class before its arguments"),
    (["matrix_optimizer.lrr=3"], "matrix_optimizer: lightning_muon.Muon has no argument 'lrr'. Did you mean lr?"),
    (["matrix_optimizer=NorMuon", "matrix_optimizer.lrr=3"], "lightning_muon.NorMuon has no argument 'lrr'"),
    (["other_optimizer.weight_dacay=3"], "torch.optim.AdamW has no argument 'weight_dacay'. Did you mean weight_decay"),
    (["schedule=Cosine", "schedule.warmpu=3"], "Cosine has no argument 'warmpu'. Did you mean warmup?"),
    (["matrix_optimizer.lr=fast"], "matrix_optimizer.lr must be of type float, got 'fast'"),
    (["matrix_optimizer=NorMuon", "matrix_optimizer.lr=fast"], "matrix_optimizer.lr must be of type float, got 'fast'"),
    (["matrix_optimizer=Muon", "matrix_optimizer.method=polar"], "method must be one of jordan, polar_express,"),
    (["parameter_rules=[{patern: a, group: other}]"], "ParameterRule has no argument 'patern'. Did you mean pattern?"),
    (["parameter_rules=[{role: embeding, group: other}]"], "got 'embeding'. Did you mean embedding?"),
]


@pytest.mark.parametrize(("options", "expected"), SETTINGS, ids=[" ".join(case[0]) for case in SETTINGS])
@pytest.mark.parametrize("way", ["model, class", "model, class path", "top level"])
def test_our_settings(way, options, expected, capsys):
    classes = {"model, class": FIXED, "model, class path": BY_PATH, "top level": BARE}[way]
    prefix = "--" if way == "top level" else "--model."
    paths = PATHS if classes is BY_PATH else ()
    assert expected in refusal(capsys, classes, "fit", *paths, *(f"{prefix}{option}" for option in options))


def test_an_experimental_rule_is_given_by_its_path():
    """In a process of its own: once a class is imported, its name is enough."""
    command = [sys.executable, "-m", "lightning_muon", "fit", *PATHS, "--model.matrix_optimizer=SpecMuon"]
    printed = subprocess.run(command, capture_output=True, text=True).stderr
    assert "No optimizer 'SpecMuon'. Did you mean lightning_muon.experimental.SpecMuon?" in printed


KEYS = [
    ({"widht": 3}, "Did you mean"),
    ({"matrix_optimizer": {"class_path": "lightning_muon.Moun"}}, "Did you mean lightning_muon.Muon?"),
    ({"matrix_optimizer": {"class_path": "Muon", "init_args": {"lrr": 1}}}, "has no argument 'lrr'. Did you mean lr?"),
    ({"matrix_optimizer": {"class_path": "Muon", "lr": 1}}, "put the rest under init_args"),
    ({"matrix_optimizer": {"class_pth": "Muon"}}, "No key 'class_pth'. Did you mean class_path?"),
    ({"matrix_optimizer": {"class_path": "Muon", "init_args": {"lr": "fast"}}}, "lr must be of type float, got 'fast'"),
    ({"parameter_rules": [{"patern": "a"}]}, "has no argument 'patern'. Did you mean pattern?"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("settings", "expected"), KEYS, ids=[str(case[0])[:50] for case in KEYS])
def test_keys_of_a_config(settings, expected, by_path, tmp_path, capsys):
    path = config(tmp_path, of_model(settings, by_path))
    assert expected in refusal(capsys, BY_PATH if by_path else FIXED, "fit", "-c", path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"modle": {"width": 3}}, "No setting 'modle.width'. Did you mean model.width?"),
        ({"trainer": {"max_epoch": 3}}, "No setting 'trainer.max_epoch'. Did you mean trainer.max_epochs?"),
        ({"trainer": {"callbacks": [{"class_path": "lightning_muon.callbacks.X"}]}}, "No callback 'X' in"),
        ({"optimizer": {"class_path": "torch.optim.Adam"}}, "use --model.matrix_optimizer or"),
        ("model: {width: 3\n", "not valid YAML"),
        ("- 1\n", "must hold settings"),
    ],
)
def test_configs(content, expected, tmp_path, capsys):
    assert expected in refusal(capsys, FIXED, "fit", "-c", config(tmp_path, content))


def test_a_config_before_the_subcommand(tmp_path, capsys):
    path = config(tmp_path, {"fit": {"model": {"widht": 3}}})
    assert "Did you mean model.width?" in refusal(capsys, FIXED, "-c", path, "fit")


def test_a_config_that_does_not_exist(tmp_path, capsys):
    config(tmp_path, {})
    assert f"Did you mean {tmp_path}/c.yaml?" in refusal(capsys, FIXED, "fit", "-c", tmp_path / "c.yml")
    assert "no folder" in refusal(capsys, FIXED, "fit", "-c", tmp_path / "configs" / "c.yaml")
    assert "is a folder" in refusal(capsys, FIXED, "fit", "-c", tmp_path)


def test_several_errors(capsys):
    words = ["--modle.width=3", "--trainer.max_epoch=3", *(f"--zzz{n}" for n in range(9))]
    printed = refusal(capsys, FIXED, "fit", *words)
    assert "--model.width?" in printed
    assert "--trainer.max_epochs?" in printed
    assert "There are 7 more." in printed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import no_such_package_xyz\n", "ModuleNotFoundError: No module named 'no_such_package_xyz'"),
        ("\nraise RuntimeError('licence expired')\n", "RuntimeError: licence expired"),
        ("class Model(\n", "SyntaxError"),
    ],
)
@pytest.mark.parametrize("in_yaml", [False, True])
def test_a_module_that_fails_to_import(source, expected, in_yaml, tmp_path, capsys, monkeypatch):
    name = f"failing_{abs(hash(source))}_{in_yaml}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = config(tmp_path, {"model": {"class_path": f"{name}.Model"}})
    args = ["-c", path] if in_yaml else [f"--model={name}.Model"]
    printed = refusal(capsys, BY_PATH, "fit", *args)
    assert f"model: {name}.Model cannot be imported" in printed
    assert expected in printed
    assert f"{name}.py, line {2 if source.startswith(chr(10)) else 1}" in printed


def test_a_config_of_a_command_line_with_fixed_classes(tmp_path, capsys):
    path = config(tmp_path, {"model": {"width": 3}, "data": None, "optimizer": None, "lr_scheduler": None})
    printed = refusal(capsys, BY_PATH, "fit", "-c", path)
    assert "change one word in main.py: LightningCLI to MuonCLI" in printed
    cli = MuonCLI(Net, args=["-c", str(path)], run=False, save_config_callback=None, trainer_defaults=QUIET)
    assert cli.model.layers.up.weight.shape[1] == 3  # after that change it is taken as it is


@pytest.mark.parametrize("module", ["BoringModel", "BoringDataModule"])
def test_modules_of_pytorch_lightning_are_refused_by_name(module, capsys):
    path = f"pytorch_lightning.demos.boring_classes.{module}"
    option = f"--data={path}" if "Data" in module else f"--model={path}"
    printed = refusal(capsys, BY_PATH, "fit", *(PATHS[:1] if "Data" in module else ()), option)
    assert f"{module} is a " in printed
    assert "import lightning.pytorch as pl" in printed
    assert "pytorch_lightning's own Trainer and callbacks=[lightning_muon.UseMuon(...)]." in printed


def test_classes_of_pytorch_lightning_are_refused_in_python_too():
    boring = pytest.importorskip("pytorch_lightning.demos.boring_classes")
    for classes in ((boring.BoringModel,), (Net, boring.BoringDataModule)):
        with pytest.raises(TypeError, match="of the package pytorch_lightning, and this command line has the Trainer"):
            MuonCLI(*classes, args=["fit"])


def test_the_whole_report_stays_reachable(monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_MUON_FULL_ERRORS", "1")
    with pytest.raises(SystemExit):
        MuonCLI(*FIXED, args=["fit", "--model.matrix_optimizer=Moun"], trainer_defaults=QUIET)
    assert "Does not validate against any of the Union subtypes" in capsys.readouterr().err


def test_a_report_that_is_not_known_is_shown_as_it_is():
    """Messages of constructors are shown in full, without the layers around them."""
    report = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class '
        "'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]\n  Errors:\n    - Problem with given "
        "class_path 'a.B':\n        first line\n        second line\n    - Expected a <class 'NoneType'>\n  Given "
        "value type: <class 'str'>\n  Given value: a.B"
    )
    problem = read_report(report)
    assert (problem.key, problem.owner, problem.text) == ("model", "a.B", "first line\nsecond line")
    assert problem.kinds == (LightningModule,)


# Refused while the run is set up


REFUSED = [
    (
        ["--model.parameter_rules=[{pattern: layers.upp.*, group: other}]"],
        "matches no parameter. Near names: layers.up",
    ),
    (["--model.schedule=Cosine", "--model.schedule.warmup=-1"], "warmup must be 0 or more, got -1"),
    (
        ["--model.matrix_optimizer.lr=-1"],
        "error: matrix_optimizer (Muon): lr must be a finite number of 0 or more, got -1",
    ),
    (["--model.other_optimizer.lr=-1"], "error: other_optimizer (AdamW): Invalid learning rate: -1"),
    (["--model.parameter_rules=[{group: other}]"], "selects nothing: give it a pattern"),
    (["--trainer.callbacks+=SpectralNormMonitor", "--trainer.callbacks.every_n_steps=0"], "every_n_steps must be an"),
    (["--schedule=Cosine"], "use --model.schedule"),
    (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=[" ".join(case[0])[:50] for case in REFUSED])
def test_what_is_refused_later_ends_without_a_traceback(options, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *options])
    with pytest.raises(SystemExit) as error:
        MuonCLI(*FIXED, save_config_callback=None, trainer_defaults=QUIET)
    assert error.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "Union" not in line


@pytest.mark.parametrize("by_path", [False, True], ids=["class", "class path"])
@pytest.mark.parametrize(("model", "takes"), [("Net", True), ("TakesNoSettings", False)])
def test_settings_at_the_top_level_for_a_module_with_the_mixin(model, takes, by_path):
    """The advice about its __init__ is given only if it does not pass settings on."""
    classes = BY_PATH if by_path else ({"Net": Net, "TakesNoSettings": TakesNoSettings}[model], Items)
    paths = (f"--model={HELPERS if takes else __name__}.{model}", PATHS[1]) if by_path else ()
    with pytest.raises(ValueError, match=r"use --model\.matrix_optimizer ") as error:
        MuonCLI(
            *classes,
            args=["fit", *paths, "--matrix_optimizer=Muon"],
            save_config_callback=None,
            trainer_defaults=QUIET,
        )
    key = "model.init_args.matrix_optimizer" if by_path else "model.matrix_optimizer"
    assert f"({key} in YAML)." in str(error.value)
    assert ("has to pass **kwargs to super().__init__" in str(error.value)) is not takes


class TakesNoSettings(Net):
    """Passes no settings on to the mixin."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)


def test_in_python_it_is_raised_without_layers_around_it():
    with pytest.raises(ValueError, match=r"^warmup must be 0 or more, got -1"):
        MuonCLI(*FIXED, args=["fit", *REFUSED[1][0]], save_config_callback=None, trainer_defaults=QUIET)


class Faulty(Net):
    """Raises an error that is not about settings."""

    def training_step(self, batch, batch_idx):
        raise ValueError("a fault of the user's")


def test_a_fault_in_the_users_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--trainer.max_steps=1"])
    with pytest.raises(ValueError, match="a fault of the user's"):
        MuonCLI(Faulty, Items, save_config_callback=None, trainer_defaults=QUIET)


def test_the_console_script_says_it_in_the_same_way(capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--model=tests.lightning_helpers.Nett"])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "Did you mean tests.lightning_helpers.Net?" in printed
    assert "`lightning-muon fit --help`" in printed
