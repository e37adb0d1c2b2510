"""Options that have to agree over the param groups of a hybrid: momentum and betas, and rates that follow another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_muon.optim.arguments import FOLLOWS_KEY


class MomentumAlias:
    """``momentum`` as another word for ``betas[0]``, in the groups of optimizers that have ``betas`` only.

    Generic code looks for ``momentum``: OneCycleLR cycles it, and LearningRateMonitor logs it. In groups with neither
    it is 0, so that none takes another child's from the defaults that the hybrid shows.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def add(self, group: dict[str, Any]) -> None:
        """Give a group a momentum if it has none."""
        group.setdefault("momentum", group["betas"][0] if "betas" in group else 0.0)

    def remember(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take the momenta of these groups as known: a later difference says who has changed."""
        self._seen = {id(group): group.get("momentum") for group in groups}

    def carry(self, groups: Iterable[dict[str, Any]]) -> None:
        """Carry a momentum that was set since to ``betas[0]``, or ``betas[0]`` to the momentum.

        Args:
            groups: those whose optimizer has no momentum of its own.
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
    """The momentum that the defaults of a hybrid show, under its name; empty if no child has one.

    ``betas`` stays out of them: with it schedulers would read and write ``betas`` of every group and miss Muon's
    momentum.
    """
    optimizers = list(optimizers)
    own = [child.defaults["momentum"] for child in optimizers if "momentum" in child.defaults]
    betas = [child.defaults["betas"][0] for child in optimizers if "betas" in child.defaults]
    return {"momentum": own[-1] if own else betas[0]} if own or betas else {}


class FollowedRates:
    """Learning rates of groups that were added together: those of the last go for all, until others are set too."""

    def __init__(self) -> None:
        self._followers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: dict[int, Any] = {}

    def remember(self, groups: Iterable[dict[str, Any]]) -> None:
        """Learn from the groups who follows whom, and take their rates as known."""
        named = {group["name"]: group for group in groups}
        self._followers = [(g, named[g[FOLLOWS_KEY]]) for g in named.values() if g.get(FOLLOWS_KEY) in named]
        self._seen = {id(group): group.get("lr") for pair in self._followers for group in pair}

    def carry(self) -> None:
        """Carry a rate that was set since to the groups that follow, if their own was not set."""
        for group, leader in self._followers:
            if leader["lr"] != self._seen[id(leader)] and group["lr"] == self._seen[id(group)]:
                group["lr"] = leader["lr"]
        self._seen.update({id(group): group["lr"] for pair in self._followers for group in pair})
