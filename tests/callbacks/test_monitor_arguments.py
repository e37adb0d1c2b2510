"""What monitors refuse and warn of, and the ways to set them up: YAML, shell, copies, several of a kind."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon import ParameterRule
from lightning_muon import cli as cli_module
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.callbacks.monitor_runs import CLOCKED, QUANTITIES, Plain, Recorder, monitors, table_rows, watched
from tests.lightning_helpers import QUIET, Items, Net, fit, trainer

HELPERS = "tests.lightning_helpers"
KINDS = (SpectralNormMonitor, UpdateOrthogonalityMonitor, EffectiveRankMonitor)
CLOCKS = (UpdateOrthogonalityMonitor, EffectiveRankMonitor)
REFUSED = (MisconfigurationException, TypeError)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


# Refused at construction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -1])
def test_a_clock_must_be_positive(kind: type[pl.Callback], value: int) -> None:
    with pytest.raises(MisconfigurationException, match=rf"(?s)every_n_steps.*{value}\b"):
        kind(every_n_steps=value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [True, 2.0, "10", [10]])
def test_a_clock_must_be_an_integer(kind: type[pl.Callback], value: Any) -> None:
    with pytest.raises(REFUSED) as error:
        kind(every_n_steps=value)
    assert "every_n_steps" in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("kind", CLOCKS)
def test_the_spectrum_clock_must_be_zero_or_positive(kind: type[pl.Callback]) -> None:
    with pytest.raises(MisconfigurationException, match=r"spectrum_every_n_steps.*-1"):
        kind(spectrum_every_n_steps=-1)
    for value in (True, 5.0, "5"):
        with pytest.raises(REFUSED, match="spectrum_every_n_steps"):
            kind(spectrum_every_n_steps=value)
    kind(spectrum_every_n_steps=0)


@pytest.mark.parametrize("kind", CLOCKS)
def test_the_spectrum_clock_must_be_a_multiple_of_the_other(kind: type[pl.Callback]) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)spectrum_every_n_steps.*15.*10|10.*15"):
        kind(every_n_steps=10, spectrum_every_n_steps=15)
    with pytest.raises(MisconfigurationException, match="spectrum_every_n_steps"):
        kind(every_n_steps=10, spectrum_every_n_steps=5)
    kind(every_n_steps=10, spectrum_every_n_steps=30)


def test_spectral_norms_have_no_spectrum_clock() -> None:
    with pytest.raises(TypeError, match="spectrum_every_n_steps"):
        SpectralNormMonitor(spectrum_every_n_steps=10)


@pytest.mark.parametrize("quantile", [-0.1, 1.0, 1.5, float("nan")])
def test_a_quantile_lies_in_its_range(quantile: float) -> None:
    with pytest.raises(MisconfigurationException, match="quantile") as error:
        UpdateOrthogonalityMonitor(quantile=quantile)
    assert str(quantile) in str(error.value)


@pytest.mark.parametrize("quantile", [True, "0.1", None])
def test_a_quantile_is_a_number(quantile: Any) -> None:
    with pytest.raises(REFUSED, match="quantile"):
        UpdateOrthogonalityMonitor(quantile=quantile)


def test_the_smallest_singular_value_is_a_quantile() -> None:
    UpdateOrthogonalityMonitor(quantile=0)
    UpdateOrthogonalityMonitor(quantile=0.0)


@pytest.mark.parametrize("kind", CLOCKS)
@pytest.mark.parametrize("name", ["max_spectrum_size", "max_spectra"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, "64", None])
def test_limits_of_spectra_are_positive_integers(kind: type[pl.Callback], name: str, value: Any) -> None:
    with pytest.raises(REFUSED) as error:
        kind(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize("value", ["*.weight", [1], 3])
def test_globs_are_lists_of_strings(kind: type[pl.Callback], name: str, value: Any) -> None:
    """A string alone would be read letter by letter."""
    with pytest.raises(REFUSED, match=name):
        kind(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_to_include_nothing_is_refused(kind: type[pl.Callback]) -> None:
    with pytest.raises(MisconfigurationException, match="include"):
        kind(include=[])


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_argument_is_refused(kind: type[pl.Callback]) -> None:
    with pytest.raises(TypeError, match="every_n_step"):
        kind(every_n_step=10)


# Refused when a fit starts


@pytest.mark.parametrize("kind", KINDS)
def test_values_reach_loggers_on_a_clock_that_the_trainer_does_not_share(kind: type[pl.Callback]) -> None:
    _, recorder = watched(Net(), [kind(every_n_steps=3)], log_every_n_steps=2, max_steps=9, max_epochs=-1)
    first = next(key for step, key in recorder.values())
    assert recorder.steps(first) == [2, 5, 8]


@pytest.mark.parametrize("kind", CLOCKS)
def test_a_spectrum_clock_out_of_step_with_the_trainers_is_refused(kind: type[pl.Callback]) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)spectrum_every_n_steps.*15.*10"):
        watched(Net(), [kind(spectrum_every_n_steps=15)], log_every_n_steps=10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused_with_near_names(kind: type[pl.Callback], name: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"layers\.upp\.weight") as error:
        watched(Net(), [kind(**{name: ["layers.upp.weight"]})])
    assert name in str(error.value)
    assert "layers.up.weight" in str(error.value)


def test_one_glob_of_several_that_matches_nothing_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"\*\.gate\.weight"):
        watched(Net(), [SpectralNormMonitor(include=["*.up.weight", "*.gate.weight"])])


# Not refused


def test_without_clocks_of_their_own_they_follow_the_trainer() -> None:
    _, recorder = watched(Net(), monitors(), log_every_n_steps=2, max_steps=45)
    assert recorder.steps("spectral_norm/mean") == list(range(1, 45, 2))
    assert recorder.steps("effective_rank/mean") == [19, 39]


def test_spectra_can_be_turned_off() -> None:
    _, recorder = watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=0), max_steps=11)
    logged = {key.split("/")[0] for _, key in recorder.values()}
    assert logged == QUANTITIES - CLOCKED


def test_a_clock_between_logging_steps_will_do_without_loggers(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = monitors(every_n_steps=3, plot=True)
        assert fit(Net(), callbacks=callbacks, log_every_n_steps=10, max_steps=7).global_step == 7
    assert {row["step"] for row in table_rows(folder)} <= {"2", "5"}


def test_a_trainer_that_logs_nothing_still_trains() -> None:
    fitted, recorder = watched(Net(), monitors(), log_every_n_steps=0)
    assert fitted.global_step == 5
    assert recorder.values() == {}


def test_a_development_run_writes_nothing(folder: Path) -> None:
    callbacks = monitors(every_n_steps=1, plot=True, print_table=True)
    pl.Trainer(accelerator="cpu", fast_dev_run=True, log_every_n_steps=1, callbacks=callbacks).fit(
        Plain(), datamodule=Items()
    )
    assert list(folder.iterdir()) == []


def test_evaluation_alone_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(folder)
    evaluator = trainer(callbacks=monitors(plot=True, print_table=True), logger=recorder, limit_val_batches=2)
    evaluator.validate(Net(), datamodule=Items(), verbose=False)
    evaluator.test(Net(), datamodule=Items(), verbose=False)
    assert recorder.values() == {}
    assert list(folder.iterdir()) == []
    assert "spectral" not in capsys.readouterr().out


def test_a_fit_that_takes_no_step_does_nothing(folder: Path) -> None:
    recorder = Recorder(folder)
    watched(Net(), monitors(every_n_steps=1, plot=True, print_table=True), logger=recorder, max_steps=0)
    assert recorder.values() == {}
    assert table_rows(folder) == []


def test_without_logger_there_is_one_warning_and_the_fit_goes_on() -> None:
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = fit(Net(), callbacks=monitors(every_n_steps=1, print_table=True), logger=False)
        assert fitted.global_step == 5
        about = [str(warning.message) for warning in caught if "logger" in str(warning.message).lower()]
        about = [message for message in about if "litlogger" not in message]
        assert len(about) == 1, about


def test_with_a_logger_there_is_no_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched(Net(), monitors(every_n_steps=1, spectrum_every_n_steps=1, plot=True), max_steps=10)
    ours = [str(warning.message) for warning in caught if "onitor" in str(warning.message)]
    assert ours == []


# Several of a kind


def steps_of(recorder: Recorder, quantity: str) -> dict[str, list[int]]:
    """At which steps a quantity of each matrix was logged, under whatever key of its own each instance has."""
    steps: dict[str, list[int]] = {}
    for step, row in recorder.rows:
        for key in row:
            if key.startswith(quantity) and key.endswith(".weight"):
                steps.setdefault(key.split("/")[1], []).append(step)
    return steps


def test_two_of_a_kind_watch_different_matrices(folder: Path) -> None:
    common = {"every_n_steps": 1, "per_parameter": True, "print_table": False}
    pair = [SpectralNormMonitor(include=[f"layers.{name}.weight"], **common) for name in ("up", "down")]
    _, recorder = watched(Net(), pair, logger=Recorder(folder), max_steps=3)
    assert steps_of(recorder, "spectral_norm") == {"layers.up.weight": [0, 1, 2], "layers.down.weight": [0, 1, 2]}
    means = {key for _, row in recorder.rows for key in row if key.startswith("spectral") and key.endswith("/mean")}
    assert len(means) == 2
    assert "spectral_norm/mean" in means
    assert sorted(row["matrix"] for row in table_rows(folder)) == ["layers.down.weight"] * 3 + ["layers.up.weight"] * 3


def test_two_of_a_kind_run_on_different_clocks() -> None:
    common = {"per_parameter": True, "print_table": False}
    pair: list[pl.Callback] = [
        EffectiveRankMonitor(include=["*.up.weight"], every_n_steps=2, **common),
        EffectiveRankMonitor(include=["*.down.weight"], every_n_steps=5, **common),
    ]
    _, recorder = watched(Net(), pair, max_steps=10)
    assert steps_of(recorder, "stable_rank") == {"layers.up.weight": [1, 3, 5, 7, 9], "layers.down.weight": [4, 9]}


def test_monitors_of_different_kinds_may_run_on_different_clocks() -> None:
    callbacks: list[pl.Callback] = [
        SpectralNormMonitor(every_n_steps=2),
        UpdateOrthogonalityMonitor(every_n_steps=3, spectrum_every_n_steps=6),
        EffectiveRankMonitor(every_n_steps=4, spectrum_every_n_steps=4),
    ]
    _, recorder = watched(Net(), callbacks, max_steps=12)
    assert recorder.steps("spectral_norm/max") == [1, 3, 5, 7, 9, 11]
    assert recorder.steps("update_orthogonality_error/max") == [2, 5, 8, 11]
    assert recorder.steps("update_condition_number/max") == [5, 11]
    assert recorder.steps("stable_rank/min") == [3, 7, 11]
    assert recorder.steps("update_effective_rank/min") == [3, 7, 11]


def test_rules_say_what_the_matrices_of_a_module_without_the_mixin_are() -> None:
    rules = [ParameterRule(pattern="layers.up.weight", group="other")]
    _, recorder = watched(Plain(), monitors(every_n_steps=1, per_parameter=True, parameter_rules=rules))
    assert {key.split("/")[1] for _, key in recorder.values()} == {"mean", "max", "min", "layers.down.weight"}


@pytest.mark.parametrize("last", [0, 1])
def test_rules_of_one_monitor_do_not_change_what_another_watches(last: int) -> None:
    common = {"every_n_steps": 1, "per_parameter": True, "print_table": False, "plot": False}
    rules = [ParameterRule(pattern="layers.up.weight", split=2)]
    pair = [SpectralNormMonitor(**common), EffectiveRankMonitor(**common, parameter_rules=rules)]
    _, recorder = watched(Plain(), pair[::-1] if last else pair)
    logged = {key for _, key in recorder.values() if key.startswith(("spectral_norm/layers", "stable_rank/layers"))}
    assert logged == {
        "spectral_norm/layers.up.weight",
        "spectral_norm/layers.down.weight",
        "stable_rank/layers.up.weight.0",
        "stable_rank/layers.up.weight.1",
        "stable_rank/layers.down.weight",
    }


# Copies


def pickled(each: Any) -> Any:
    return pickle.loads(pickle.dumps(each))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_an_unused_monitor_can_be_copied(duplicate: Any) -> None:
    """Strategies that spawn processes pickle the callbacks."""
    settings = {"every_n_steps": 1, "spectrum_every_n_steps": 1, "exclude": ["*.down.weight"], "per_parameter": True}
    originals = monitors(**settings)
    copies = duplicate(originals)
    assert [each.state_key for each in copies] == [each.state_key for each in originals]
    module = Net()
    twin = copy.deepcopy(module)
    _, first = watched(module, originals)
    _, second = watched(twin, copies)
    assert first.values() == second.values() != {}


# Command line


def configuration(folder: Path, callbacks: list[Any]) -> Path:
    settings = {key: value for key, value in QUIET.items() if key != "logger"}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "run", "version": 0}}
    more = {"max_steps": 4, "log_every_n_steps": 1, "logger": logger, "callbacks": callbacks}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {**settings, **more}}))
    return path


def logged(folder: Path) -> set[str]:
    return set((folder / "run" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(","))


def test_all_three_from_yaml_by_short_name(folder: Path) -> None:
    common = {"every_n_steps": 2, "per_parameter": True, "print_table": False, "plot": False}
    more = {"spectrum_every_n_steps": 4, "max_spectra": 8, "max_spectrum_size": 512}
    callbacks = [
        {"class_path": "SpectralNormMonitor", "init_args": {**common, "include": ["layers.*.weight"]}},
        {"class_path": "UpdateOrthogonalityMonitor", "init_args": {**common, **more, "exclude": ["*.up.*"]}},
        {"class_path": "EffectiveRankMonitor", "init_args": {**common, **more, "exclude": ["*.up.*"]}},
    ]
    path = configuration(folder, callbacks)
    cli_module.main(["fit", f"--model={HELPERS}.Net", f"--data={HELPERS}.Items", "-c", str(path)])
    keys = logged(folder)
    assert {key for key in keys if key.startswith("spectral_norm/layers")} == {
        f"spectral_norm/layers.{name}.weight" for name in ("embed", "up", "down", "head")
    }
    for key in ("update_orthogonality_error", "update_condition_number", "stable_rank", "update_effective_rank"):
        assert {each for each in keys if each.startswith(f"{key}/layers")} == {f"{key}/layers.down.weight"}
        assert f"{key}/mean" in keys


def test_a_monitor_from_the_shell(folder: Path) -> None:
    path = configuration(folder, [])
    shell = ["--trainer.callbacks+=SpectralNormMonitor", "--trainer.callbacks.rms=true"]
    cli_module.main(["fit", f"--model={HELPERS}.Net", f"--data={HELPERS}.Items", "-c", str(path), *shell])
    assert logged(folder) >= {"rms_operator_norm/mean", "rms_operator_norm/max"}


def test_a_misspelt_argument_in_yaml_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configuration(folder, [{"class_path": "EffectiveRankMonitor", "init_args": {"every_n_step": 2}}])
    with pytest.raises(SystemExit):
        cli_module.main(["fit", f"--model={HELPERS}.Net", f"--data={HELPERS}.Items", "-c", str(path)])
    assert "every_n_step" in capsys.readouterr().err


def test_from_python_with_a_csv_logger_of_lightning(folder: Path) -> None:
    logger = CSVLogger(folder, name="run", version=0)
    fit(Net(), callbacks=monitors(every_n_steps=1), logger=logger, log_every_n_steps=1)
    assert logged(folder) >= {"spectral_norm/mean", "update_orthogonality_error/max", "stable_rank/min"}
