"""Layers that join a running fit are trained, by the optimizer of their role; what is not trained is named."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_muon import MuonMixin
from lightning_muon.schedules import Constant, Linear
from tests.lightning_helpers import Bare, Items, Net, WithOptimizer, trainer, weights
from tests.ways import KINDS, WAYS, train

EVERY_WAY = pytest.mark.parametrize("way", WAYS)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
MATRICES = ("layers.up.weight", "layers.down.weight")


class Freeze(pl.Callback):
    """Frozen from the start but for the head, unfrozen in the second epoch, all or some."""

    def __init__(self, names=("up", "down", "embed"), thaw=None):
        self.names, self.thaw = names, thaw or names
        self.before = {}
        self.moved = []

    def setup(self, trainer, pl_module, stage):
        for name in self.names:
            getattr(pl_module.layers, name).requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            for name in self.thaw:
                getattr(pl_module.layers, name).requires_grad_(True)
            self.before = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.current_epoch == 1:
            now = weights(pl_module)
            self.moved.append({name for name in now if not torch.equal(now[name], self.before[name])})


def owner_of(used, parameter):
    hybrid = used.optimizers[0]
    return next(n for n, c in hybrid.optimizers.items() for g in c.param_groups for p in g["params"] if p is parameter)


@EVERY_WAY
@EVERY_KIND
def test_layers_that_a_hook_unfreezes_are_trained_from_their_first_batch(way, kind):
    freeze = Freeze()
    used = train(way, kind=KINDS[kind], callbacks=[freeze], max_epochs=2)
    assert set(MATRICES) | {"layers.embed.weight"} <= freeze.moved[0]
    layers = used.lightning_module.layers
    assert {owner_of(used, layers.up.weight), owner_of(used, layers.down.weight)} == {"matrix"}
    assert owner_of(used, layers.embed.weight) == "other"


@EVERY_WAY
@pytest.mark.parametrize("schedule", [Linear(), Constant(warmup=6)], ids=repr)
def test_they_follow_the_schedule(way, schedule):
    used = train(way, schedule=schedule, callbacks=[Freeze()], max_epochs=2)
    scheduler = used.lr_scheduler_configs[0].scheduler
    multiplier = schedule.at_step(scheduler.last_epoch, scheduler.total_steps)
    for group in used.optimizers[0].param_groups:
        peak = 0.02 if group["name"].startswith("matrix") else 0.001
        assert group["initial_lr"] == peak
        assert group["lr"] == pytest.approx(peak * multiplier)


@EVERY_WAY
@EVERY_KIND
def test_a_run_that_unfroze_resumes_as_if_it_had_not_stopped(way, kind, tmp_path):
    whole = train(way, kind=KINDS[kind], callbacks=[Freeze()], max_epochs=3)
    first = train(way, kind=KINDS[kind], callbacks=[Freeze()], max_epochs=2)
    first.save_checkpoint(tmp_path / "a.ckpt")

    # The hook has done its work before the checkpoint.
    rest = train(way, kind=KINDS[kind], max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    expected = weights(whole.lightning_module)
    for name, value in weights(rest.lightning_module).items():
        # schedule-free weights are exchanged for the checkpoint and back, which rounds
        tolerance = 1e-6 if kind == "schedulefree" else 0.0
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


class FineTuned(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 23)) if deep else nn.Linear(8, 23)


def finetuned(base, deep):
    class Net(base):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            parts = FineTuned(deep)
            self.backbone = nn.Sequential(parts.embed, parts.hidden)
            self.head = parts.head
            del self.layers

        def training_step(self, batch, batch_idx):
            items, targets = batch
            logits = self.head(self.backbone(items)).flatten(0, 1)
            return nn.functional.cross_entropy(logits, targets.flatten())

    return Net


class MixedBare(MuonMixin, Bare):
    pass


@EVERY_WAY
@pytest.mark.parametrize("deep", [True, False], ids=["deep head", "single head"])
def test_backbone_finetuning(way, deep):
    """Also from a net whose only trainable layer is a head, so that the matrix optimizer starts with nothing."""
    classes = (finetuned(MixedBare, deep), finetuned(WithOptimizer, deep))
    before = {}

    class Record(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before.update(weights(pl_module))

    used = train(
        way, classes=classes, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1), Record()], max_epochs=3
    )
    module = used.lightning_module
    assert all(not torch.equal(before[name], value) for name, value in weights(module).items())
    assert owner_of(used, module.backbone[1][0].weight) == "matrix"
    assert owner_of(used, module.backbone[0].weight) == "other"


class Adapter(nn.Module):
    """An adapter in the manner of LoRA, put in while the fit runs."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.lora_A = nn.Linear(inner.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.lora_B(self.lora_A(x))


class PutIn(pl.Callback):
    def __init__(self):
        self.before = {}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.layers.up = Adapter(pl_module.layers.up)
            self.before = weights(pl_module)


@EVERY_WAY
@EVERY_KIND
def test_layers_that_are_new_are_trained_and_named(way, kind, caplog):
    put_in = PutIn()
    with caplog.at_level(logging.INFO):
        used = train(way, kind=KINDS[kind], callbacks=[put_in], max_epochs=2)
    now = weights(used.lightning_module)
    for name in ("layers.up.lora_A.weight", "layers.up.lora_B.weight"):
        assert not torch.equal(now[name], put_in.before[name])
        assert name in caplog.text
    if kind != "schedulefree":  # which exchanges all weights at the end of the fit
        assert torch.equal(now["layers.up.inner.weight"], put_in.before["layers.up.inner.weight"])
    assert owner_of(used, used.lightning_module.layers.up.lora_A.weight) == "matrix"


@EVERY_WAY
def test_a_parameter_in_no_optimizer_is_named_once(way, recwarn):
    class Outside(pl.Callback):
        """A parameter that is put in after the batch has started."""

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if not hasattr(pl_module, "late"):
                pl_module.late = nn.Parameter(torch.ones(3))
                pl_module.late.grad = torch.ones(3)

    train(way, callbacks=[Outside()], max_epochs=2)
    (text,) = [str(w.message) for w in recwarn if "in no optimizer" in str(w.message)]
    assert "get gradients and are in no optimizer: late." in text


def test_no_hook_of_torch_stays_after_a_fit():
    from torch.nn.modules import module as torch_module

    registries = (torch_module._global_parameter_registration_hooks, torch_module._global_module_registration_hooks)
    before = [len(registry) for registry in registries]
    train("mixin", max_epochs=1)

    class Fails(pl.Callback):
        def on_train_batch_end(self, *args):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train("mixin", callbacks=[Fails()], max_epochs=1)
    assert [len(registry) for registry in registries] == before
    search = trainer(max_steps=-1, max_epochs=1)
    module = Net()
    module.lr = 0.1
    Tuner(search).lr_find(module, datamodule=Items(4), num_training=4)
    assert [len(registry) for registry in registries] == before


@EVERY_WAY
def test_nothing_is_said_of_an_ordinary_fit(way, recwarn):
    train(way, data=Items(4), max_epochs=2)
    assert not [w for w in recwarn if "no optimizer" in str(w.message)]


def test_a_layer_that_takes_anothers_place_joins_once(caplog, recwarn):
    """The number of parameters is what it was."""

    class Replaces(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.layers.up = nn.Linear(8, 16)

    caplog.set_level(logging.INFO)
    used = train("mixin", callbacks=[Replaces()], max_epochs=3)
    assert owner_of(used, used.lightning_module.layers.up.weight) == "matrix"
    joined = [line for line in caplog.messages if "were added since" in line]
    assert len(joined) == 1
    assert "layers.up.weight (matrix)" in joined[0]
    assert not [w for w in recwarn if "in no optimizer" in str(w.message)]
