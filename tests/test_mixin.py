"""MuonMixin: class definition, settings, hyperparameters, and refused input."""

import copy
import math
import pickle
import warnings
from functools import partial
from types import MethodType

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from torch import nn

from lightning_muon import HybridOptimizer, Muon, MuonMixin, ParameterRule
from lightning_muon.schedules import Constant, Cosine
from tests.lightning_helpers import BATCH, LENGTH, Bare, Items, Layers, Net, assert_same, fit, trainer, weights

NAMESPACES = [pl.LightningModule, pytorch_lightning.LightningModule]


# Class definition


@pytest.mark.parametrize("base", NAMESPACES, ids=["lightning.pytorch", "pytorch_lightning"])
def test_mixin_after_lightning_module_is_refused_and_the_mend_named(base):
    with pytest.raises(TypeError, match=r"Write `class Wrong\(MuonMixin, LightningModule\)`"):

        class Wrong(base, MuonMixin):
            pass


@pytest.mark.parametrize("base", NAMESPACES, ids=["lightning.pytorch", "pytorch_lightning"])
def test_mixin_after_an_indirect_base_is_refused(base):
    class Base(base):
        pass

    with pytest.raises(TypeError, match=r"before LightningModule .* Write `class Wrong\(MuonMixin, Base\)`"):

        class Wrong(Base, MuonMixin):
            pass


def test_mixin_is_no_lightning_module_and_may_be_inherited():
    assert not issubclass(MuonMixin, nn.Module)

    class Child(Net):
        pass

    assert isinstance(Child().configure_optimizers(), HybridOptimizer)


def test_a_module_that_skips_the_mixins_init_trains_with_the_defaults():
    class Skips(MuonMixin, Bare):
        def __init__(self):
            Bare.__init__(self)

    module = Skips()
    fit(module)
    optimizer = Skips().configure_optimizers()
    assert isinstance(optimizer.optimizers["matrix"], Muon)
    assert isinstance(optimizer.optimizers["other"], torch.optim.AdamW)


def test_pytorch_lightning_modules_train_too():
    class OldNamespace(MuonMixin, pytorch_lightning.LightningModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()
            self.layers = Layers(23, 8)

        training_step = Bare.training_step

    module = OldNamespace(matrix_optimizer=partial(Muon, lr=0.02), schedule=Cosine(warmup=2))
    assert not module.hparams
    before = weights(module)
    old = pytorch_lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    old.fit(module, Items().train_dataloader())
    assert [group["name"] for group in old.optimizers[0].param_groups][-1] == "matrix"
    assert all(not torch.equal(before[name], value) for name, value in weights(module).items())


# Settings


def test_settings_reach_the_optimizer():
    module = Net(
        matrix_optimizer=partial(Muon, lr=0.02),
        other_optimizer=partial(torch.optim.SGD, lr=0.5),
        parameter_rules=[ParameterRule(pattern="layers.up.weight", group="other")],
    )
    children = module.configure_optimizers().optimizers
    assert isinstance(children["other"], torch.optim.SGD)
    assert children["matrix"].param_groups[0]["lr"] == 0.02
    assert children["matrix"].param_groups[0]["params"] == [module.layers.down.weight]
    assert module.partition()["layers.up.weight"].group == "other"


def test_any_optimizer_may_take_the_matrices():
    module = Net(matrix_optimizer=partial(torch.optim.AdamW, lr=0.1), other_optimizer=torch.optim.AdamW)
    fit(module)
    groups = {group["name"]: group for group in module.configure_optimizers().param_groups}
    assert groups["matrix"]["lr"] == 0.1
    assert len(groups["matrix"]["params"]) == 2


def test_schedule_moves_every_group_and_is_stepped_each_step():
    module = Net(
        matrix_optimizer=partial(Muon, lr=0.02),
        other_optimizer=partial(torch.optim.AdamW, lr=0.001),
        schedule=Cosine(warmup=2),
    )
    seen = []

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([(group["name"].split("/")[0], group["lr"]) for group in optimizer.param_groups])

    fit(module, max_steps=5, callbacks=[Record()])
    expected = [Cosine(warmup=2).at_step(step, 5) for step in range(5)]
    for rates, multiplier in zip(seen, expected, strict=True):
        assert {name for name, _ in rates} == {"matrix", "other"}
        for name, lr in rates:
            assert lr == pytest.approx(multiplier * {"matrix": 0.02, "other": 0.001}[name])


# Hyperparameters and checkpoints of modules constructed from Python


def test_settings_stay_out_of_hparams_and_the_module_loads(tmp_path):
    module = Net(
        width=12,
        matrix_optimizer=partial(Muon, lr=0.02),
        other_optimizer=lambda groups: torch.optim.AdamW(groups),
        schedule=Cosine(warmup=2),
        parameter_rules=[ParameterRule(role="embedding", options={"lr": 0.1})],
    )
    assert dict(module.hparams) == dict(module.hparams_initial) == {"num_items": 23, "width": 12}
    fitted = fit(module)
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(Net.load_from_checkpoint(tmp_path / "a.ckpt")), weights(module))

    again = Net.load_from_checkpoint(tmp_path / "a.ckpt", matrix_optimizer=partial(Muon, lr=0.3))
    assert again.hparams.width == 12
    assert again.configure_optimizers().optimizers["matrix"].param_groups[0]["lr"] == 0.3


def test_named_and_ignored_hyperparameters_are_respected():
    class Some(MuonMixin, pl.LightningModule):
        def __init__(self, width=3, depth=2, secret=1, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters(ignore=["secret"])

    assert dict(Some(matrix_optimizer=Muon).hparams) == {"width": 3, "depth": 2}

    class Named(MuonMixin, pl.LightningModule):
        def __init__(self, width=3, depth=2, matrix_optimizer=None):
            super().__init__(matrix_optimizer=matrix_optimizer)
            self.save_hyperparameters("depth", "matrix_optimizer")

    assert dict(Named(matrix_optimizer=Muon).hparams) == {"depth": 2}
    assert dict(Named().hparams) == {"depth": 2, "matrix_optimizer": None}


def test_module_can_be_copied_and_pickled():
    module = Net(matrix_optimizer=partial(Muon, lr=0.02), schedule=Cosine(warmup=2))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(weights(copied), weights(module))
        assert copied.matrix_optimizer.keywords == {"lr": 0.02}
        ours = {id(parameter) for parameter in module.parameters()}
        copied.schedule = None
        groups = copied.configure_optimizers().param_groups
        assert not any(id(parameter) in ours for group in groups for parameter in group["params"])


# Errors and warnings


def test_a_schedule_without_trainer_is_refused():
    with pytest.raises(RuntimeError, match=r"Net has a schedule but no Trainer .* schedule\.scheduler\(optimizer"):
        Net(schedule=Cosine()).configure_optimizers()


def test_endless_training_is_refused_and_max_steps_named():
    with pytest.raises(ValueError, match=r"total_steps=inf.*max_steps"):
        fit(Net(schedule=Cosine()), max_steps=-1, max_epochs=-1)


def test_data_of_unknown_length_is_refused_and_max_steps_named():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(LENGTH, dtype=torch.long), torch.zeros(LENGTH, dtype=torch.long)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"total_steps=inf.*max_steps"):
        trainer(max_steps=-1, max_epochs=1).fit(Net(schedule=Cosine()), loader)
    trainer(max_steps=2).fit(Net(schedule=Cosine()), loader)  # the mend works


def test_schedule_counts_optimizer_steps_not_batches():
    fitted = fit(Net(schedule=Constant(warmup=0.5)), max_steps=-1, max_epochs=2, accumulate_grad_batches=2)
    assert fitted.global_step == 6  # 5 batches: 3 steps an epoch
    (config,) = fitted.lr_scheduler_configs
    assert config.interval == "step"
    assert config.name == "lr"
    assert config.scheduler.total_steps == 6


def test_a_replaced_configure_optimizers_is_refused_even_where_setup_is_overridden():
    class OwnSetup(Net):
        def setup(self, stage):
            pass

    module = OwnSetup()
    module.configure_optimizers = MethodType(lambda self: torch.optim.SGD(self.parameters(), lr=0.1), module)
    with pytest.raises(RuntimeError, match=r"OwnSetup\.configure_optimizers of MuonMixin was replaced .* --optimizer"):
        fit(module)


@pytest.mark.parametrize("name", ["matrix_optimizer", "other_optimizer"])
def test_an_optimizer_instead_of_what_makes_one_is_refused(name):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(TypeError, match=rf"{name} must be a class or function .* got an object of type SGD"):
        Net(**{name: optimizer})


def test_something_else_than_a_schedule_is_refused():
    with pytest.raises(TypeError, match=r"schedule must be a lightning_muon\.schedules\.Schedule.*got 0\.1"):
        Net(schedule=0.1)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_matrices_are_refused(name):
    flat = type(name, (pl.strategies.SingleDeviceStrategy,), {})
    with pytest.raises(RuntimeError, match=rf"{name} flattens matrices .* strategy='ddp'"):
        fit(Net(), strategy=flat(device="cpu"))


def test_rule_without_match_is_an_error_at_fit():
    with pytest.raises(ValueError, match=r"layers\.upp\.weight"):
        fit(Net(parameter_rules=[ParameterRule(pattern="layers.upp.weight", group="other")]))


def test_sparse_embedding_is_an_error_at_fit():
    module = Net()
    module.layers.embed = nn.Embedding(23, 8, sparse=True)
    with pytest.raises(ValueError, match=r"(?i)sparse"):
        fit(module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr.*-1\.0"),
        ({"lr": math.nan}, r"lr.*nan"),
        ({"momentum": 1.0}, r"momentum.*1\.0"),
    ],
)
def test_bad_optimizer_settings_are_named_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(Net(matrix_optimizer=partial(Muon, **settings)))


def test_no_matrix_at_all_warns_and_trains_with_the_other_optimizer():
    class OnlyTable(MuonMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(23, 23)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.table(batch[0]).flatten(0, 1), batch[1].flatten())

    module = OnlyTable()
    before = weights(module)
    with pytest.warns(UserWarning, match=r"OnlyTable has no trainable hidden matrix.*AdamW"):
        fitted = fit(module)
    assert list(fitted.optimizers[0].optimizers) == ["other"]
    assert not torch.equal(before["table.weight"], module.table.weight)


def test_clipping_by_value_warns_and_by_norm_does_not():
    with pytest.warns(UserWarning, match=r"gradient_clip_algorithm='value' changes the direction"):
        fit(Net(), gradient_clip_val=0.5, gradient_clip_algorithm="value")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_clip_algorithm.*")
        fit(Net(), gradient_clip_val=0.5)
