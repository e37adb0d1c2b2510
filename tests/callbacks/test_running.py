"""One truth: the table, the checkpoint and the monitors show the partition of the running optimizer."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_muon import HybridOptimizer, MatrixLayout, Muon, ParameterRule, UseMuon
from lightning_muon.callbacks import PartitionSummary, SpectralNormMonitor
from tests.lightning_helpers import Bare, Net, WithOptimizer, fit

RULE = ParameterRule(pattern="layers.up.weight", group="other")
SPLIT = ParameterRule(pattern="layers.up.weight", split=2)


class RuledInCode(Bare):
    """Its rules are known to the optimizer only."""

    rules = (RULE,)

    def configure_optimizers(self):
        return HybridOptimizer.from_module(self, rules=self.rules)


class SplitInCode(RuledInCode):
    rules = (SPLIT,)


class ByHand(Bare):
    """Built without a partition."""

    def configure_optimizers(self):
        layers = self.layers
        rest = [p for name, p in self.named_parameters() if name != "layers.down.weight"]
        matrix = Muon([{"params": [layers.down.weight], "layouts": [MatrixLayout(split=(4, 4))]}], lr=0.01)
        return HybridOptimizer({"other": torch.optim.AdamW(rest), "matrix": matrix})


class OfParts(Bare):
    """Two hybrids whose partitions have names of their own."""

    automatic_optimization = False

    def configure_optimizers(self):
        rest = [p for name, p in self.named_parameters() if ".up." not in name]
        return [HybridOptimizer.from_module(self.layers.up, rules=[ParameterRule(pattern="weight", group="matrix")]),
                torch.optim.SGD(rest, 0.1)]  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


UP, DOWN = "layers.up.weight", "layers.down.weight"
CASES = {
    "mixin": (lambda: Net(parameter_rules=[RULE]), (), {DOWN: {}}),
    "UseMuon": (WithOptimizer, (partial(UseMuon, parameter_rules=[SPLIT]),), {UP: {"split": [8, 8]}, DOWN: {}}),
    "rules in code": (RuledInCode, (), {DOWN: {}}),
    "split in code": (SplitInCode, (), {UP: {"split": [8, 8]}, DOWN: {}}),
    "by hand": (ByHand, (), {DOWN: {"split": [4, 4]}}),
    "of parts": (OfParts, (), {UP: {}}),
}


def tables(module: pl.LightningModule, callbacks: list[pl.Callback], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    fit(module, callbacks=callbacks)
    return capsys.readouterr().out


def rows_with(text: str, group: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith(" ") and f" {group} " in line)


@pytest.mark.parametrize("name", CASES)
def test_the_table_shows_what_the_optimizer_does(name, capsys):
    make, callbacks, layouts = CASES[name]
    text = tables(make(), [*(kind() for kind in callbacks), PartitionSummary()], capsys)
    matrices = rows_with(text, "matrix")
    for parameter in ("up", "down"):
        assert (parameter in matrices) == (f"layers.{parameter}.weight" in layouts), text
    assert "would be" not in text
    assert "Muon(lr=" in text


@pytest.mark.parametrize("name", [name for name in CASES if name in ("mixin", "UseMuon")])
def test_the_checkpoint_has_the_layouts_of_the_optimizer(name, tmp_path):
    make, callbacks, layouts = CASES[name]
    fit(make(), callbacks=[kind() for kind in callbacks]).save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["matrix_layouts"] == layouts


def test_rules_that_change_after_the_start_do_not_change_the_checkpoint(tmp_path):
    module = Net(parameter_rules=[SPLIT])
    fitted = fit(module)
    module.parameter_rules = []
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["matrix_layouts"][UP] == {"split": [8, 8]}


@pytest.mark.parametrize("name", [name for name in CASES if name != "of parts"])
def test_the_monitors_watch_what_the_optimizer_has(name):
    make, callbacks, layouts = CASES[name]
    monitor = SpectralNormMonitor(every_n_steps=1, per_parameter=True, print_table=False, plot=False)
    fitted = fit(make(), callbacks=[*(kind() for kind in callbacks), monitor], log_every_n_steps=1)
    logged = {key.removeprefix("spectral_norm/") for key in fitted.callback_metrics if key.startswith("spectral_norm/")}
    parts = {
        f"{parameter}.{index}" if fields else parameter
        for parameter, fields in layouts.items()
        for index in range(len(fields.get("split", [1])))
    }
    assert logged - {"mean", "max", "min"} == parts


def test_a_module_without_an_optimizer_of_ours_is_shown_as_it_would_be(capsys):
    text = tables(WithOptimizer(), [PartitionSummary([RULE])], capsys)
    assert "WithOptimizer trains with SGD. With MuonMixin or UseMuon its partition would" in text
    assert "up" not in rows_with(text, "matrix")
    assert "down" in rows_with(text, "matrix")


@pytest.mark.parametrize("asked", [True, False])
def test_a_later_fit_of_another_module_shows_it_only_where_asked(asked, capsys):
    """A Trainer keeps its callbacks."""
    summary = [PartitionSummary()] if asked else []
    used = fit(Net(), enable_model_summary=True, callbacks=summary, max_steps=-1, max_epochs=1)
    assert "matrix: 2 matrices" in capsys.readouterr().out
    used.fit_loop.max_epochs = 2
    used.fit(WithOptimizer(), torch.utils.data.DataLoader([]))
    assert ("trains with SGD" in capsys.readouterr().out) == asked
    used.fit(Net(), torch.utils.data.DataLoader([]))
    assert capsys.readouterr().out.count("matrix: 2 matrices") == 1
