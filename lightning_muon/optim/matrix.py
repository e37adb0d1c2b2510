"""MatrixOptimizer: the base class of all optimizers for matrices."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim.apply import decay, decay_by, split_like, subtract
from lightning_muon.optim.arguments import (
    OPTIMIZER_KEY,
    WRITTEN_BY_OTHERS,
    check_choice,
    check_dtype,
    check_non_negative,
    check_option_names,
    checked_layout,
    class_label,
    parameter_names,
    plain_option,
    unique_names,
)
from lightning_muon.optim.checkpoint import (
    check_classes,
    check_entries,
    check_form,
    restore_exactly,
)
from lightning_muon.optim.gradients import check_dense, nonfinite_parameters
from lightning_muon.optim.observing import StackUpdate, UpdateObserver
from lightning_muon.optim.rollback import unchanged_on_error
from lightning_muon.optim.stacks import MatrixStack, StackMember, build_stacks, consecutive
from lightning_muon.partition import MatrixLayout

LRScale: TypeAlias = Literal["match_rms_adamw", "original", "spectral", "none"]
NonFinite: TypeAlias = Literal["propagate", "raise", "skip"]

_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def shape_scale(lr_scale: str, m: int, n: int) -> float:
    """The factor s(m, n) of a shape scale for m rows (fan-out) and n columns (fan-in)."""
    return _SCALES[lr_scale](m, n)


class MatrixOptimizer(Optimizer):
    r"""Base class of the optimizers for matrices. It does everything in a step except the rule itself.

    A step reads every gradient as matrices (:class:`~lightning_muon.partition.MatrixLayout`) and stacks the matrices of
    one shape as one (B, m, n) tensor. The rule returns a direction :math:`D` for each stack. With learning rate
    :math:`\eta`, shape scale :math:`s(m, n)` and weight decay :math:`\lambda`, the update is

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta\, s(m, n)\, D.

    A rule is a subclass with two methods, :meth:`init_state` and :meth:`direction`. Rules with momentum derive from
    :class:`MomentumOptimizer`, rules that orthogonalize from :class:`OrthogonalizingOptimizer`. Gradients are never
    modified. Parameters without a gradient do not change.

    Args:
        params: parameters or param groups, as in ``torch.optim``. A group may hold ``"layouts"``, one
            :class:`~lightning_muon.partition.MatrixLayout` per parameter; without it all parameters must be 2-D. See
            :meth:`HybridOptimizer.from_module` for modules.
        defaults: default values of the group options: ``lr``, ``weight_decay`` (0 if left out) and those of the rule.
        lr_scale: shape scale for m rows (fan-out) and n columns (fan-in): ``"match_rms_adamw"``
            :math:`0.2\sqrt{\max(m, n)}`, with which AdamW's learning rates carry over (arXiv 2502.16982);
            ``"original"`` :math:`\sqrt{\max(1, m/n)}`; ``"spectral"`` :math:`\sqrt{m/n}`; ``"none"`` 1.
        cautious: decay only the elements of W that the update also moves towards zero (arXiv 2510.12402).
        state_dtype: dtype of the state, e.g. ``"float32"`` or ``torch.bfloat16``; None for the dtype of
            each parameter. float64 parameters always have float64 state.
        nonfinite: what to do about NaN or infinity in a gradient. ``"propagate"``: update as in ``torch.optim``.
            ``"skip"``: do not change that parameter and its state. ``"raise"``: raise ``FloatingPointError`` before
            anything changes. The last two synchronize with the device once per step. In a :class:`HybridOptimizer`,
            ``"skip"`` protects the matrices, but not the parameters of the other optimizer.

    Raises:
        ValueError: if an option is out of range, if a param group has an option that the constructor does not take, or
            if a parameter cannot be read as matrices.
        TypeError: for a parameter that is not a floating-point tensor, or is sharded (``DTensor``).
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        lr_scale: LRScale = "match_rms_adamw",
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        self.layouts: dict[Tensor, MatrixLayout] = {}  # may have parameters that are in no group
        self._stacks: list[list[MatrixStack]] = []
        self._signatures: list[list[tuple[int, torch.dtype, torch.device]]] = []
        self._observers: OrderedDict[int, UpdateObserver] = OrderedDict()
        shared = {"lr_scale": lr_scale, "cautious": cautious, "state_dtype": state_dtype, "nonfinite": nonfinite}
        super().__init__(params, {"weight_decay": 0.0, **defaults, **shared})

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of a stack before its first step.

        Args:
            stack: the weights (B, m, n), in the state's dtype; a copy.
            group: the options of the param group.

        Returns:
            Tensors of shape (B, ...): (B, m, n) for elementwise state, (B,) for one scalar per matrix. An empty dict
            for a rule without state.
        """
        raise NotImplementedError

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Return the direction D (B, m, n) that the step subtracts, before learning rate and shape scale: the rule.

        Args:
            grad: gradients (B, m, n) in the state's dtype; a copy that may be overwritten.
            state: the state from :meth:`init_state`; update it in place.
            group: the options of the param group.
        """
        raise NotImplementedError

    def decay_factor(self, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor | None:
        """Return the factor of the weight decay; None for 1. It is called after :meth:`direction`.

        Returns:
            A tensor that broadcasts to (B, m, n): one factor per matrix, row or column.
        """
        return None

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ``ValueError`` if an option of a param group is out of range. Rules extend this method."""
        check_non_negative(group, "lr")
        check_non_negative(group, "weight_decay")
        check_choice(group, "lr_scale", tuple(_SCALES))
        check_choice(group, "nonfinite", ("propagate", "raise", "skip"))
        check_choice(group, "cautious", (False, True))
        check_dtype(group, "state_dtype")
        if group.get("use_muon") is False:
            raise ValueError(
                f"use_muon=False asks {type(self).__name__} to leave a param group to Adam, but it orthogonalizes or "
                "rescales all it is given: use HybridOptimizer, which has another optimizer for the rest."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in ``torch.optim``. ``"layouts"`` may hold one layout per parameter.

        Raises:
            ValueError: if the group has an option that the constructor does not take, and as the constructor.
            TypeError: if ``param_group`` is not a dict, and as the constructor.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_option_names(self, param_group, WRITTEN_BY_OTHERS)
        param_group = {**param_group, OPTIMIZER_KEY: class_label(self)}
        layouts = param_group.pop("layouts", None)
        super().add_param_group(param_group)
        try:
            self.check_group(param_group)
            param_group.update({key: plain_option(param_group[key]) for key in self.defaults})
            self.layouts.update(self._checked_layouts(param_group, layouts))
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step.

        Args:
            closure: re-evaluates the model and returns the loss. It runs first, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Check everything before any weight changes.
        self._refresh_stacks()
        check_dense(self.param_groups)
        nonfinite = nonfinite_parameters(self.param_groups)
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for stack in stacks:
                self._step_stack(stack, group, nonfinite)
        return loss

    def observe_updates(self, observer: UpdateObserver) -> RemovableHandle:
        """Call ``observer(update)`` at each step, for each stack of matrices, before the weights change.

        The :class:`StackUpdate` has the ``members``, ``direction`` (B, m, n) and ``scale`` of the step. The step uses
        the memory of the direction again: do not write to it, and clone what you keep. A step calls an observer
        several times: once for each shape, dtype and device of a param group, more often for many or large matrices.

        Returns:
            A handle whose ``remove()`` removes the observer. Without observers there is no extra cost.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def parameter_names(self) -> dict[Tensor, str]:
        """The name of each parameter, as observers get it. Names are unique over all groups."""
        return unique_names(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in ``torch.optim``, but copy its tensors and keep their dtypes.

        Raises:
            ValueError: if the state does not fit the parameters, or was saved by another rule. Nothing changes then.
        """
        with unchanged_on_error(self):
            saved = check_form(state_dict)
            super().load_state_dict(state_dict)
            restore_exactly(self, state_dict, self.param_groups)
            loaded = {parameter: set(state) for parameter, state in self.state.items() if state}
            try:
                stacks = self._bind_loaded_state() if loaded else []
            except ValueError:
                check_classes(saved, self)  # its message is more useful
                raise
            check_entries(loaded, stacks, self, saved)
            check_classes(saved, self)

    def _bind_loaded_state(self) -> list[MatrixStack]:
        """Bind the loaded state and return its stacks.

        Parameters that have a state but are frozen now are bound on a copy, only to check their state.

        Raises:
            ValueError: if the state does not fit the parameters, e.g. because it belongs to another model.
        """
        self._refresh_stacks()
        stacks = [stack for stacks in self._stacks for stack in stacks]
        for group in self.param_groups:
            idle = [p for p in group["params"] if not _takes_part(p) and self.state.get(p)]
            copied = defaultdict(dict, {parameter: dict(self.state[parameter]) for parameter in idle})
            frozen = self._stacks_of(idle, group)
            for stack in frozen:
                stack.bind(copied, self.init_state, group)
            stacks += frozen
        return stacks

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "layouts": self.layouts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # States saved by an older version, or by torch.optim.Muon, lack some options. On unpickling, the
        # base class adds "differentiable" to its defaults; it is not an option of this class.
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            for key in defaults.keys() - {"differentiable"}:
                group.setdefault(key, defaults[key])
            group[OPTIMIZER_KEY] = class_label(self)
        super().__setstate__(state)
        self._stacks, self._signatures = [], []
        self.__dict__.setdefault("_observers", OrderedDict())

    def _checked_layouts(
        self, group: dict[str, Any], layouts: Sequence[MatrixLayout] | None
    ) -> dict[Tensor, MatrixLayout]:
        """The layout of each parameter of a new group: from ``layouts``, else ``self.layouts``, else a 2-D matrix."""
        parameters = group["params"]
        if layouts is not None and len(layouts) != len(parameters):
            raise ValueError(f"A group of {len(parameters)} parameters needs as many layouts, got {len(layouts)}.")
        wanted = [self.layouts.get(parameter) for parameter in parameters] if layouts is None else layouts
        return {
            parameter: checked_layout(parameter, name, layout)
            for parameter, name, layout in zip(parameters, parameter_names(group), wanted, strict=True)
        }

    def _refresh_stacks(self) -> None:
        """Rebuild the stacks if the trainable parameters have changed, and bind them to ``self.state``."""
        del self._stacks[len(self.param_groups) :], self._signatures[len(self.param_groups) :]
        for index, group in enumerate(self.param_groups):
            active = [p for p in group["params"] if _takes_part(p)]
            signature = [(id(p), p.dtype, p.device) for p in active]
            if index == len(self._stacks):
                self._stacks.append([])
                self._signatures.append([])
            if signature != self._signatures[index]:
                self._stacks[index] = self._stacks_of(active, group)
                self._signatures[index] = signature
            for stack in self._stacks[index]:
                stack.bind(self.state, self.init_state, group)

    def _stacks_of(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[MatrixStack]:
        name_of = self.parameter_names()
        dtype = None if group["state_dtype"] is None else getattr(torch, group["state_dtype"])
        names, layouts = [name_of[p] for p in parameters], [self.layouts[p] for p in parameters]
        return build_stacks(parameters, names, layouts, dtype)

    def _step_stack(self, stack: MatrixStack, group: dict[str, Any], nonfinite: set[Tensor]) -> None:
        members = [m for m in stack.members if m.parameter.grad is not None and m.parameter not in nonfinite]
        if not members:
            return
        if len(members) == len(stack.members):
            self._move(stack, members, stack.state, group)
        else:
            state, index = stack.take(members)
            self._move(stack, members, state, group)
            stack.put(index, state)

    def _move(
        self, stack: MatrixStack, members: list[StackMember], state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """Apply the rule to members of a stack. All of them have gradients."""
        direction = self.direction(stack.gather_grads(members), state, group)
        self._check_answer("direction", direction, members, stack)
        factor = self.decay_factor(state, group) if group["weight_decay"] != 0 else None
        scale = shape_scale(group["lr_scale"], *stack.shape)
        targets = [member.target(member.parameter) for member in members]
        direction = direction.to(targets[0].dtype)
        if self._observers:
            self._tell(StackUpdate(consecutive(members), direction, scale))
        parts = split_like(direction, members, targets)
        if group["weight_decay"] != 0:
            amount = group["lr"] * group["weight_decay"]
            if factor is None:
                decay(targets, parts, amount, group["cautious"])
            else:
                amounts = split_like((amount * factor).expand_as(direction), members, targets)
                decay_by(targets, parts, amounts, group["cautious"])
        subtract(targets, parts, group["lr"] * scale)

    def _tell(self, update: StackUpdate) -> None:
        for observer in list(self._observers.values()):
            observer(update)

    def _check_answer(self, method: str, answer: Any, members: list[StackMember], stack: MatrixStack) -> None:
        """Raise ``ValueError`` unless a rule returned one matrix for each matrix of the members."""
        expected = (sum(member.count for member in members), *stack.shape)
        if not isinstance(answer, Tensor) or answer.shape != expected:
            found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"{type(self).__name__}.{method} must return a tensor of shape {expected}, that of the gradients, here "
                f"for {members[0].name!r}; it returned {found}."
            )


def _takes_part(parameter: Tensor) -> bool:
    """Whether a parameter is in the stacks. Frozen parameters are not, which saves memory."""
    return parameter.requires_grad or parameter.grad is not None
