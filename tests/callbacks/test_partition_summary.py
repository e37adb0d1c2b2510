"""PartitionSummary: the table at fit start."""

from lightning_muon import ParameterRule
from lightning_muon.callbacks import PartitionSummary
from tests.lightning_helpers import Bare, Net, WithOptimizer, fit, trainer


def test_prints_the_table_when_a_fit_starts(capsys):
    fit(Net(), callbacks=[PartitionSummary()])
    printed = capsys.readouterr().out
    assert printed.count("layers.up.weight") == 1
    assert "matrix" in printed
    assert "other" in printed


def test_shows_the_modules_own_rules(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    fit(
        Net(parameter_rules=[ParameterRule(role="embedding", name="tables", options={"lr": 0.5})]),
        callbacks=[PartitionSummary()],
    )
    assert "tables" in capsys.readouterr().out


def test_any_module_and_rules_of_its_own(capsys):
    rules = [ParameterRule(pattern="layers.*", group="other")]
    PartitionSummary(rules).show(Bare())
    assert "other/hidden" in capsys.readouterr().out
    fit(WithOptimizer(), callbacks=[PartitionSummary()])
    assert "layers.up" in capsys.readouterr().out


def test_is_silent_on_other_ranks(capsys, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    PartitionSummary().show(Net())
    assert not capsys.readouterr().out


def test_says_nothing_outside_fit(capsys):
    quiet = trainer(callbacks=[PartitionSummary()])
    quiet.validate(Net(), [], verbose=False)
    assert "layers.up" not in capsys.readouterr().out
