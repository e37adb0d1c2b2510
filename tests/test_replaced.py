"""MuonMixin beside a configure_optimizers of the user: whoever wins, the user knows."""

import functools
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_muon import HybridOptimizer, Muon, MuonMixin, ParameterRule, UseMuon, configure_hybrid_optimizer
from lightning_muon.schedules import Cosine, Linear
from tests.lightning_helpers import Bare, Items, Net, WithOptimizer, fit, trainer

LAMBDA = torch.optim.lr_scheduler.LambdaLR


class Scheduled(Bare):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


# The mixin wins


class Over(MuonMixin, Scheduled):
    pass


class OverGrandparent(Over):
    """Calls on: what is behind the mixin is still not used."""

    def configure_optimizers(self):
        return super().configure_optimizers()


@pytest.mark.parametrize("cls", [Over, OverGrandparent])
def test_a_parents_method_that_is_not_used_is_named(cls):
    with pytest.warns(UserWarning, match="MuonMixin replaces Scheduled") as caught:
        fitted = fit(cls())
    (text,) = {str(w.message) for w in caught if "MuonMixin replaces" in str(w.message)}
    assert "its SGD(lr=0.5) and the scheduler StepLR are not used" in text
    assert f"from a method of {cls.__name__}" in text
    assert isinstance(fitted.optimizers[0], HybridOptimizer)


def test_a_parent_with_several_optimizers_is_refused():
    class Several(Bare):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.layers.up.parameters(), 0.1), torch.optim.Adam(self.layers.down.parameters())]

    class Ours(MuonMixin, Several):
        pass

    with pytest.raises(RuntimeError, match=r"returns 2 optimizers \(SGD, Adam\).*leave out MuonMixin"):
        fit(Ours())


# The user's method wins


def sgd(self):
    return torch.optim.SGD(self.parameters(), 0.5)


class InTheClass(MuonMixin, Bare):
    configure_optimizers = sgd


class InASubclass(Net):
    configure_optimizers = sgd


class Mixed:
    configure_optimizers = sgd


class InAnotherMixin(Mixed, MuonMixin, Bare):
    pass


class BelowAnotherMixin(InAnotherMixin):
    pass


def nothing(self):
    return None


class ReturnsNothing(MuonMixin, Bare):
    configure_optimizers = nothing


@pytest.mark.parametrize("cls", [InTheClass, InASubclass, InAnotherMixin, BelowAnotherMixin, ReturnsNothing])
def test_a_method_that_never_reaches_the_mixins_is_refused(cls):
    with pytest.raises(RuntimeError, match=r"never calls MuonMixin's.*no matrix is trained with Muon.*super\(\)\."):
        fit(cls())


@pytest.mark.parametrize("setting", [{"schedule": Cosine()}, {"matrix_optimizer": partial(Muon, lr=0.02)}], ids=str)
def test_settings_that_would_have_no_effect_are_named(setting):
    class Own(MuonMixin, Bare):
        def configure_optimizers(self):
            return HybridOptimizer.from_module(self)

    fit(Own())
    with pytest.raises(RuntimeError, match=f"so that {next(iter(setting))} would have no effect"):
        fit(Own(**setting))


class KeepsItsScheduler(MuonMixin, Bare):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LAMBDA(optimizer, lambda step: 0.5**step)}}


class KeepsItWithoutMixin(Bare):
    def configure_optimizers(self):
        optimizer = configure_hybrid_optimizer(self, matrix_optimizer=partial(Muon, lr=0.02))
        return [optimizer], [LAMBDA(optimizer, lambda step: 0.5**step)]


class SeveralHybrids(MuonMixin, Bare):
    automatic_optimization = False

    def configure_optimizers(self):
        return [HybridOptimizer.from_module(self.layers.up), HybridOptimizer.from_module(self.layers.down)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("cls", [KeepsItsScheduler, KeepsItWithoutMixin, SeveralHybrids])
def test_methods_that_end_in_a_hybrid_are_left_alone(cls, recwarn):
    fitted = fit(cls(), Items(2), max_steps=-1, max_epochs=2)
    assert all(isinstance(optimizer, HybridOptimizer) for optimizer in fitted.optimizers)
    if fitted.lr_scheduler_configs:
        assert {group["lr"] / group["initial_lr"] for group in fitted.optimizers[0].param_groups} == {0.25}
    assert not [w for w in recwarn if "replace" in str(w.message)]


def test_the_function_in_place_of_super_counts_too():
    class ByFunction(MuonMixin, Bare):
        def configure_optimizers(self):
            return configure_hybrid_optimizer(self, self.matrix_optimizer, schedule=self.schedule)

    fitted = fit(ByFunction(matrix_optimizer=partial(Muon, lr=0.3), schedule=Linear()))
    (group,) = (group for group in fitted.optimizers[0].param_groups if group["name"] == "matrix")
    assert group["initial_lr"] == 0.3


def test_a_scheduler_beside_a_schedule_gets_a_sentence():
    with pytest.raises(RuntimeError, match=r"has schedule=Linear\(.*returns a dict of the optimizer and its scheduler"):
        fit(KeepsItsScheduler(schedule=Linear()))


def test_a_module_that_makes_its_hybrid_is_left_alone_by_use_muon():
    fitted = fit(KeepsItWithoutMixin(), callbacks=[UseMuon()])
    assert fitted.optimizers[0].param_groups[-1]["initial_lr"] == 0.02
    with pytest.raises(RuntimeError, match=r"makes a HybridOptimizer itself.*schedule of UseMuon would have no"):
        fit(KeepsItWithoutMixin(), callbacks=[UseMuon(schedule=Linear())])


def test_the_function_takes_a_lightning_module():
    with pytest.raises(TypeError, match=r"takes the LightningModule, got Linear\..*HybridOptimizer\.from_module"):
        configure_hybrid_optimizer(nn.Linear(2, 2))


def test_a_part_that_no_hybrid_of_a_module_has_is_named():
    class Forgets(SeveralHybrids):
        def configure_optimizers(self):
            return super().configure_optimizers()

    with pytest.warns(UserWarning, match=r"in no optimizer: layers\.embed\.weight"):
        fit(Forgets(), Items(2), max_steps=-1, max_epochs=1)


def test_a_callback_hook_without_super_does_not_hide_a_replaced_method():
    class Hooked(Net):
        def configure_callbacks(self):
            return []

    module = Hooked()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="was replaced on the instance, as LightningCLI does"):
        fit(module)


# Names


class Table(nn.Module):
    pass


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("schedule", "linear", TypeError),
        ("schedule", torch.zeros(3), TypeError),
        ("schedule", [1, 2], TypeError),
        ("schedule", Table(), AttributeError),
        ("matrix_optimizer", "adam", TypeError),
        ("other_optimizer", nn.Linear(2, 2), AttributeError),
        ("parameter_rules", {"a": 1}, AttributeError),
        ("parameter_rules", nn.ModuleList(), AttributeError),
    ],
    ids=str,
)
def test_a_name_that_is_a_setting_gets_a_sentence(name, value, error):
    with pytest.raises(error, match=rf"Net\.{name} .*(setting of MuonMixin|must be a)"):
        setattr(Net(), name, value)


def test_a_setting_that_the_modules_own_argument_takes_gets_a_sentence():
    class Takes(MuonMixin, Bare):
        def __init__(self, schedule="cosine", **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    fit(Takes())
    with pytest.raises(RuntimeError, match=r"Takes\.__init__ takes schedule itself and does not pass it to super"):
        fit(Takes(schedule=Linear()))


@pytest.mark.parametrize("name", ["schedule", "parameter_rules"])
def test_a_buffer_with_the_name_of_a_setting_gets_a_sentence(name):
    with pytest.raises(AttributeError, match=rf"Net\.{name} is a setting of MuonMixin and cannot be a buffer"):
        Net().register_buffer(name, torch.zeros(3))


def test_a_class_attribute_with_the_name_of_a_setting_gets_a_sentence():
    with pytest.raises(TypeError, match=r"Noise\.schedule must be a lightning_muon\.schedules\.Schedule.*'linear'"):

        class Noise(MuonMixin, Bare):
            schedule = "linear"


def test_settings_of_a_class_hold_unless_an_instance_has_others():
    class Preset(MuonMixin, Bare):
        matrix_optimizer = partial(Muon, lr=0.3)
        schedule = Linear()
        parameter_rules = (ParameterRule(role="embedding", options={"lr": 0.1}),)

    groups = {group["name"]: group for group in fit(Preset()).optimizers[0].param_groups}
    assert groups["matrix"]["initial_lr"] == 0.3
    assert groups["other/embedding"]["initial_lr"] == 0.1
    other = fit(Preset(matrix_optimizer=partial(Muon, lr=0.2), parameter_rules=[])).optimizers[0].param_groups
    assert {group["name"]: group["initial_lr"] for group in other}["matrix"] == 0.2
    assert 0.1 not in {group["initial_lr"] for group in other}


# Hyperparameters


class Theirs(pl.LightningModule):
    def __init__(self, width: int = 8, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.layers = Bare(width=width).layers

    training_step = Bare.training_step
    configure_optimizers = WithOptimizer.configure_optimizers


class Ours(MuonMixin, Theirs):
    pass


class OursWithKwargs(MuonMixin, Theirs):
    def __init__(self, depth: int = 3, **kwargs) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"matrix_optimizer": partial(Muon, lr=0.02)}, {"schedule": Linear()}, {"parameter_rules": []}],
    ids=str,
)
def test_the_parent_class_loads_the_checkpoint(settings, tmp_path):
    module = Ours(width=12, **settings)
    assert dict(module.hparams) == dict(module.hparams_initial) == {"width": 12}
    used = fit(module)
    used.save_checkpoint(tmp_path / "a.ckpt")
    assert Theirs.load_from_checkpoint(tmp_path / "a.ckpt").hparams.width == 12
    assert Ours.load_from_checkpoint(tmp_path / "a.ckpt").hparams.width == 12


def test_settings_of_an_inner_module_that_are_not_used_are_named():
    class Outer(MuonMixin, pl.LightningModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.teacher, self.student = Net(schedule=Linear()), Net()
            self.student.parameter_rules = [ParameterRule(role="embedding", options={"lr": 0.1})]

        def training_step(self, batch, batch_idx):
            return self.teacher.training_step(batch, batch_idx) + self.student.training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="inner module") as caught:
        fit(Outer())
    texts = [str(w.message) for w in caught if "inner module" in str(w.message)]
    assert len(texts) == 2
    assert "The inner module 'teacher' (Net) has settings that are not used: schedule." in texts[0]
    assert "The inner module 'student' (Net) has settings that are not used: parameter_rules." in texts[1]
    assert "Only those of Outer are used" in texts[0]


# The partition


@pytest.mark.parametrize("summary", [True, False])
def test_the_partition_is_printed_where_the_trainer_prints_its_summary(summary, capsys):
    trainer(enable_model_summary=summary).fit(Net(schedule=Linear()), datamodule=Items())
    printed = capsys.readouterr().out
    assert ("layers.up.weight" in printed) == summary
    assert ("schedule: Linear(" in printed) == summary


# Methods that reach the mixin's by more than one step, or are not plain functions


class Calls(MuonMixin, Bare):
    def configure_optimizers(self):
        return super().configure_optimizers()


class CallsTwice(Calls):
    def configure_optimizers(self):
        return super().configure_optimizers()


@pytest.mark.parametrize("cls", [Calls, CallsTwice])
def test_methods_that_call_each_other_reach_the_mixins(cls):
    module = cls(matrix_optimizer=partial(Muon, lr=0.3))
    optimizer = fit(module).optimizers[0]
    assert optimizer.optimizers["matrix"].defaults["lr"] == 0.3
    assert not [name for name in vars(module) if "reached" in name]


def sgd(self, lr=0.1):
    return torch.optim.SGD(self.parameters(), lr)


ODD_METHODS = {
    "partialmethod": functools.partialmethod(sgd, lr=0.1),
    "property": property(lambda self: lambda: sgd(self)),
    "lambda": lambda self: sgd(self),
}


@pytest.mark.parametrize("later", [False, True], ids=["in the class", "assigned later"])
@pytest.mark.parametrize("method", ODD_METHODS.values(), ids=ODD_METHODS)
def test_odd_methods_that_never_reach_ours_are_refused(method, later):
    odd = type("Odd", (MuonMixin, Bare), {} if later else {"configure_optimizers": method})
    odd.configure_optimizers = method
    with pytest.raises(RuntimeError, match=r"Odd\.configure_optimizers returns SGD and never calls MuonMixin's"):
        fit(odd())


@pytest.mark.parametrize(
    ("way", "method"),
    [("mixin", method) for method in ODD_METHODS.values()]
    + [("UseMuon", method) for name, method in ODD_METHODS.items() if name != "property"],  # which cannot be set
)
def test_odd_methods_that_are_replaced_are_named(way, method):
    base = type("Theirs", (Bare,), {"configure_optimizers": method})
    module, callbacks = (type("Ours", (MuonMixin, base), {})(), []) if way == "mixin" else (base(), [UseMuon()])
    with pytest.warns(UserWarning, match=r"replaces Theirs\.configure_optimizers: its SGD\(lr=0\.1\) is not used"):
        assert isinstance(fit(module, callbacks=callbacks).optimizers[0], HybridOptimizer)


def test_a_method_that_makes_no_optimizer_is_named():
    class Empty(Bare):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match=r"Empty\.configure_optimizers: it makes no optimizer\. The fit uses"):
        fit(Empty(), callbacks=[UseMuon()])


def test_an_optimizer_of_ours_that_is_dropped_is_refused():
    class Drops(MuonMixin, Bare):
        def configure_optimizers(self):
            super().configure_optimizers()
            return sgd(self)

    with pytest.raises(RuntimeError, match="calls MuonMixin's and returns SGD instead of its optimizer"):
        fit(Drops())


@pytest.mark.parametrize("way", ["mixin", "function"])
@pytest.mark.parametrize("chained", [True, False])
def test_a_schedule_that_is_dropped_is_refused(chained, way):
    """Its rates would stay at the first step's, which a warmup has close to 0."""

    bases = (MuonMixin, Bare) if way == "mixin" else (Bare,)

    class Drops(*bases):
        def make(self):
            if way == "function":
                return configure_hybrid_optimizer(self, schedule=Linear(warmup=3))
            return super().configure_optimizers()

        def configure_optimizers(self):
            made = self.make()
            if not chained:
                return made["optimizer"]
            ours = made["lr_scheduler"]["scheduler"]
            both = torch.optim.lr_scheduler.ChainedScheduler([ours])
            return {"optimizer": made["optimizer"], "lr_scheduler": both}

    module = Drops(schedule=Linear(warmup=3)) if way == "mixin" else Drops()
    if chained:
        fit(module)
    else:
        with pytest.raises(
            RuntimeError, match=r"leaves out the scheduler of schedule=Linear.*values of its first step"
        ):
            fit(module)


# Names that a base class has for something of its own, which the mixin would hide


def schedule(self):
    return 3


@pytest.mark.parametrize("behind", [True, False], ids=["base", "class"])
@pytest.mark.parametrize("value", [schedule, property(schedule)], ids=["method", "property"])
@pytest.mark.parametrize("name", ["schedule", "parameter_rules", "matrix_optimizer", "other_optimizer"])
def test_methods_with_the_name_of_a_setting_are_refused(name, value, behind):
    base = type("Own", (Bare,), {name: value}) if behind else Bare
    own = ("Ours", (MuonMixin, base), {}) if behind else ("Own", (MuonMixin, base), {name: value})
    with pytest.raises(AttributeError, match=rf"Own\.{name} is a setting of MuonMixin and cannot be a"):
        type(*own)


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        (lambda module: module.register_parameter("schedule", torch.nn.Parameter(torch.ones(2))), "a parameter"),
        (lambda module: module.add_module("schedule", torch.nn.Linear(2, 2)), "a submodule"),
    ],
)
def test_registering_under_the_name_of_a_setting_is_refused(register, kind):
    with pytest.raises(AttributeError, match=f"schedule is a setting of MuonMixin and cannot be {kind}"):
        register(Net())


def test_a_value_of_the_modules_own_is_told_apart_from_a_wrong_setting():
    with pytest.raises(TypeError, match=r"got 'cosine'.*is a setting of MuonMixin: give your attribute another name"):
        Net().schedule = "cosine"


def test_hyperparameters_of_the_modules_own_stay_where_they_are(tmp_path):
    class Configured(MuonMixin, Bare):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters(config)

    config = {"schedule": "cosine", "lr": 0.1}
    fit(Configured(config)).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert config.items() <= saved["hyper_parameters"].items()
    assert Configured.load_from_checkpoint(tmp_path / "a.ckpt", config={}).schedule is None
