"""MatrixLayout: every element once, views that write through, and refused input."""

from __future__ import annotations

import pytest
import torch

from lightning_muon.partition import MatrixLayout

CASES = [
    (MatrixLayout(), (6, 4), [(1, 6, 4)]),
    (MatrixLayout(), (6, 4, 3, 2), [(1, 6, 24)]),
    (MatrixLayout(transposed=True), (6, 4), [(1, 4, 6)]),
    (MatrixLayout(transposed=True), (6, 4, 3), [(1, 12, 6)]),
    (MatrixLayout(split=(2, 2, 2)), (6, 4), [(3, 2, 4)]),
    (MatrixLayout(split=(3, 2, 1)), (6, 4), [(1, 3, 4), (1, 2, 4), (1, 1, 4)]),
    (MatrixLayout(split=(1, 1, 1), repeats=2), (6, 4), [(3, 2, 4)]),
    (MatrixLayout(split=(2, 1), repeats=2), (6, 4), [(1, 4, 4), (1, 2, 4)]),
    (MatrixLayout(transposed=True, split=(3, 3)), (4, 6), [(2, 3, 4)]),
    (MatrixLayout(batch_dims=1), (5, 6, 4), [(5, 6, 4)]),
    (MatrixLayout(batch_dims=2), (5, 2, 6, 4), [(10, 6, 4)]),
    (MatrixLayout(batch_dims=1, transposed=True, split=(1, 1), repeats=3), (5, 4, 6), [(10, 3, 4)]),
    (MatrixLayout(groups=2), (6, 4, 3), [(2, 3, 12)]),
    (MatrixLayout(groups=2, transposed=True), (6, 4, 3), [(2, 12, 3)]),
    (MatrixLayout(batch_dims=1, split=(4, 2)), (5, 6, 4), [(5, 4, 4), (5, 2, 4)]),
]


def arange(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(("layout", "shape", "expected"), CASES)
def test_write_is_the_inverse_of_read(layout, shape, expected):
    tensor = arange(shape)
    matrices = layout.read(tensor)
    assert [tuple(matrix.shape) for matrix in matrices] == expected == layout.matrix_shapes(shape)
    assert torch.equal(torch.cat([matrix.flatten() for matrix in matrices]).sort().values, tensor.flatten())
    assert torch.equal(layout.write(matrices, shape), tensor)


@pytest.mark.parametrize(("layout", "shape", "expected"), CASES)
@pytest.mark.parametrize("strided", [False, True])
def test_views_write_through(layout, shape, expected, strided):
    tensor = arange((*shape[::-1],)).permute(*range(len(shape) - 1, -1, -1)) if strided else arange(shape)
    copies = [matrix.clone() for matrix in layout.read(tensor)]
    for view in layout.views(tensor):
        view.tensor.mul_(2)
    assert all(torch.equal(now, 2 * before) for now, before in zip(layout.read(tensor), copies, strict=True))


def test_rows_are_fan_out():
    """Each layout finds the maps that a fused linear layer applies."""
    q, k, v = torch.randn(3, 4, 5).unbind()
    assert torch.equal(MatrixLayout(split=(4, 4, 4)).read(torch.cat([q, k, v]))[0], torch.stack([q, k, v]))
    transposed = torch.cat([q, k, v]).T.contiguous()
    layout = MatrixLayout(transposed=True, split=(4, 4, 4))
    assert torch.equal(layout.read(transposed)[0], torch.stack([q, k, v]))
    by_head = torch.stack([torch.cat([m[:2] for m in (q, k, v)]), torch.cat([m[2:] for m in (q, k, v)])]).reshape(12, 5)
    layout = MatrixLayout(split=(2, 2, 2), repeats=2)
    assert torch.equal(layout.read(by_head)[0], torch.stack([q, k, v]))
    interleaved = torch.stack([q, k], dim=1).reshape(8, 5)
    assert torch.equal(MatrixLayout(split=(1, 1), repeats=4).read(interleaved)[0], torch.stack([q, k]))


@pytest.mark.parametrize(
    ("layout", "shape", "names"),
    [
        (MatrixLayout(), (6, 4), [["w"]]),
        (MatrixLayout(batch_dims=1), (2, 6, 4), [["w.0", "w.1"]]),
        (MatrixLayout(split=(3, 2, 1)), (6, 4), [["w.0"], ["w.1"], ["w.2"]]),
        (MatrixLayout(split=(2, 2, 2), blocks=("q", "k", "v")), (6, 4), [["w.q", "w.k", "w.v"]]),
        (MatrixLayout(split=(4, 1, 1), blocks=("q", "k", "v")), (6, 4), [["w.q"], ["w.k"], ["w.v"]]),
        (
            MatrixLayout(batch_dims=1, split=(1, 1), repeats=3, blocks=("gate", "up")),
            (2, 6, 4),
            [["w.0.gate", "w.0.up", "w.1.gate", "w.1.up"]],
        ),
        (
            MatrixLayout(batch_dims=1, split=(4, 2), blocks=("a", "b")),
            (2, 6, 4),
            [["w.0.a", "w.1.a"], ["w.0.b", "w.1.b"]],
        ),
    ],
)
def test_names_of_the_matrices(layout, shape, names):
    assert layout.matrix_names("w", shape) == names
    if layout.blocks:  # each is where its name says
        numbered = torch.arange(sum(layout.split) * layout.repeats) // layout.split[0] % len(layout.split)
        if len(set(layout.split)) == 1:
            stack = layout.read(numbered[:, None].expand(*shape).float().clone())[0]
            assert [layout.blocks[int(matrix[0, 0])] for matrix in stack] == [name.split(".")[-1] for name in names[0]]


def test_names_of_blocks_are_no_part_of_what_a_layout_is():
    assert MatrixLayout(split=(2, 2), blocks=("k", "v")) == MatrixLayout(split=(2, 2))


def test_grouped_convolution_reads_the_map_of_each_group():
    layer = torch.nn.Conv1d(4, 6, 1, groups=2, bias=False)
    first, second = MatrixLayout(groups=2).read(layer.weight.detach())[0]
    x = torch.randn(4)
    expected = torch.cat([first @ x[:2], second @ x[2:]])
    torch.testing.assert_close(layer(x[None, :, None]).flatten().detach(), expected)


def test_transposed_convolution_reads_the_map_from_its_input():
    layer = torch.nn.ConvTranspose1d(4, 3, 2, bias=False)
    (matrix,) = MatrixLayout(transposed=True).read(layer.weight.detach())[0]
    x = torch.randn(4)
    expected = (matrix @ x).reshape(3, 2)
    torch.testing.assert_close(layer(x[None, :, None])[0].detach(), expected)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(), (6,), "no matrices after 0 batch dimensions"),
        (MatrixLayout(batch_dims=1), (6, 4), "no matrices after 1 batch dimensions.*'other'"),
        (MatrixLayout(split=(2, 2)), (6, 4), r"split=\[2, 2\] covers 4 rows.*is 6"),
        (MatrixLayout(split=(2, 2), repeats=2), (6, 4), "covers 2 x 4 rows"),
        (MatrixLayout(transposed=True, split=(3, 3)), (6, 4), "is 4"),
        (MatrixLayout(groups=4), (6, 4), "groups=4 does not divide dimension 0"),
    ],
)
def test_layouts_that_do_not_fit(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        layout.check(shape)
    with pytest.raises(ValueError, match=message):
        layout.views(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_dims": -1}, "batch_dims must be 0 or more, got -1"),
        ({"groups": 0}, "groups=0"),
        ({"split": (2, 0)}, "Every size in split"),
        ({"repeats": 2}, "repeats=2 needs split"),
        ({"split": (2, 2), "blocks": ("q",)}, "blocks must name each size"),
    ],
)
def test_layouts_without_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        MatrixLayout(**fields)
