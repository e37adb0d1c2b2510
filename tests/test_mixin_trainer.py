"""Features of the Trainer with the mixin: clipping, accumulation, precision, callbacks, resume, compile."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_muon import HybridOptimizer, Muon, MuonMixin, ParameterRule
from lightning_muon.schedules import Cosine
from tests.lightning_helpers import NUM_ITEMS, Bare, Items, Layers, Net, assert_same, fit, weights


def make(**kwargs) -> Net:
    """A module with the same initial weights each time, and learning rates so large that a few steps matter."""
    torch.manual_seed(3)
    settings = {"matrix_optimizer": partial(Muon, lr=0.02), "other_optimizer": partial(torch.optim.AdamW, lr=0.005)}
    return Net(**{**settings, **kwargs})


def plain_loop(steps, accumulate=1, clip=None):
    """The weights after a plain torch loop."""
    module = make()
    optimizer = module.configure_optimizers()
    batches = iter(Items(steps * accumulate).train_dataloader())
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            (module.training_step(next(batches), 0) / accumulate).backward()
        if clip is not None:
            # Lightning sums the norm in the order of the param groups
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
    return weights(module)


class Recorder(pl.Callback):
    """Weights after each batch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(weights(pl_module))


def loss_of(module):
    with torch.no_grad():
        return sum(float(module.training_step(batch, 0)) for batch in Items().train_dataloader())


def test_gradient_clip_val_clips_all_groups_together():
    module = make()
    fit(module, gradient_clip_val=0.05)
    assert_same(weights(module), plain_loop(5, clip=0.05))
    assert not torch.equal(module.layers.embed.weight, plain_loop(5)["layers.embed.weight"])


def test_accumulate_grad_batches_steps_once_for_several_batches():
    module = make()
    fitted = fit(module, Items(6), max_steps=3, accumulate_grad_batches=2)
    assert fitted.global_step == 3
    assert_same(weights(module), plain_loop(3, accumulate=2))


def test_bf16_mixed_keeps_weights_and_state_in_float32():
    module = make()
    before = loss_of(module)
    fitted = fit(module, precision="bf16-mixed", max_steps=20, max_epochs=-1)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert fitted.optimizers[0].state[module.layers.up.weight]["momentum_buffer"].dtype == torch.float32
    assert loss_of(module) < 0.8 * before


def test_bf16_true_trains_and_keeps_muons_momentum_in_float32():
    module = make()
    before = loss_of(module)
    fitted = fit(module, precision="bf16-true", max_steps=20, max_epochs=-1)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert fitted.optimizers[0].state[module.layers.up.weight]["momentum_buffer"].dtype == torch.float32
    assert loss_of(module) < 0.8 * before


def test_16_mixed_skips_the_step_with_infinite_gradients_and_goes_on():
    class Explodes(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    torch.manual_seed(3)
    module = Explodes()
    recorder = Recorder()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    fitted = fit(module, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler), callbacks=[recorder])
    first, second, third, fourth, last = recorder.weights
    assert not torch.equal(first["layers.up.weight"], second["layers.up.weight"])
    assert_same(second, third)
    for later, earlier in ((fourth, third), (last, fourth)):
        assert all(value.isfinite().all() for value in later.values())
        assert all(not torch.equal(later[name], earlier[name]) for name in later)
    assert scaler.get_scale() == 8.0
    assert fitted.global_step == 5


@pytest.mark.parametrize("schedule", [None, Cosine(warmup=2)], ids=["constant", "scheduled"])
def test_learning_rate_monitor_names_every_group(schedule, tmp_path):
    monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
    rules = [ParameterRule(role="embedding", options={"lr": 0.1})]
    module = make(schedule=schedule, parameter_rules=rules, matrix_optimizer=partial(Muon, lr=0.02, momentum=0.93))
    fitted = fit(module, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    names = [group["name"] for group in fitted.optimizers[0].param_groups]
    assert "matrix" in names
    assert any(name.startswith("other/") for name in names)
    prefix = "lr-HybridOptimizer" if schedule is None else "lr"
    assert set(monitor.lrs) == {f"{prefix}/{name}" for name in names}
    momenta = {key.split("/", 1)[1]: value for key, value in monitor.last_momentum_values.items()}
    assert momenta["matrix-momentum"] == 0.93
    assert {value for key, value in momenta.items() if key.startswith("other")} == {0.9}


def test_learning_rate_monitor_without_momentum_logs_the_rates_of_both(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    fit(make(schedule=Cosine()), callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    expected = [Cosine().at_step(step, 5) for step in range(5)]
    assert monitor.lrs["lr/matrix"] == pytest.approx([0.02 * m for m in expected])
    others = [rates for name, rates in monitor.lrs.items() if name.startswith("lr/other")]
    assert others
    assert all(rates == pytest.approx([0.005 * m for m in expected]) for rates in others)


def test_resume_at_an_epoch_end_is_exact(tmp_path):
    def run(ckpt_path=None):
        module = make(schedule=Cosine(warmup=3, final=0.1))
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False)
        fitted = pl.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[checkpoint],
        )
        fitted.fit(module, datamodule=Items(), ckpt_path=ckpt_path)
        return module, fitted

    module, fitted = run()
    resumed, resumed_fit = run(tmp_path / "epoch=1.ckpt")
    assert_same(weights(resumed), weights(module))
    for parameter, again in zip(module.parameters(), resumed.parameters(), strict=True):
        state, state_again = fitted.optimizers[0].state[parameter], resumed_fit.optimizers[0].state[again]
        assert state.keys() == state_again.keys()
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(state_again[key])) for key in state)


def test_checkpoint_of_another_partition_is_refused_and_names_what_moved(tmp_path):
    fit(make()).save_checkpoint(tmp_path / "a.ckpt")
    moved = make(parameter_rules=[ParameterRule(pattern="layers.up.weight", group="other")])
    with pytest.raises(ValueError, match=r"another partition.*'layers\.up\.weight'.*'matrix'"):
        pl.Trainer(max_steps=7, accelerator="cpu", logger=False, enable_progress_bar=False).fit(
            moved, datamodule=Items(), ckpt_path=tmp_path / "a.ckpt"
        )


def test_ema_weight_averaging_averages_and_leaves_training_alone():
    plain, averaged = Recorder(), Recorder()
    fit(make(), callbacks=[plain])
    module = make()
    fit(module, callbacks=[averaged, EMAWeightAveraging(decay=0.5)])
    for first, second in zip(plain.weights, averaged.weights, strict=True):
        assert_same(first, second)
    expected = None
    for step in plain.weights:
        step = step["layers.up.weight"]
        expected = step if expected is None else 0.5 * expected + 0.5 * step
    assert not torch.equal(module.layers.up.weight, plain.weights[-1]["layers.up.weight"])
    torch.testing.assert_close(module.layers.up.weight.detach(), expected)


def test_training_step_that_returns_none_changes_nothing():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    recorder = Recorder()
    fit(Skips(), callbacks=[recorder])
    assert_same(recorder.weights[1], recorder.weights[2])
    assert not torch.equal(recorder.weights[2]["layers.up.weight"], recorder.weights[3]["layers.up.weight"])


class BuiltLate(MuonMixin, pl.LightningModule):
    """Has no parameters before ``configure_model``."""

    def __init__(self, compiled: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.compiled = compiled
        self.layers = None

    def configure_model(self) -> None:
        if self.layers is None:
            torch.manual_seed(3)
            self.layers = Layers(NUM_ITEMS, 8)
            if self.compiled:
                self.layers = torch.compile(self.layers, backend="eager")

    training_step = Bare.training_step


def test_configure_model_comes_before_the_partition(tmp_path):
    module, reference = BuiltLate(), make(matrix_optimizer=None, other_optimizer=None)
    fitted = fit(module)
    fit(reference)
    assert_same(weights(module), weights(reference))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(BuiltLate.load_from_checkpoint(tmp_path / "a.ckpt")), weights(module))


def test_compiled_submodule_trains_as_an_uncompiled_one_under_the_same_names():
    module, reference = BuiltLate(compiled=True), BuiltLate()
    fitted = fit(module)
    expected = fit(reference).optimizers[0].param_groups
    groups = fitted.optimizers[0].param_groups
    assert [group["param_names"] for group in groups] == [group["param_names"] for group in expected]
    assert "layers.up.weight" in groups[-1]["param_names"]
    for first, second in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("schedule", [None, Cosine(warmup=2)], ids=["constant", "scheduled"])
def test_backbone_finetuning_unfreezes_into_the_right_optimizers(schedule):
    class Finetuned(MuonMixin, pl.LightningModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.embed = nn.Embedding(NUM_ITEMS, 8)
            self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.tower = nn.Linear(8, 8)
            self.head = nn.Linear(8, NUM_ITEMS)

        def training_step(self, batch, batch_idx):
            logits = self.head(self.tower(self.backbone(self.embed(batch[0]))).relu())
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    class PerEpoch(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.weights.append(weights(pl_module))

    module, recorder = Finetuned(schedule=schedule), PerEpoch()
    initial = weights(module)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    fitted = fit(module, max_steps=-1, max_epochs=3, callbacks=[finetuning, recorder])
    first, _, last = recorder.weights
    for name in ("backbone.0.weight", "backbone.2.weight", "backbone.0.bias", "backbone.2.bias"):
        assert torch.equal(initial[name], first[name]), name
        assert not torch.equal(first[name], last[name]), name
    assert not torch.equal(initial["tower.weight"], first["tower.weight"])
    optimizer = fitted.optimizers[0]
    assert isinstance(optimizer, HybridOptimizer)
    assert set(optimizer.state[module.backbone[0].weight]) == set(optimizer.state[module.tower.weight])
    assert "exp_avg" in optimizer.state[module.backbone[0].bias]
