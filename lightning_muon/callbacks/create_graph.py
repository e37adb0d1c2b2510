"""CreateGraph: gradients that can be differentiated again."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class CreateGraph(Callback):
    """Keeps the graph of each backward pass of a fit, for optimizers that estimate the Hessian: SophiaH, AdaHessian.

    That takes about the time and the memory of a second backward pass. A module that overrides ``backward`` is not
    changed: it has to pass ``create_graph=True`` itself. A module with :class:`lightning_muon.MuonMixin` and one under
    ``MuonCLI`` get this callback automatically if an optimizer needs it.

    Example::

        >>> trainer = Trainer(callbacks=[CreateGraph()])
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A Trainer keeps its callbacks for later fits, of other modules too.
        if not any(getattr(optimizer, "differentiates_gradients", True) for optimizer in trainer.optimizers):
            return
        # torch warns of a cycle of weights and gradients. Trainers break it: they set the gradients to None.
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        owner = next(cls for cls in type(pl_module).__mro__ if "backward" in vars(cls))
        if owner.__name__ == "LightningModule" and "backward" not in vars(pl_module):
            pl_module.backward = MethodType(_backward, pl_module)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _restore(pl_module)


def _backward(module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    type(module).backward(module, loss, *args, **{"create_graph": True, **kwargs})


def _restore(module: LightningModule) -> None:
    replaced = vars(module).get("backward")
    if isinstance(replaced, MethodType) and replaced.__func__ is _backward:
        del module.backward
