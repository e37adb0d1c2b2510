"""One module in five training harnesses gives the same weights."""

from functools import partial

import lightning.fabric
import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI

from lightning_muon import HybridOptimizer, Muon, MuonCLI
from lightning_muon.schedules import Cosine
from tests.lightning_helpers import QUIET, Bare, Items, Net, assert_same, fit, weights

STEPS = 5
SETTINGS = {
    "matrix_optimizer": {"class_path": "lightning_muon.Muon", "init_args": {"lr": 0.02, "momentum": 0.9}},
    "other_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
    "schedule": {"class_path": "lightning_muon.schedules.Cosine", "init_args": {"warmup": 2, "final": 0.1}},
    "parameter_rules": [{"role": "embedding", "options": {"lr": 0.006}}],
}


def python_settings():
    from lightning_muon import ParameterRule

    return {
        "matrix_optimizer": partial(Muon, lr=0.02, momentum=0.9),
        "other_optimizer": partial(torch.optim.AdamW, lr=0.003),
        "schedule": Cosine(warmup=2, final=0.1),
        "parameter_rules": [ParameterRule(role="embedding", options={"lr": 0.006})],
    }


def run_cli(cli_class, module_class, config, tmp_path):
    config = {"seed_everything": 11, "trainer": {**QUIET, "max_steps": STEPS}, **config}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return cli_class(module_class, Items, args=["fit", "-c", str(path)], save_config_callback=None).model


def plain_cli(tmp_path):
    return run_cli(LightningCLI, Net, {"model": SETTINGS}, tmp_path)


def muon_cli(tmp_path):
    return run_cli(MuonCLI, Net, {"model": SETTINGS}, tmp_path)


def muon_cli_without_mixin(tmp_path):
    return run_cli(MuonCLI, Bare, SETTINGS, tmp_path)


def with_trainer(tmp_path):
    seed_everything(11)
    module = Net(**python_settings())
    fit(module, max_steps=STEPS)
    return module


def hybrid_of(module):
    settings = python_settings()
    optimizer = HybridOptimizer.from_module(
        module,
        matrix=settings["matrix_optimizer"],
        other=settings["other_optimizer"],
        rules=settings["parameter_rules"],
    )
    return optimizer, settings["schedule"].scheduler(optimizer, STEPS)


def with_fabric(tmp_path):
    seed_everything(11)
    module = Bare()
    optimizer, scheduler = hybrid_of(module)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    fabric_module, fabric_optimizer = fabric.setup(module, optimizer)
    fabric_module.mark_forward_method("training_step")
    for batch in fabric.setup_dataloaders(Items().train_dataloader()):
        fabric_optimizer.zero_grad()
        fabric.backward(fabric_module.training_step(batch, 0))
        fabric_optimizer.step()
        scheduler.step()
    return module


def plain_loop(tmp_path):
    seed_everything(11)
    module = Bare()
    optimizer, scheduler = hybrid_of(module)
    for batch in Items().train_dataloader():
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
        scheduler.step()
    return module


@pytest.fixture(scope="module")
def reference():
    return weights(plain_loop(None))


@pytest.mark.parametrize("harness", [plain_cli, muon_cli, muon_cli_without_mixin, with_trainer, with_fabric])
def test_same_weights_as_a_plain_torch_loop(harness, reference, tmp_path):
    assert_same(weights(harness(tmp_path)), reference)


def test_the_reference_did_train(reference):
    seed_everything(11)
    before = weights(Bare())
    assert all(not torch.equal(before[name], reference[name]) for name in before)


def test_fabric_uses_configure_optimizers_of_the_mixin(reference):
    """Without a schedule, which needs a Trainer, the method of the mixin works in any loop."""
    seed_everything(11)
    settings = python_settings()
    schedule = settings.pop("schedule")
    module = Net(**settings)
    optimizer = module.configure_optimizers()
    scheduler = schedule.scheduler(optimizer, STEPS)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    fabric_module, fabric_optimizer = fabric.setup(module, optimizer)
    fabric_module.mark_forward_method("training_step")
    for batch in Items().train_dataloader():
        fabric_optimizer.zero_grad()
        fabric.backward(fabric_module.training_step(batch, 0))
        fabric_optimizer.step()
        scheduler.step()
    assert_same(weights(module), reference)
