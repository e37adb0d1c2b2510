"""Random lives of an optimizer: steps, missing gradients, freezing, saving, loading, copying, added groups.

Whatever happened, the parameters are where the reference, which knows only gradients, says they are.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import MatrixLayout
from tests.optim import reference
from tests.optim.nets import Net
from tests.optim.reference import Layout, ReferenceMuon


def random_layout(choose: random.Random) -> tuple[tuple[int, ...], Layout]:
    """Any shape that some layout reads, and that layout."""
    split = tuple(choose.randint(1, 4) for _ in range(choose.randint(2, 3))) if choose.random() < 0.5 else ()
    if split and choose.random() < 0.5:
        split = (split[0],) * len(split)
    repeats = choose.randint(1, 3) if split else 1
    fan_out = sum(split) * repeats if split else choose.randint(1, 7)
    fan_in, groups = choose.randint(1, 7), choose.choice([1, 1, 2, 3])
    kernel = tuple(choose.randint(1, 3) for _ in range(choose.choice([0, 0, 1, 2])))
    batch = tuple(choose.randint(1, 3) for _ in range(choose.choice([0, 0, 1, 2])))
    transposed = choose.random() < 0.4
    maps = (fan_in * groups, fan_out) if transposed else (fan_out * groups, fan_in)
    return (*batch, *maps, *kernel), Layout(len(batch), groups, transposed, split, repeats)


def package_layout(layout: Layout) -> MatrixLayout:
    return MatrixLayout(layout.batch_dims, layout.groups, layout.transposed, layout.split, layout.repeats)


@pytest.mark.parametrize("seed", range(30))
def test_any_layout_equals_the_reference(seed: int) -> None:
    choose = random.Random(seed)
    shape, layout = random_layout(choose)
    options = reference.settings(
        lr_scale=choose.choice(reference.LR_SCALES), nesterov=choose.random() < 0.5, cautious=choose.random() < 0.5
    )
    value = torch.randn(shape, dtype=torch.float64)
    param = nn.Parameter(value.clone())
    optimizer = Muon([{"params": [param], "layouts": [package_layout(layout)]}], **options)
    expected = ReferenceMuon([value], [layout], **options)
    for _ in range(3):
        grad = torch.randn(shape, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        expected.step([grad])
    torch.testing.assert_close(param.detach(), expected.params[0], rtol=0, atol=1e-9)
    matrices = sum(count for count, _, _ in package_layout(layout).matrix_shapes(shape))
    assert matrices == len(reference.matrix_indices(shape, layout))


class Life:
    """A Muon, its parameters and the reference, through random events."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        torch.manual_seed(seed)
        pairs = [random_layout(self.choose) for _ in range(3)]
        pairs += [((6, 4), Layout()), ((4, 6), Layout()), ((6, 4), Layout()), ((6, 4), Layout()), ((0, 4), Layout())]
        self.choose.shuffle(pairs)
        self.layouts = [layout for _, layout in pairs]
        self.params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape, _ in pairs]
        self.named = self.choose.random() < 0.5
        self.grouped = [0] * len(pairs)  # the param group of each
        self.grouped[-2:] = [1, 2]  # 1: a group from the start, 2: added later
        self.options = reference.settings(nesterov=self.choose.random() < 0.5)
        self.optimizer = Muon([self.group(0), self.group(1)], **self.options)
        self.expected = ReferenceMuon([p.detach() for p in self.params], self.layouts, **self.options)

    def group(self, number: int) -> dict[str, Any]:
        members = [k for k, group in enumerate(self.grouped) if group == number]
        params = [(f"p{k}", self.params[k]) if self.named else self.params[k] for k in members]
        return {"params": params, "layouts": [package_layout(self.layouts[k]) for k in members]}

    def run(self, events: int) -> None:
        actions = [self.step] * 6 + [self.freeze, self.unfreeze, self.reload, self.copy, self.pickle, self.replace]
        actions += [self.join, self.set_rate, self.forget, self.move, self.zeros]
        for _ in range(events):
            self.choose.choice(actions)()
        self.step()
        for k, (param, wanted) in enumerate(zip(self.params, self.expected.params, strict=True)):
            torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-8, msg=lambda text, k=k: f"p{k}: {text}")

    def active(self, k: int) -> bool:
        return self.grouped[k] < len(self.optimizer.param_groups) and self.params[k].requires_grad

    def step(self) -> None:
        grads: list[Tensor | None] = []
        for k, param in enumerate(self.params):
            given = param.requires_grad and self.choose.random() < 0.8
            grad = torch.randn_like(param.detach()) * 10 ** self.choose.uniform(-8, 8) if given else None
            param.grad = None if grad is None else grad.clone()
            grads.append(grad if self.active(k) else None)
        self.optimizer.step()
        self.expected.step(grads, self.optimizer.param_groups[0]["lr"])

    def zeros(self) -> None:
        grads: list[Tensor | None] = []
        for k, param in enumerate(self.params):
            param.grad = torch.zeros_like(param) if param.requires_grad else None
            grads.append(param.grad if self.active(k) else None)
        self.optimizer.step()
        self.expected.step(grads, self.optimizer.param_groups[0]["lr"])

    def freeze(self) -> None:
        param = self.choose.choice(self.params)
        param.requires_grad_(False)
        param.grad = None

    def unfreeze(self) -> None:
        self.choose.choice(self.params).requires_grad_(True)

    def reload(self) -> None:
        """A new process: other parameters, another optimizer, the state from a file."""
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), buffer)
        buffer.seek(0)
        groups = len(self.optimizer.param_groups)
        self.params = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.params]
        self.optimizer = Muon([self.group(number) for number in range(groups)], **{**self.options, "lr": 9.0})
        self.optimizer.load_state_dict(torch.load(buffer, weights_only=True))

    def copy(self) -> None:
        old = self.optimizer, self.params
        self.optimizer, self.params = copy.deepcopy(old)
        for param in old[1]:
            param.grad = torch.ones_like(param)
        old[0].step()  # the old one goes on, and must not reach the new one

    def pickle(self) -> None:
        self.optimizer, self.params = pickle.loads(pickle.dumps((self.optimizer, self.params)))

    def replace(self) -> None:
        """Somebody writes other tensors of the same content into the state, as moving it to a device does."""
        for entry in self.optimizer.state.values():
            for key, value in entry.items():
                entry[key] = value.clone()

    def join(self) -> None:
        if len(self.optimizer.param_groups) == 2:
            self.optimizer.add_param_group({**self.group(2), "lr": self.optimizer.param_groups[0]["lr"]})

    def set_rate(self) -> None:
        rate = self.choose.choice([0.0, 0.01, 0.05])
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forget(self) -> None:
        if self.choose.random() < 0.5:
            self.optimizer.state.clear()
        else:
            self.optimizer.state = defaultdict(dict)
        self.expected.buffers = [torch.zeros_like(buffer) for buffer in self.expected.buffers]

    def move(self) -> None:
        """Weights are set from outside, with other memory and other strides."""
        for k, param in enumerate(self.params):
            value = torch.randn_like(param)
            param.data = (
                value.movedim(0, -1).contiguous().movedim(-1, 0) if self.choose.random() < 0.5 else value.clone()
            )
            self.expected.params[k] = value.clone()


@pytest.mark.parametrize("seed", range(20))
def test_random_life_equals_the_reference(seed: int) -> None:
    Life(seed).run(25)


PARTS = ("body", "attention", "conv", "norm")


@pytest.mark.parametrize("seed", range(10))
def test_random_life_of_a_hybrid_equals_its_children_alone(seed: int) -> None:
    """Freezing, unfreezing by add_param_group, saving and loading of a hybrid against AdamW and Muon side by side."""
    choose = random.Random(seed)
    net, twin = Net(seed).double(), Net(seed).double()
    late = choose.choice(PARTS)
    for module in (net, twin):
        getattr(module, late).requires_grad_(False)
    settings: dict[str, Any] = {"matrix": partial(Muon, lr=0.02), "other": partial(AdamW, lr=0.003)}
    optimizer = HybridOptimizer.from_module(net, **settings)

    getattr(twin, late).requires_grad_(True)
    full = HybridOptimizer.from_module(twin, **settings)  # has all from the start; the late part just has no gradient
    joined = False
    for _ in range(20):
        event = choose.choice(["step"] * 5 + ["reload", "copy", "join"])
        if event == "step":
            for (name, param), other in zip(net.named_parameters(), twin.parameters(), strict=True):
                missing = (not joined and name.startswith(late)) or choose.random() < 0.2
                grad = None if missing else torch.randn_like(param.detach())
                param.grad, other.grad = grad, None if grad is None else grad.clone()
            optimizer.step()
            full.step()
        elif event == "join" and not joined:
            joined = True
            getattr(net, late).requires_grad_(True)
            optimizer.add_param_group({"params": list(getattr(net, late).parameters())})
        elif event == "reload":
            saved = copy.deepcopy(optimizer.state_dict())
            fresh = Net(seed + 1).double()
            fresh.load_state_dict(net.state_dict())
            getattr(fresh, late).requires_grad_(False)
            again = HybridOptimizer.from_module(fresh, **settings)
            if joined:
                getattr(fresh, late).requires_grad_(True)
                again.add_param_group({"params": list(getattr(fresh, late).parameters())})
            again.load_state_dict(saved)
            net, optimizer = fresh, again
        elif event == "copy":
            net, optimizer = copy.deepcopy((net, optimizer))
    for (name, param), other in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert math.isfinite(float(param.detach().sum()))
        torch.testing.assert_close(
            param.detach(), other[1].detach(), rtol=0, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}"
        )
