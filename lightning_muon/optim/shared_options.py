"""Options that a hybrid optimizer keeps in agreement: ``momentum`` with ``betas``, and learning rates that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_muon.optim.arguments import FOLLOWS_KEY


class MomentumAlias:
    """``momentum`` as an alias of ``betas[0]``, in the groups of optimizers that have only ``betas``.

    Other code reads ``momentum``: OneCycleLR cycles it, and LearningRateMonitor logs it. In groups with neither option
    it is 0, so that they do not get the momentum of another child from the ``defaults`` of the hybrid.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def add(self, group: dict[str, Any]) -> None:
        """Add ``momentum`` to a group that has none."""
        group.setdefault("momentum", group["betas"][0] if "betas" in group else 0.0)

    def remember(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Store the ``momentum`` of these groups, to detect later changes."""
        self._seen = {id(group): group.get("momentum") for group in groups}

    def carry(self, groups: Iterable[dict[str, Any]]) -> None:
        """Copy ``momentum`` to ``betas[0]`` if ``momentum`` has changed, else ``betas[0]`` to ``momentum``.

        Args:
            groups: the groups whose optimizer has no ``momentum`` of its own.
        """
        for group in groups:
            if "betas" not in group or "momentum" not in group or group["momentum"] == group["betas"][0]:
                continue
            if group["momentum"] != self._seen.get(id(group), group["momentum"]):
                group["betas"] = (group["momentum"], *group["betas"][1:])
            else:
                group["momentum"] = group["betas"][0]
            self._seen[id(group)] = group["momentum"]


def default_momentum(optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """The ``momentum`` for the ``defaults`` of a hybrid, as a dict; empty if no child has one.

    ``betas`` is left out: with it schedulers would read and write ``betas`` of every group, and not Muon's
    ``momentum``.
    """
    optimizers = list(optimizers)
    own = [child.defaults["momentum"] for child in optimizers if "momentum" in child.defaults]
    betas = [child.defaults["betas"][0] for child in optimizers if "betas" in child.defaults]
    return {"momentum": own[-1] if own else betas[0]} if own or betas else {}


class FollowedRates:
    """Learning rates of groups that were added together. They follow the last group until their own ``lr`` is set."""

    def __init__(self) -> None:
        self._followers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: dict[int, Any] = {}

    def remember(self, groups: Iterable[dict[str, Any]]) -> None:
        """Find which group follows which, and store their learning rates, to detect later changes."""
        named = {group["name"]: group for group in groups}
        self._followers = [(g, named[g[FOLLOWS_KEY]]) for g in named.values() if g.get(FOLLOWS_KEY) in named]
        self._seen = {id(group): group.get("lr") for pair in self._followers for group in pair}

    def carry(self) -> None:
        """Copy a changed learning rate to the groups that follow, unless their own was changed too."""
        for group, leader in self._followers:
            if leader["lr"] != self._seen[id(leader)] and group["lr"] == self._seen[id(group)]:
                group["lr"] = leader["lr"]
        self._seen.update({id(group): group["lr"] for pair in self._followers for group in pair})
