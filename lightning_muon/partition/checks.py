"""Errors for modules and parameters that cannot be partitioned, with what to use instead."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_muon.partition.sites import Site

_SPARSE_TYPES = (nn.Embedding, nn.EmbeddingBag)
_USE_DDP = "Use DDP instead, strategy='ddp' in Lightning, which keeps them whole."


def check_module(module: nn.Module) -> None:
    """Raise if the module's matrices cannot be seen: not created yet, or flattened into shards.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if a parameter is lazy and has no shape yet, or if FSDP1 or DeepSpeed ZeRO-3 holds the parameters.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"partition_parameters needs a torch.nn.Module, got {type(module).__name__}.")
    for name, part in module.named_modules():
        # By name: importing FSDP costs time, and only a program that imported it can have such a module.
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(part).__mro__):
            raise ValueError(
                f"FullyShardedDataParallel (FSDP1) wraps {repr(name) if name else 'the module'} and keeps its matrices "
                f"as flat shards. {_USE_DDP}"
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"The parameter {name!r} of a lazy module has no shape yet. Run one forward pass on a batch before the "
                "optimizer is built."
            )
        if getattr(parameter, "_is_flat_param", False):
            raise ValueError(f"The parameter {name!r} is a flat shard of FullyShardedDataParallel (FSDP1). {_USE_DDP}")
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"DeepSpeed ZeRO-3 keeps matrices as flat shards, e.g. the parameter {name!r}. {_USE_DDP}")


def check_parameter(parameter: Tensor, sites: list[Site], sent_to_other: bool) -> None:
    """Raise if a parameter is complex or a sparse embedding and no rule sent it to the group ``"other"``.

    Args:
        parameter: the parameter.
        sites: where it is registered.
        sent_to_other: whether a rule sets its group to ``"other"``.

    Raises:
        ValueError: with the parameter's name and the fix.
    """
    name = sites[0].name
    if sent_to_other or not parameter.requires_grad:
        return
    if parameter.is_complex():
        raise ValueError(
            f"The parameter {name!r} is complex, which matrix optimizers do not support. Keep it as a real tensor "
            f"(torch.view_as_real), or leave it to the other optimizer by a rule: {{pattern: {name!r}, group: other}}."
        )
    if any(getattr(site.owner, "sparse", False) and isinstance(site.owner, _SPARSE_TYPES) for site in sites):
        raise ValueError(
            f"The embedding {name!r} has sparse=True, and AdamW takes no sparse gradients. Set sparse=False. If the "
            "other optimizer takes them (SparseAdam, SGD), confirm it by a rule: "
            f"{{pattern: {name!r}, group: other}}."
        )
