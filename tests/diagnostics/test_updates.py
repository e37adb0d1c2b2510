"""UpdateCapture: the updates of one step, kept as the step had them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_muon.diagnostics.matrices import WatchedParameter
from lightning_muon.diagnostics.probe import Depth, MatrixProbe, Measurement
from lightning_muon.diagnostics.updates import UpdateCapture
from lightning_muon.optim import HybridOptimizer, MatrixOptimizer, Muon
from lightning_muon.partition import MatrixLayout
from tests.optim.observed import by_name


class OwnMemory(MatrixOptimizer):
    """A rule that answers with its state, which the next step overwrites."""

    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def init_state(self, stack: Tensor, group: dict[str, object]) -> dict[str, Tensor]:
        return {"sum": torch.zeros_like(stack)}

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, object]) -> Tensor:
        return state["sum"].add_(grad)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    set_grads(params)
    return params


def set_grads(params: Sequence[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.randn(param.shape)


def test_a_stack_is_kept_whole_and_once() -> None:
    params = parameters((4, 5), (4, 5), (4, 5))
    optimizer = Muon(params)
    capture = UpdateCapture(optimizer, set(params))
    optimizer.step()
    capture.close()
    (stack,) = capture.stacks
    assert [member.parameter for member in stack.members] == params
    assert stack.direction.shape == (3, 4, 5)
    assert not capture.differences


def test_only_what_is_asked_for_is_kept() -> None:
    params = parameters((4, 5), (4, 5), (4, 5))
    optimizer = Muon([("0", params[0]), ("1", params[1]), ("2", params[2])])
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    capture = UpdateCapture(optimizer, {params[0], params[2]})
    optimizer.step()
    capture.close()
    (stack,) = capture.stacks
    assert [member.parameter for member in stack.members] == [params[0], params[2]]
    assert torch.equal(stack.direction * stack.scale, torch.stack([seen["0"], seen["2"]]))


def test_the_first_step_counts_though_the_next_reuses_its_memory() -> None:
    (param,) = parameters((4, 5))
    optimizer = OwnMemory([param])
    capture = UpdateCapture(optimizer, {param})
    optimizer.step()
    first = capture.in_shape_of(param)
    assert first is not None
    expected = first.clone()
    set_grads([param])
    optimizer.step()
    capture.close()
    assert torch.equal(capture.in_shape_of(param), expected)
    assert len(capture.stacks) == 1


def test_updates_in_the_shape_of_any_parameter() -> None:
    """Blocks of a fused one are put together; of another optimizer it is the difference; None for one that stays."""
    fused, other, still = parameters((9, 4), (3, 4), (5, 5))
    still.grad = None
    matrix = Muon(
        [{"params": [("fused", fused), ("still", still)], "layouts": [MatrixLayout(split=(4, 5)), MatrixLayout()]}]
    )
    hybrid = HybridOptimizer({"other": SGD([("other", other)], lr=0.5), "matrix": matrix})
    seen: dict[str, Tensor] = {}
    hybrid.observe_updates(by_name(seen.__setitem__))
    capture = UpdateCapture(hybrid, {fused, other, still})
    hybrid.step()
    capture.close()
    assert torch.equal(capture.in_shape_of(fused), seen["fused"])
    torch.testing.assert_close(capture.in_shape_of(other), 0.5 * other.grad)
    assert capture.in_shape_of(still) is None


@pytest.mark.parametrize("layout", [MatrixLayout(split=(4, 4)), MatrixLayout(transposed=True), MatrixLayout()])
def test_a_monitor_may_read_a_parameter_in_another_layout_than_its_optimizer(layout: MatrixLayout) -> None:
    (param,) = parameters((8, 5))
    optimizer = Muon([("w", param)])
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    watched = WatchedParameter("w", param, layout)
    probe = MatrixProbe([watched], [lambda step: {("update", name): Depth.SPECTRUM for name in watched.shapes}])
    probe.before_step(0, optimizer)
    optimizer.step()
    found = singular_values(probe.after_step(0))
    expected = torch.cat(layout.read(seen["w"]))
    assert list(found) == list(watched.shapes)
    for values, matrix in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(values, torch.linalg.svdvals(matrix))


def test_a_stack_of_which_not_all_is_planned_is_measured_in_parts() -> None:
    params = parameters((4, 5), (4, 5), (4, 5))
    optimizer = Muon([(str(index), param) for index, param in enumerate(params)])
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    watched = [WatchedParameter(str(index), param, MatrixLayout()) for index, param in enumerate(params)]
    plan = {("update", "0"): Depth.SPECTRUM, ("update", "1"): Depth.NORM, ("update", "2"): Depth.SPECTRUM}
    probe = MatrixProbe(watched, [lambda step: plan])
    probe.before_step(0, optimizer)
    optimizer.step()
    measured = probe.after_step(0)
    assert {tuple(one.names): one.depth for one in measured} == {("0", "2"): Depth.SPECTRUM, ("1",): Depth.NORM}
    for name, values in singular_values(measured).items():
        torch.testing.assert_close(values, torch.linalg.svdvals(seen[name]))


def singular_values(measured: Sequence[Measurement]) -> dict[str, Tensor]:
    return {
        name: values
        for one in measured
        if one.spectra.singular_values is not None
        for name, values in zip(one.names, one.spectra.singular_values, strict=True)
    }
