"""Sites of the parameters of a module: every name of every parameter, with the module that owns it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.optim.swa_utils import AveragedModel

from lightning_muon.partition.names import WRAPPER_NAMES

_WRAPPER_TYPES = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_FABRIC_NAMES = {"_forward_module", "_original_module"}
_ADAPTER_NAMES = {"base_layer", "original_module", "modules_to_save"}
# Words in the name of a parametrization that rescales, adds to or masks the tensor, so that the trained tensor is still
# a matrix. "Sparse" alone shows nothing: a sparse code is not a mask.
_SAFE_WORDS = re.compile(
    r"(weight|spectral)norm(ed|alized|alization)?|lora|mask(s|ed|ing)?|prun(e|ed|er|ing)|sparsi(ty|fy|fied|fier|fication)"
)
# Words for a weight that is any other function of the tensor; they override the safe words, as in MaskedSymmetric.
_UNSAFE_WORDS = re.compile(
    r"(anti|skew)?sym(metr\w*)?|skew|ortho\w*|unitary|stiefel|grassmann\w*|householder|cayley|givens|rotations?"
    r"|(soft|sparse|ent)max|simplex|sinkhorn|doublystochastic|expm?|exponential|matrixexp|cholesky|psd|spd|definite"
    r"|positive|nonnegative|softplus|sigmoid|tanh|relu|abs|square|circulant|toeplitz|kronecker"
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a parameter is registered; a shared parameter has several.

    Args:
        parameter: the parameter.
        name: its full name, without the prefixes that wrappers add.
        owner: the module whose type determines the role; under a parametrization, the parametrized module.
        path: names of the owner and of the modules around it, outermost first, without wrappers; empty for the root.
        parents: the modules around the owner, outermost first, one for each name in ``path``.
        local: the owner's name for the tensor, e.g. ``"weight"`` even if it is stored as ``weight_v``.
        part: which part of a weight-normalised tensor this is; empty for a tensor that is stored whole.
        recipe: the parametrization that computes the layer's weight from this tensor, if the tensor is not a weight.
    """

    parameter: nn.Parameter
    name: str
    owner: nn.Module
    path: tuple[str, ...]
    parents: tuple[nn.Module, ...]
    local: str
    part: Literal["", "direction", "magnitude"] = ""
    recipe: nn.Module | None = None

    @property
    def owner_name(self) -> str:
        """The owner's name in its parent; layers that adapters such as peft put around the owner are skipped."""
        return self._outside_adapters()[0]

    @property
    def parent(self) -> nn.Module | None:
        """The module around the owner and its adapters; None at the root."""
        return self._outside_adapters()[1]

    def _outside_adapters(self) -> tuple[str, nn.Module | None]:
        for depth in range(len(self.path) - 1, -1, -1):
            inside_dict = depth > 0 and self.path[depth - 1] in _ADAPTER_NAMES
            # litgpt keeps the layer under LoRA as ``linear``.
            inside_lora = self.path[depth] == "linear" and type(self.parents[depth]).__name__.startswith("LoRA")
            if self.path[depth] not in _ADAPTER_NAMES and not inside_dict and not inside_lora:
                return self.path[depth], self.parents[depth]
        return "", None


def walk(module: nn.Module) -> list[Site]:
    """Return the sites of all parameters, in the order of ``module.named_parameters(remove_duplicate=False)``."""
    return list(_visit(module, (), ()))


def _visit(module: nn.Module, path: tuple[str, ...], parents: tuple[nn.Module, ...]) -> Iterator[Site]:
    for tensor_name, parameter in module._parameters.items():
        if parameter is not None:
            yield _site(module, tensor_name, parameter, path, parents)
    for child_name, child in module._modules.items():
        if child is None:
            continue
        if _is_wrapper(module, child_name):
            yield from _visit(child, path, parents)
        else:
            yield from _visit(child, (*path, child_name), (*parents, module))


def _is_wrapper(module: nn.Module, child_name: str) -> bool:
    """Whether the module only wraps this child, so that the user never wrote the child's name."""
    if child_name in WRAPPER_NAMES:
        return True
    if child_name == "module":
        return isinstance(module, _WRAPPER_TYPES)
    return child_name in _FABRIC_NAMES and type(module).__name__.endswith("_FabricModule")


def _site(
    module: nn.Module, tensor_name: str, parameter: nn.Parameter, path: tuple[str, ...], parents: tuple[nn.Module, ...]
) -> Site:
    name = ".".join((*path, tensor_name))
    if isinstance(module, parametrize.ParametrizationList):
        # <owner>.parametrizations.<tensor>.original*: the owner is two levels up.
        owner, local = parents[-2], path[-1]
        part: Literal["", "direction", "magnitude"] = ""
        if any(isinstance(parametrization, _WeightNorm) for parametrization in module):
            part = "magnitude" if tensor_name == "original0" else "direction"
        recipe = next((recipe for recipe in module if not _is_safe(recipe)), None)
        return Site(parameter, name, owner, path[:-2], parents[:-2], local, part, recipe)
    for suffix, part in (("_g", "magnitude"), ("_v", "direction")):
        stem = tensor_name.removesuffix(suffix)
        if stem != tensor_name and {f"{stem}_g", f"{stem}_v"} <= module._parameters.keys():
            return Site(parameter, name, module, path, parents, stem, part)
    # The older spectral norm and pruning keep the weight as weight_orig.
    return Site(parameter, name, module, path, parents, tensor_name.removesuffix("_orig"))


def _is_safe(recipe: nn.Module) -> bool:
    """Whether a parametrization only scales, adds to or masks the trained tensor, which stays a matrix.

    The names of its class and of the bases decide. A name in doubt is not safe.
    """
    words = [word for base in type(recipe).__mro__ for word in _words(base.__name__)]
    return any(map(_SAFE_WORDS.fullmatch, words)) and not any(map(_UNSAFE_WORDS.fullmatch, words))


def _words(name: str) -> list[str]:
    """Return the words of a class name in lower case, and joined neighbours: ``SoftMax`` also gives ``softmax``."""
    words = [word.lower() for word in _WORDS.findall(name.replace("LoRA", "Lora"))]
    return words + [first + second for first, second in itertools.pairwise(words)]
