"""Muon equals the float64 reference, which is written from the equations alone (reference.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muon
from lightning_muon.partition import MatrixLayout
from tests.optim import reference
from tests.optim.reference import Layout, ReferenceMuon

LRS = (0.02, 0.05, 0.01, 0.0, 0.03, 0.02)


def package_layout(layout: Layout) -> MatrixLayout:
    return MatrixLayout(layout.batch_dims, layout.groups, layout.transposed, layout.split, layout.repeats)


def run_both(
    weights: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    layouts: Sequence[Layout] | None = None,
    lrs: Sequence[float] = LRS,
    **overrides: Any,
) -> tuple[list[Tensor], ReferenceMuon, Muon]:
    """The parameters after the package's steps, the reference after its own, and the optimizer."""
    options = reference.settings(**overrides)
    params = [nn.Parameter(weight.clone()) for weight in weights]
    group: dict[str, Any] = {"params": params}
    if layouts is not None:
        group["layouts"] = [package_layout(layout) for layout in layouts]
    dtype = "float64" if weights[0].dtype == torch.float64 else "float32"
    optimizer = Muon([group], **options, orthogonalize_dtype=dtype)
    expected = ReferenceMuon(list(weights), None if layouts is None else list(layouts), **options)
    for lr, step_grads in zip(lrs, grads, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype).clone()
        optimizer.step()
        expected.step(step_grads, lr)
    return [param.detach() for param in params], expected, optimizer


def assert_equal_to_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    layouts: Sequence[Layout] | None = None,
    tolerance: float = 1e-5,
    **overrides: Any,
) -> None:
    params, expected, optimizer = run_both(weights, grads, layouts, **overrides)
    for k, (param, wanted) in enumerate(zip(params, expected.params, strict=True)):
        error = (param.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error <= tolerance, f"parameter {k} of shape {tuple(param.shape)}: relative error {error:.2e}"
        # The way travelled, which the size of the weights does not hide: small singular values amplify rounding.
        travelled = wanted - weights[k].double()
        if travelled.norm() > 0:
            off = (param.double() - weights[k].double() - travelled).norm() / travelled.norm()
            assert off <= 1e3 * tolerance, f"parameter {k}: relative error of the way travelled {off:.2e}"
    for param, buffer in zip(optimizer.param_groups[0]["params"], expected.buffers, strict=True):
        stored = optimizer.state[param].get("momentum_buffer")
        if stored is not None and stored.shape == param.shape:
            torch.testing.assert_close(stored.double(), buffer, rtol=0, atol=1e-6 * max(1.0, float(buffer.abs().max())))


def random_problem(
    shapes: Sequence[tuple[int, ...]], steps: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grads = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(steps)]
    return weights, grads


SHAPES = [(6, 6), (6, 15), (15, 6), (1, 7), (7, 1), (6, 15), (15, 6), (32, 8), (8, 32), (8, 32)]


@pytest.mark.parametrize("method", reference.METHODS)
def test_every_method(method: str) -> None:
    weights, grads = random_problem(SHAPES)
    assert_equal_to_reference(weights, grads, method=method)


@pytest.mark.parametrize(("nesterov", "cautious"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("lr_scale", reference.LR_SCALES)
def test_float64_parameters_are_exact(lr_scale: str, nesterov: bool, cautious: bool) -> None:
    weights, grads = random_problem(SHAPES, dtype=torch.float64)
    assert_equal_to_reference(
        weights, grads, tolerance=1e-12, lr_scale=lr_scale, nesterov=nesterov, cautious=cautious, weight_decay=0.3
    )


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.1), (0.5, 1.0), (0.95, 0.0)])
def test_momentum_and_weight_decay(momentum: float, weight_decay: float) -> None:
    weights, grads = random_problem(SHAPES)
    assert_equal_to_reference(weights, grads, momentum=momentum, weight_decay=weight_decay)


def test_cautious_decay() -> None:
    weights, grads = random_problem([(8, 12), (12, 8), (8, 12)])
    assert_equal_to_reference(weights, grads, cautious=True, weight_decay=2.0, tolerance=2e-5)


@pytest.mark.parametrize("steps", [1, 8])
def test_number_of_iterations(steps: int) -> None:
    weights, grads = random_problem([(8, 12), (12, 8)])
    assert_equal_to_reference(weights, grads, method="polar_express", steps=steps)


def test_ten_steps_of_gradients_of_changing_size() -> None:
    weights, grads = random_problem([(10, 24), (24, 10)], steps=10)
    grads = [[grad * 10.0 ** (3 * math.sin(k)) for grad in row] for k, row in enumerate(grads)]
    assert_equal_to_reference(weights, grads, lrs=(0.02,) * 10)


@pytest.mark.parametrize("method", ["jordan", "you", "cubic"])
def test_rank_deficient_gradients(method: str) -> None:
    """All gradients share a row and a column space of dimension 2; the rest of the matrix only decays."""
    left, right = torch.linalg.qr(torch.randn(9, 2)).Q, torch.linalg.qr(torch.randn(14, 2)).Q
    grads = [[left @ torch.randn(2, 2) @ right.T] for _ in range(6)]
    assert_equal_to_reference([torch.randn(9, 14)], grads, method=method)


def test_zero_gradient_among_others() -> None:
    weights, grads = random_problem([(6, 9), (6, 9), (9, 6)])
    for row in grads:
        row[1].zero_()
    assert_equal_to_reference(weights, grads)


def test_missing_gradients() -> None:
    weights, grads = random_problem([(6, 9), (6, 9), (9, 6)])
    grads[0][1] = None
    grads[2][0] = grads[2][2] = None
    grads[3] = [None, None, None]
    assert_equal_to_reference(weights, grads)


LAYOUTS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "conv1d": ((10, 4, 3), Layout()),
    "conv2d": ((8, 3, 3, 3), Layout()),
    "conv3d": ((6, 2, 2, 3, 2), Layout()),
    "conv2d grouped": ((8, 3, 3, 3), Layout(groups=2)),
    "conv1d grouped": ((9, 4, 2), Layout(groups=3)),
    "conv_transpose1d": ((4, 10, 3), Layout(transposed=True)),
    "conv_transpose2d": ((4, 6, 3, 2), Layout(transposed=True)),
    "conv_transpose2d grouped": ((8, 3, 3, 2), Layout(transposed=True, groups=2)),
    "stored transposed": ((7, 12), Layout(transposed=True)),
    "qkv": ((18, 6), Layout(split=(6, 6, 6))),
    "gru gates": ((12, 4), Layout(split=(4, 4, 4))),
    "grouped-query attention": ((16, 8), Layout(split=(8, 4, 4))),
    "unequal, all different": ((12, 5), Layout(split=(6, 4, 2))),
    "qkv stored transposed": ((6, 18), Layout(transposed=True, split=(6, 6, 6))),
    "unequal stored transposed": ((6, 16), Layout(transposed=True, split=(8, 4, 4))),
    "qkv by head": ((24, 5), Layout(split=(2, 2, 2), repeats=4)),
    "gate and up interleaved": ((16, 5), Layout(split=(1, 1), repeats=8)),
    "unequal by head": ((20, 6), Layout(split=(3, 1, 1), repeats=4)),
    "experts": ((4, 6, 9), Layout(batch_dims=1)),
    "experts stored transposed": ((4, 6, 9), Layout(batch_dims=1, transposed=True)),
    "experts of experts": ((2, 3, 6, 4), Layout(batch_dims=2)),
    "experts gate and up": ((3, 12, 5), Layout(batch_dims=1, split=(6, 6))),
    "experts gate and up interleaved": ((3, 5, 12), Layout(batch_dims=1, transposed=True, split=(1, 1), repeats=6)),
    "experts unequal": ((2, 9, 5), Layout(batch_dims=1, split=(5, 4))),
    "conv2d split": ((12, 3, 2, 2), Layout(split=(4, 4, 4))),
    "conv2d split unequal": ((12, 3, 2, 2), Layout(split=(8, 4))),
    "conv_transpose2d split": ((5, 12, 2, 2), Layout(transposed=True, split=(4, 8))),
}


def test_reference_reads_each_element_once() -> None:
    for name, (shape, layout) in LAYOUTS.items():
        indices = torch.cat([index.flatten() for index in reference.matrix_indices(shape, layout)])
        assert torch.equal(indices.sort().values, torch.arange(math.prod(shape))), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str) -> None:
    """With the scale that tells rows from columns: root of m / n."""
    shape, layout = LAYOUTS[name]
    weights, grads = random_problem([shape, shape])
    assert_equal_to_reference(weights, grads, [layout, layout], lr_scale="spectral", cautious=True)


@pytest.mark.parametrize("missing", ["none", "some"])
def test_all_layouts_in_one_group(missing: str) -> None:
    """Blocks of different parameters share stacks; each still takes its own update."""
    shapes = [shape for shape, _ in LAYOUTS.values()]
    layouts = [layout for _, layout in LAYOUTS.values()]
    weights, grads = random_problem(shapes)
    if missing == "some":
        for k, row in enumerate(grads):
            row[k :: len(grads)] = [None] * len(row[k :: len(grads)])
    assert_equal_to_reference(weights, grads, layouts)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if Layout(*()) != LAYOUTS[name][1]])
def test_resume_in_every_layout(name: str) -> None:
    """State of every layout survives a save and a load bit for bit."""
    shape, layout = LAYOUTS[name]
    weights, grads = random_problem([shape, shape])

    def build(values: Sequence[Tensor]) -> tuple[list[nn.Parameter], Muon]:
        params = [nn.Parameter(value.clone()) for value in values]
        group = {"params": params, "layouts": [package_layout(layout)] * 2}
        return params, Muon([group], lr=0.02, orthogonalize_dtype="float32")

    def advance(params: Sequence[nn.Parameter], optimizer: Muon, rows: Sequence[Sequence[Tensor]]) -> None:
        for row in rows:
            for param, grad in zip(params, row, strict=True):
                param.grad = grad.clone()
            optimizer.step()

    params, optimizer = build(weights)
    advance(params, optimizer, grads[:3])
    resumed, other = build([param.detach() for param in params])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(params, optimizer, grads[3:])
    advance(resumed, other, grads[3:])
    for param, again in zip(params, resumed, strict=True):
        assert torch.equal(param, again)


SEPARABLE = {
    "equal": ((18, 6), MatrixLayout(split=(6, 6, 6)), (6, 6, 6)),
    "unequal": ((16, 8), MatrixLayout(split=(8, 4, 4)), (8, 4, 4)),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_fused_with_split_equals_separate(name: str) -> None:
    """Fault 24, with blocks of gradients as different as in a fused q/k/v."""
    shape, layout, sizes = SEPARABLE[name]
    weight = torch.randn(shape)
    fused = nn.Parameter(weight.clone())
    parts = [nn.Parameter(part.clone()) for part in weight.split(sizes)]
    options: dict[str, Any] = {"lr": 0.02, "lr_scale": "spectral", "orthogonalize_dtype": "float32"}
    whole = Muon([{"params": [fused], "layouts": [layout]}], **options)
    separate = Muon(parts, **options)
    block_scale = torch.cat(
        [torch.full((size, 1), scale) for size, scale in zip(sizes, (1.0, 1e-2, 1e-4), strict=True)]
    )
    for _ in range(5):
        grad = torch.randn(shape) * block_scale
        fused.grad = grad.clone()
        for part, piece in zip(parts, grad.split(sizes), strict=True):
            part.grad = piece.clone()
        whole.step()
        separate.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]), rtol=0, atol=1e-7)


def test_a_small_block_moves_as_far_as_a_large_one() -> None:
    """Fault 24: without split the block with the largest gradient takes the update of the others."""
    fused = nn.Parameter(torch.zeros(18, 6))
    group = {"params": [fused], "layouts": [MatrixLayout(split=(6, 6, 6))]}
    optimizer = Muon([group], lr=1.0, method="svd", orthogonalize_dtype="float32")
    fused.grad = torch.randn(18, 6) * torch.tensor([1.0, 1e-2, 1e-2]).repeat_interleave(6)[:, None]
    optimizer.step()
    norms = [float(block.norm()) for block in fused.detach().split(6)]
    assert norms == pytest.approx([0.2 * 6] * 3, rel=1e-4)


@pytest.mark.parametrize("kernel", [(8, 3, 3, 3), (16, 2, 5), (4, 2, 2, 2, 2)], ids=["conv2d", "conv1d", "conv3d"])
def test_convolution_equals_its_flattened_linear(kernel: tuple[int, ...]) -> None:
    """Fault 25: the scale is that of (out, in * kernel), not of the kernel's last two dimensions."""
    weight = torch.randn(kernel)
    conv, linear = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    options: dict[str, Any] = {"lr": 0.02, "lr_scale": "spectral", "orthogonalize_dtype": "float32"}
    first = Muon([{"params": [conv], "layouts": [MatrixLayout()]}], **options)
    second = Muon([linear], **options)
    for _ in range(3):
        conv.grad = torch.randn(kernel)
        linear.grad = conv.grad.flatten(1).clone()
        first.step()
        second.step()
    torch.testing.assert_close(conv.detach().flatten(1), linear.detach(), rtol=0, atol=1e-7)


def test_stored_transposed_equals_the_transpose() -> None:
    """m and n mean fan-out and fan-in, whichever way the tensor is stored."""
    weight = torch.randn(7, 12)
    straight, stored = nn.Parameter(weight.clone()), nn.Parameter(weight.T.contiguous().clone())
    options: dict[str, Any] = {"lr": 0.02, "lr_scale": "spectral", "orthogonalize_dtype": "float32"}
    first = Muon([straight], **options)
    second = Muon([{"params": [stored], "layouts": [MatrixLayout(transposed=True)]}], **options)
    for _ in range(3):
        straight.grad = torch.randn(7, 12)
        stored.grad = straight.grad.T.contiguous().clone()
        first.step()
        second.step()
    torch.testing.assert_close(straight.detach(), stored.detach().T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", reference.METHODS)
def test_update_has_the_promised_size(method: str) -> None:
    """RMS 0.2 of AdamW's with match_rms_adamw; fault 29: the spectrum of the update is flat."""
    weight = nn.Parameter(torch.zeros(16, 40))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, method=method, orthogonalize_dtype="float32")
    weight.grad = torch.randn(16, 40) * 1e-4
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * math.sqrt(40))
    assert values.min() > 0.65
    assert values.max() < 1.35
    rms = weight.detach().square().mean().sqrt()
    assert 0.2 * 0.65 < rms < 0.2 * 1.35
    assert (weight.detach() * weight.grad).sum() < 0
