"""Which parameter is what: by module type and identity first, by shape second, by name last."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_muon.partition.checks import check_module, check_parameter
from lightning_muon.partition.code import applied_maps
from lightning_muon.partition.fused import Blocks, expert_blocks, fused_blocks, raw_blocks
from lightning_muon.partition.heads import find_heads
from lightning_muon.partition.inputs import find_input_stems
from lightning_muon.partition.layout import MatrixLayout
from lightning_muon.partition.linear import StoredMap, linear_shape, stored_map
from lightning_muon.partition.names import class_name
from lightning_muon.partition.overrides import Candidate, Verdict, assign, collect_changes
from lightning_muon.partition.partition import Partition
from lightning_muon.partition.roles import Role
from lightning_muon.partition.rules import ParameterRule
from lightning_muon.partition.sites import Site, walk

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_GATES = {"GRU": 3, "LSTM": 4, "GRUCell": 3, "LSTMCell": 4}
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")
_ROUTER = re.compile(r"(^|_)routers?(_|$)", re.IGNORECASE)
_GATE = re.compile(r"(^|_)(gates?|gating)$", re.IGNORECASE)
_TABLE = re.compile(r"embed|table|codebook|codevector|(^|_)(emb|pos)(_|$)", re.IGNORECASE)
_QUANTIZER = re.compile(r"codebook|quantizer|vectorquant", re.IGNORECASE)
_TRANSPOSED_EXPERTS = {"GptOssExperts", "Llama4TextExperts"}
# The first of these roles wins if a shared parameter has several: its optimizer is safe for all of them.
_PRECEDENCE: tuple[Role, ...] = ("embedding", "head", "router", "input", "vector", "other", "hidden")


def partition_parameters(module: nn.Module, rules: Sequence[ParameterRule] = ()) -> Partition:
    """Decide for each parameter of a module what it is, which optimizer takes it, and how it is read as matrices.

    Hidden matrices go to the group ``"matrix"``; embeddings, output heads, input stems, routers, vectors and everything
    unknown go to ``"other"``. A shared parameter has one entry, as an embedding if any of its owners is one. Frozen
    parameters are listed too. The first Linear of an MLP and both factors of a LoRA adapter are hidden matrices. Rules
    override these decisions. :mod:`~lightning_muon.partition.heads` and :mod:`~lightning_muon.partition.inputs`
    describe how heads and stems are found.

    Args:
        module: the model; wrappers (``torch.compile``, DDP, Fabric, activation checkpointing) are skipped.
        rules: overrides, in order; see :class:`~lightning_muon.ParameterRule`.

    Raises:
        TypeError: if ``module`` is not a module, or a rule is not a :class:`ParameterRule`.
        ValueError: if a rule matches nothing, sends a vector to ``"matrix"`` or sets a layout that does not fit; if an
            embedding is sparse or a parameter complex, and no rule sends it to ``"other"``; if a parameter is lazy and
            has no shape yet; if FSDP1 or ZeRO-3 holds the parameters as flat shards.

    Example::

        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 100))
        >>> partition = partition_parameters(model, [ParameterRule(pattern="2.weight", group="other")])
        >>> [entry.name for entry in partition if entry.group == "matrix"]
        ['1.weight']
        >>> print(partition["3.weight"].role)
        head
    """
    check_module(module)
    for rule in rules:
        if not isinstance(rule, ParameterRule):
            raise TypeError(f"rules must hold ParameterRule, got {rule!r} of type {type(rule).__name__}.")
    sites = walk(module)
    by_parameter: dict[int, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(id(site.parameter), []).append(site)
    heads, stems = find_heads(module, sites), find_input_stems(sites)
    candidates = [_candidate(shared, heads, stems) for shared in by_parameter.values()]
    changes = collect_changes(rules, candidates)
    for shared, change in zip(by_parameter.values(), changes, strict=True):
        check_parameter(shared[0].parameter, shared, sent_to_other=change.group == "other")
    return Partition(assign(candidates, changes))


def _candidate(sites: Sequence[Site], heads: dict[int, str], stems: dict[int, str]) -> Candidate:
    parameter = sites[0].parameter
    verdicts = [_verdict(site, heads, stems) for site in sites]
    verdict = min(verdicts, key=lambda one: _PRECEDENCE.index(one.role))
    names = tuple(dict.fromkeys(site.name for site in sites))
    if len(names) > 1:
        shared = f"{names[1]}" if len(names) == 2 else f"{len(names) - 1} other names"
        verdict = dataclasses.replace(verdict, reason=f"{verdict.reason} Shared with {shared}.")
    owners = tuple(dict.fromkeys(type(site.owner) for site in sites))
    return Candidate(names, parameter, owners, verdict)


def _verdict(site: Site, heads: dict[int, str], stems: dict[int, str]) -> Verdict:
    """Return the verdict on a parameter from one of its sites; the most certain evidence is checked first."""
    owner, parameter, kind = site.owner, site.parameter, class_name(site.owner)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and site.part != "magnitude":
        return Verdict("embedding", "Embedding table." if kind == "Embedding" else f"Embedding table of {kind}.")
    if not parameter.is_floating_point():
        return Verdict("other", f"Not a real floating-point tensor ({parameter.dtype}) of {kind}.")
    if site.part == "magnitude":
        return Verdict("vector", f"Magnitude of a weight-normalised {kind}.")
    if isinstance(owner, _NORMS) or ("norm" in type(owner).__name__.lower() and parameter.ndim == 1):
        return Verdict("vector", f"{'Bias' if 'bias' in site.local else 'Gain'} of {kind}.")
    if _BIAS.search(site.local) and "table" not in site.local:
        return Verdict("vector", f"{'Biases, stacked,' if parameter.ndim > 1 else 'Bias'} of {kind}.")
    if any(name.startswith("lora_embedding_") for name in site.path):
        return Verdict("embedding", "LoRA factor of an embedding.")
    layout, note = _layout(site)
    if layout is not None and _is_router(site):
        return Verdict("router", f"Router: {kind} chooses among experts.", layout)
    if layout is not None and id(parameter) in heads:
        return Verdict("head", heads[id(parameter)], layout)
    if layout is not None and _is_depthwise(owner):
        return Verdict("other", f"Depthwise {kind}: each channel has a small filter of its own, no matrix.", layout)
    if _is_vector(parameter, layout):
        shape = f" of shape {tuple(parameter.shape)}" if parameter.ndim > 1 else ""
        return Verdict("vector", f"Vector: {site.local!r} of {kind}{shape}.")
    if layout is None:
        return _raw(site)
    if site.recipe is not None:
        return Verdict(
            "other",
            f"{class_name(site.recipe)} computes the weight of {kind} from this tensor, so a step on the tensor is not "
            "a step on the weight. A rule can send it to the matrix group.",
            layout,
            unknown=True,
        )
    if id(parameter) in stems:
        return Verdict("input", stems[id(parameter)], layout)
    return Verdict("hidden", f"{note}.", layout)


def _layout(site: Site) -> tuple[MatrixLayout | None, str]:
    """How the owner's type reads the tensor as matrices, with a phrase that says so; None if the type is unknown."""
    owner, shape, kind = site.owner, site.parameter.shape, class_name(site.owner)
    if isinstance(owner, _ConvNd) and site.local == "weight":
        groups = 1 if _is_depthwise(owner) else owner.groups
        blocks = fused_blocks(site, owner.out_channels, owner.in_channels) if groups == 1 else Blocks()
        several = f", {groups} groups" if groups > 1 else blocks.note and f", {blocks.note}"
        layout = MatrixLayout(groups=groups, transposed=owner.transposed, split=blocks.split, repeats=blocks.repeats)
        return layout, f"Filters of {kind}, flattened{several}"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and site.local.startswith("weight"):
        return _recurrent_layout(site)
    if isinstance(owner, nn.MultiheadAttention) and site.local.endswith("_proj_weight"):
        if site.local == "in_proj_weight":
            return MatrixLayout(split=(owner.embed_dim,) * 3), f"Input projection of {kind}, q | k | v"
        return MatrixLayout(), f"Input projection of {kind}"
    if isinstance(owner, nn.Bilinear) and site.local == "weight":
        return MatrixLayout(batch_dims=1), f"Weight of {kind}, one matrix an output"
    if len(shape) == 3 and _is_experts(site):
        return _expert_layout(site)
    if (stored := stored_map(owner, site.local, shape)) is not None:
        return _map_layout(site, stored)
    if isinstance(owner, (nn.ParameterList, nn.ParameterDict)) and site.parents:
        applied = applied_maps(type(site.parents[-1])).get(site.path[-1])
        if applied is not None and applied.indexed and len(shape) == 2:
            how = "stored transposed" if applied.transposed else "stored (fan-out, fan-in)"
            return MatrixLayout(transposed=applied.transposed), f"{_listed(site)}, which its code applies, {how}"
    if _is_raw_input_projection(site):
        return MatrixLayout(split=(shape[1],) * 3), f"Input projection of {kind}, q | k | v"
    if len(shape) == 2 and (_is_router(site) or any(name.startswith("lora_") for name in (*site.path, site.local))):
        return MatrixLayout(), f"Factor of a LoRA adapter, {kind}"
    return None, ""


def _is_raw_input_projection(site: Site) -> bool:
    """Whether this is ``in_proj_weight`` of an attention that is not torch's: fairseq before 0.9 and its copies."""
    shape, attention = site.parameter.shape, "attention" in type(site.owner).__name__.lower()
    return site.local == "in_proj_weight" and attention and len(shape) == 2 and shape[0] == 3 * shape[1]


def _map_layout(site: Site, stored: StoredMap) -> tuple[MatrixLayout, str]:
    """A linear map, or a stack of them: the maps that it fuses, and which way it is stored."""
    owner, shape, kind = site.owner, site.parameter.shape, class_name(site.owner)
    transposed = ", stored transposed" if stored.transposed else ""
    if stored.batch_dims:
        count = math.prod(shape[: stored.batch_dims])
        return MatrixLayout(stored.batch_dims, transposed=stored.transposed), f"{count} maps of {kind}{transposed}"
    fan_in, fan_out = shape if stored.transposed else reversed(shape)
    weight = site.local == "weight"
    blocks = fused_blocks(site, fan_out, fan_in) if weight else raw_blocks(site.local, owner, fan_out, fan_in)
    name = "Weight" if weight else f"Weight {site.local!r}"
    note = f"{name} of {kind}{transposed}{blocks.note and f', {blocks.note}'}"
    return MatrixLayout(transposed=stored.transposed, split=blocks.split, repeats=blocks.repeats), note


def _recurrent_layout(site: Site) -> tuple[MatrixLayout, str]:
    mode = getattr(site.owner, "mode", type(site.owner).__name__)
    gates = next((count for name, count in _GATES.items() if name in (mode, *_base_names(site.owner))), 1)
    which = {"ih": "Input", "hh": "Recurrent", "hr": "Output"}.get(site.local.split("_")[1], "Recurrent")
    note = f"{which} weight of {class_name(site.owner)}"
    if gates == 1 or which == "Output":
        return MatrixLayout(), note
    return MatrixLayout(split=(site.parameter.shape[0] // gates,) * gates), f"{note}, split into {gates} gates"


def _expert_layout(site: Site) -> tuple[MatrixLayout, str]:
    """(E, m, n), or (E, n, m) where the class or a bias beside the weight says that it is stored transposed."""
    owner, (_, rows, columns), kind = site.owner, site.parameter.shape, class_name(site.owner)
    transposed = getattr(owner, "is_transposed", None)
    if transposed is None and any(base in _TRANSPOSED_EXPERTS for base in _base_names(owner)):
        transposed = True
    if transposed is None:
        transposed = _transposed_by_bias(owner)
    if transposed is None and (stored := stored_map(owner, site.local, site.parameter.shape)) is not None:
        transposed = stored.transposed
    blocks = expert_blocks(site.local, owner, columns if transposed else rows)
    note = {True: ", stored transposed", False: "", None: ", read as (experts, fan-out, fan-in)"}[transposed]
    layout = MatrixLayout(1, transposed=bool(transposed), split=blocks.split, repeats=blocks.repeats)
    return layout, f"Stacked experts of {kind}{note}{blocks.note and f', {blocks.note}'}"


def _transposed_by_bias(owner: nn.Module) -> bool | None:
    """Whether experts are stored (E, fan-in, fan-out): a stack of biases (E, fan-out) beside a weight shows it."""
    for name, weight in owner._parameters.items():
        for bias_name in (f"{name}_bias", name.replace("weight", "bias")):
            bias = owner._parameters.get(bias_name)
            if bias is None or weight is None or (weight.ndim, bias.ndim) != (3, 2):
                continue
            if weight.shape[1] != weight.shape[2]:
                return bias.shape[1] == weight.shape[2]
    return None


def _is_experts(site: Site) -> bool:
    count = site.parameter.shape[0]
    sized = any(getattr(site.owner, name, None) == count for name in ("num_experts", "n_experts", "num_local_experts"))
    names = (type(site.owner).__name__, *site.path, site.local)
    return sized or any("expert" in name.lower() for name in names)


def _is_router(site: Site) -> bool:
    """A router by its class or name, or a gate beside experts that has fewer outputs than inputs.

    The gate projection of a gated linear unit, or of attention, is as wide as what it gates: no router.
    """
    around = (*site.parents, site.owner)
    if any(_is_router_class(module) for module in around[-2:]) or any(map(_ROUTER.search, site.path[-2:])):
        return True
    shape = linear_shape(site.owner)
    if shape is not None and shape[1] >= shape[0]:
        return False
    return any(
        _GATE.search(name) and any("expert" in other.lower() for other in (*parent._modules, *parent._parameters))
        for name, parent in zip(site.path, site.parents, strict=True)
        if "expert" not in name or name.endswith("gate")
    )


def _is_router_class(module: nn.Module) -> bool:
    return any("router" in name.lower() for name in _base_names(module))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def _is_vector(parameter: nn.Parameter, layout: MatrixLayout | None) -> bool:
    if sum(size > 1 for size in parameter.shape) < 2:
        return True
    matrices = layout.matrix_shapes(parameter.shape) if layout is not None else []
    return bool(matrices) and all(min(rows, columns) < 2 for _, rows, columns in matrices)


def _raw(site: Site) -> Verdict:
    """Classify a tensor that its module holds itself and whose use no type shows: a table, a token, or other.

    In a ``ParameterList`` or ``ParameterDict`` the name of the list is used, and the key in the dictionary.
    """
    in_list = isinstance(site.owner, (nn.ParameterList, nn.ParameterDict)) and bool(site.path)
    names = (site.path[-1], site.local) if in_list else (site.local,)
    what = _listed(site) if in_list else f"{site.local!r} of {class_name(site.owner)}"
    holder = site.parents[-1] if in_list else site.owner
    if in_list and any(map(_BIAS.search, names)) and site.parameter.ndim < 3:
        return Verdict("vector", f"Biases, stacked, of {what}.")
    if any(map(_TABLE.search, names)) or _QUANTIZER.search(type(holder).__name__):
        return Verdict("embedding", f"Table {what}, by its name.")
    return Verdict("other", f"Not known to be a matrix: {what}. A rule can send it to the matrix group.", unknown=True)


def _listed(site: Site) -> str:
    """An element of a ParameterList or ParameterDict for a sentence."""
    return f"{site.path[-1]}[{site.local}] of {class_name(site.parents[-1])}"


def _base_names(module: nn.Module) -> Iterable[str]:
    return (base.__name__ for base in type(module).__mro__)
