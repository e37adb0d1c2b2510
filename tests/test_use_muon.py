"""UseMuon: modules of other authors, unchanged."""

import copy
import pickle
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_muon import HybridOptimizer, Muon, MuonCLI, NorMuon, ParameterRule, UseMuon
from lightning_muon.schedules import Cosine, Linear
from tests.lightning_helpers import QUIET, Bare, Items, Layers, Net, WithOptimizer, assert_same, fit, trainer, weights


class Scheduled(Bare):
    """SGD with a scheduler, both from hyperparameters."""

    def __init__(self, lr: float = 0.5, wd: float = 0.25, gamma: float = 0.9, depth: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.momentum = 0.75

    def configure_optimizers(self):
        hparams = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), hparams.lr, weight_decay=hparams["wd"], momentum=self.momentum)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, hparams.gamma)}


class Broken(Bare):
    def configure_optimizers(self):
        raise KeyError("something that is not there")


class Several(Bare):
    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.Adam(self.layers.up.parameters()), torch.optim.SGD(self.layers.down.parameters(), 0.1)]


class ManuallyScheduled(Scheduled):
    automatic_optimization = False


class TrainsByOtherMeans(Bare):
    """Like modules that leave the training to pyro."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.Adam([self.dummy])


class HeadOnly(Bare):
    def configure_optimizers(self):
        return torch.optim.SGD(self.layers.head.parameters(), 0.1)


class OnTheOldNamespace(pytorch_lightning.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = Layers(23, width)

    training_step = Bare.training_step
    configure_optimizers = WithOptimizer.configure_optimizers


def use(**kwargs) -> UseMuon:
    settings = {
        "matrix_optimizer": partial(Muon, lr=0.02),
        "other_optimizer": partial(torch.optim.AdamW, lr=0.005),
        "schedule": Linear(warmup=2),
    }
    return UseMuon(**{**settings, **kwargs})


def seeded(cls=WithOptimizer, **kwargs):
    torch.manual_seed(3)
    return cls(**kwargs)


def test_trains_as_the_mixin_does():
    module = seeded()
    fitted = fit(module, callbacks=[use()])
    same = seeded(Net, **vars_of(use()))
    fit(same)
    assert isinstance(fitted.optimizers[0], HybridOptimizer)
    assert_same(weights(module), weights(same))


def vars_of(callback):
    """The settings of a UseMuon."""
    names = ("matrix_optimizer", "other_optimizer", "schedule", "parameter_rules")
    return {name: getattr(callback, name) for name in names}


def test_every_setting_arrives():
    rules = [ParameterRule(pattern="layers.up.weight", group="other")]
    fitted = fit(
        WithOptimizer(),
        callbacks=[
            use(matrix_optimizer=partial(NorMuon, lr=0.3), other_optimizer=torch.optim.RAdam, parameter_rules=rules)
        ],
    )
    children = fitted.optimizers[0].optimizers
    assert isinstance(children["matrix"], NorMuon)
    assert isinstance(children["other"], torch.optim.RAdam)
    assert fitted.optimizers[0].partition["layers.up.weight"].group == "other"
    assert children["matrix"].param_groups[0]["initial_lr"] == 0.3
    assert fitted.lr_scheduler_configs[0].name == "lr"


@pytest.mark.parametrize("fails", [False, True], ids=["fit", "exception"])
def test_the_module_is_as_it_was_after_the_fit(fails):
    class Stop(pl.Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise InterruptedError

    module = WithOptimizer()
    before = set(vars(module))
    try:
        fit(module, callbacks=[use(), Stop()])
    except InterruptedError:
        assert fails
    assert "configure_optimizers" not in vars(module)
    assert set(vars(module)) == before
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)


def test_checkpoints_load_in_the_modules_own_class(tmp_path):
    module = seeded()
    fitted = fit(module, callbacks=[use()])
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(WithOptimizer.load_from_checkpoint(tmp_path / "a.ckpt")), weights(module))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["hyper_parameters"]) == {"num_items", "width"}
    assert set(saved["matrix_layouts"]) == {"layers.up.weight", "layers.down.weight"}


@pytest.mark.parametrize("matrix", [partial(Muon, lr=0.02), partial(NorMuon, lr=0.02), torch.optim.AdamW], ids=str)
def test_resume_equals_not_having_stopped(matrix, tmp_path):
    def run(epochs, ckpt_path=None):
        module = seeded()
        used = trainer(callbacks=[use(matrix_optimizer=matrix, schedule=None)], max_steps=-1, max_epochs=epochs)
        used.fit(module, datamodule=Items(4), ckpt_path=ckpt_path)
        return module, used

    whole, _ = run(3)
    _, first = run(2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = run(3, tmp_path / "a.ckpt")
    assert_same(weights(resumed), weights(whole))


def test_runs_under_pytorch_lightning(tmp_path):
    module = OnTheOldNamespace()
    settings = {key: value for key, value in QUIET.items() if key != "enable_checkpointing"}
    old = pytorch_lightning.Trainer(
        **{**settings, "enable_model_summary": True}, max_epochs=2, callbacks=[use()], default_root_dir=tmp_path
    )
    before = weights(module)
    old.fit(module, Items().train_dataloader())
    assert isinstance(old.optimizers[0], HybridOptimizer)
    assert all(not torch.equal(before[name], value) for name, value in weights(module).items())
    loaded = OnTheOldNamespace.load_from_checkpoint(old.checkpoint_callback.best_model_path)
    assert_same(weights(loaded), weights(module))


def test_attached_modules_can_be_copied_and_pickled():
    """ddp_spawn and weight averaging do this."""
    module, callback = seeded(), use(schedule=None)
    callback.attach(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        optimizer = copied.configure_optimizers()
        assert isinstance(optimizer, HybridOptimizer)
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in copied.parameters()}


def test_a_copy_after_a_fit_does_not_hold_the_module():
    """Some packages pickle their callbacks and store them in their hyperparameters."""
    callback, module = use(), seeded()
    fit(module, callbacks=[callback])
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert vars(copied).keys() == vars(use()).keys()
        assert copied.matrix_optimizer.keywords == {"lr": 0.02}
    fit(module, callbacks=[callback])


def test_a_fit_of_no_batches():
    """RecTools loads a model by a fit without batches."""
    module = seeded()
    before = weights(module)
    trainer(max_steps=-1, max_epochs=2, callbacks=[use()]).fit(module, torch.utils.data.DataLoader([]))
    assert_same(weights(module), before)


def test_weight_averaging_beside_it():
    module = seeded()
    fit(module, callbacks=[EMAWeightAveraging(decay=0.5), use()])
    assert "configure_optimizers" not in vars(module)


# What is said


def notice(module, **kwargs):
    with pytest.warns(UserWarning, match="UseMuon replaces") as caught:
        fit(module, callbacks=[use(**kwargs)])
    return next(str(w.message) for w in caught if "UseMuon replaces" in str(w.message))


def test_what_is_not_used_is_said():
    text = notice(Scheduled())
    assert "UseMuon replaces Scheduled.configure_optimizers" in text
    assert "its SGD(lr=0.5, weight_decay=0.25) and the scheduler StepLR are not used" in text
    assert "without an effect on the optimizer now." in text
    assert all(part in text for part in ("lr=0.5", "wd=0.25", "gamma=0.9", "momentum=0.75"))
    assert "depth" not in text
    assert "Muon(lr=0.02" in text
    assert "AdamW(lr=0.005" in text
    assert "configure_hybrid_optimizer(self, ...)" in text


def test_a_method_that_fails_does_not_stop_the_fit():
    assert "its optimizer, learning rate and scheduler (it raises KeyError) are not used" in notice(Broken())


def test_nothing_is_said_of_a_module_that_has_none():
    class Empty(Bare):
        pass

    module = Empty()
    use().attach(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callbacks=[use()])
    assert not [w for w in caught if "replaces" in str(w.message)]


def test_parameters_that_its_own_optimizer_leaves_out_are_named():
    class AllButTwo(Bare):
        def configure_optimizers(self):
            self.layers.embed.requires_grad_(False)
            return torch.optim.SGD([p for n, p in self.named_parameters() if "down" not in n], 0.1)

    text = notice(AllButTwo())
    assert "It leaves out layers.down.weight, layers.down.bias, which UseMuon trains: freeze them with" in text
    assert "embed" not in text


def test_settings_of_an_inner_module_with_the_mixin_are_named():
    class Outer(WithOptimizer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(schedule=Linear())

    with pytest.warns(UserWarning, match=r"inner module 'inner' \(Net\) has settings that are not used: schedule\."):
        fit(Outer(), callbacks=[use()])


def test_random_numbers_that_its_own_method_draws_are_given_back():
    class Draws(Bare):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=float(torch.rand(1)))

    states = []

    class Record(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            states.append(torch.get_rng_state())

    for cls in (Draws, WithOptimizer):
        torch.manual_seed(0)
        module = cls()
        fit(module, callbacks=[use(), Record()])
    assert torch.equal(*states)


def test_a_checkpoint_of_its_own_optimizer_is_refused_with_the_cure(tmp_path):
    fit(seeded()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"saved by another optimizer.*Load the weights alone"):
        trainer(callbacks=[use()], max_steps=9).fit(seeded(), datamodule=Items(), ckpt_path=tmp_path / "a.ckpt")


def test_what_its_own_method_freezes_is_frozen():
    class Freezes(Bare):
        def configure_optimizers(self):
            self.layers.up.requires_grad_(False)
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    module = Freezes()
    before = weights(module)
    fit(module, callbacks=[use()])
    assert torch.equal(module.layers.up.weight, before["layers.up.weight"])
    assert not torch.equal(module.layers.down.weight, before["layers.down.weight"])


# What is refused


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (Net, r"Net has MuonMixin, which does what UseMuon does: give the settings to Net"),
        (Several, r"returns 2 optimizers \(Adam, SGD\).*HybridOptimizer\.from_module\(self\.generator\)"),
        (
            ManuallyScheduled,
            r"returns the scheduler StepLR, which ManuallyScheduled steps itself .*configure_hybrid",
        ),
        (
            TrainsByOtherMeans,
            r"gives Adam 1 of \d+ trainable elements and leaves out e\.g\. layers.*by other means \(pyro",
        ),
        (HeadOnly, r"gives SGD \d+ of \d+ trainable elements and leaves out .*layers\.embed\.weight.*freeze them"),
    ],
)
def test_modules_that_it_cannot_serve_are_refused(module, error):
    with pytest.raises(RuntimeError, match=error):
        fit(module(), callbacks=[use()])


def test_an_optimizer_on_the_instance_is_refused():
    module = Bare()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"replaced on the instance.*--optimizer.*Leave out"):
        fit(module, callbacks=[use()])
    assert "configure_optimizers" in vars(module)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"matrix_optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)},
            "matrix_optimizer must be a class or",
        ),
        ({"other_optimizer": "AdamW"}, "other_optimizer must be a class or function"),
        ({"schedule": "cosine"}, r"schedule must be a lightning_muon\.schedules\.Schedule.* got 'cosine'"),
        ({"schedule": Cosine}, "schedule must be a lightning_muon"),
    ],
)
def test_settings_are_checked_at_the_door(settings, error):
    with pytest.raises(TypeError, match=error):
        UseMuon(**settings)


def test_two_of_them_are_refused():
    with pytest.raises(RuntimeError, match="several UseMuon callbacks, and only one can take effect"):
        fit(WithOptimizer(), callbacks=[use(), use()])


@pytest.mark.parametrize("first", ["validate", "fit"])
def test_a_module_without_a_method_can_be_fitted_after_another_run(first):
    """When the next fit starts, Lightning refuses a module without ``configure_optimizers``."""
    cli = MuonCLI(
        Bare, args=[], run=False, trainer_defaults={**QUIET, "max_epochs": 1}, save_config_callback=None,
        seed_everything_default=0,
    )  # fmt: skip
    getattr(cli.trainer, first)(cli.model, datamodule=Items())
    cli.trainer.fit_loop.max_epochs = 2
    cli.trainer.fit(cli.model, datamodule=Items())
    assert isinstance(cli.trainer.optimizers[0], HybridOptimizer)


@pytest.mark.parametrize("base", [WithOptimizer, Net])
def test_a_method_that_is_set_during_setup_is_refused(base):
    class Sets(base):
        def setup(self, stage):
            self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(RuntimeError, match=r"during setup, so that UseMuon has no effect|was replaced on the instance"):
        fit(Sets(), callbacks=[use()] if base is WithOptimizer else [])


def test_a_child_whose_parameters_are_all_frozen_is_described():
    module = WithOptimizer()
    module.layers.up.requires_grad_(False)
    module.layers.down.requires_grad_(False)
    assert "Muon(lr=0.02, weight_decay=0.1) for 'matrix'" in notice(module)
