"""Which maps a fused projection holds: the block structure of q/k/v, gate/up and state-space projections.

A split is used where the block structure is known: from the module's class where families differ (some keep the q, k
and v of each head together), or else from a common name together with sizes that fit. Otherwise the weight stays one
matrix, and the note says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from lightning_muon.partition.code import Fused, evaluate_size, fused_maps
from lightning_muon.partition.linear import linear_shape
from lightning_muon.partition.sites import Site

_QKV_NAMES = {"c_attn", "att_proj"}
# qkv, Wqkv, to_qkv, qkv_proj, qkv_linears, qkv_net, in_proj_qkv, img_attn_qkv, to_added_qkv; kv, Wkv, to_kv, kv_net.
_QKV_WORDS = {"qkv", "wqkv", "qkvs", "kqv"}
_KV_WORDS = {"kv", "wkv"}
_NEUTRAL_WORDS = {
    "to", "proj", "projection", "linear", "linears", "lin", "net", "layer", "layers", "fc", "dense", "conv", "in", "w",
    "weight", "attn", "att", "attention", "self", "cross", "img", "txt", "image", "text", "added", "add", "context",
    "mapper", "transform",
}  # fmt: skip
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "num_head")
_KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "num_heads_kv", "n_query_groups",
    "num_query_groups", "n_local_heads", "num_key_value_groups_heads",
)  # fmt: skip
_HEAD_DIMS = ("head_dim", "dim_head", "d_head", "head_size", "dim_heads", "head_width", "attention_head_dim", "d_k")
_GATE_UP_NAMES = {"gate_up_proj", "gate_up", "w12", "wi", "weights_in", "input_linear"}
_MAYBE_FUSED = re.compile(
    r"qkv|kqv|uvqk|query_key_value|^kv|_kv|gate_up|^w12$|^c_attn$|^in_proj|^x_proj$", re.IGNORECASE
)

_UNSETTLED = "perhaps several maps in an order not known: read as one; a rule can set split"

_PER_HEAD = {
    "BloomAttention",
    "DisentangledSelfAttention",
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "PersimmonAttention",
}
# InternLM2, and litgpt before 0.5.4 where the layer is called attn: q q ... k v of each group of queries.
_PER_GROUP = {("InternLM2Attention", "wqkv"), ("InternLM2FlashAttention2", "wqkv"), ("InternLM2SdpaAttention", "wqkv")}
_MAMBA_1 = {"FalconMambaMixer", "JambaMambaMixer", "Mamba", "MambaMixer"}
_MAMBA_2 = {
    "BambaMixer",
    "FalconH1Mixer",
    "GraniteMoeHybridMambaLayer",
    "Mamba2Mixer",
    "NemotronHMamba2Mixer",
    "Zamba2MambaMixer",
}
_GATED = {"GLU", "GEGLU", "GeGLU", "ReGLU", "REGLU", "SwiGLU", "SwishGLU", "GatedLinearUnit"}
_QKV_LIKE = re.compile(r"kv", re.IGNORECASE)
_SHORT_CONV = {"Lfm2ShortConv", "Lfm2MoeShortConv"}


class Blocks(NamedTuple):
    """The maps that a layer fuses; no sizes for one matrix.

    Args:
        split: sizes of the maps along fan-out.
        repeats: how often they recur.
        note: a phrase for the user.
        inner: whether the output is certainly a hidden state; heads are split too, e.g. into boxes and classes.
    """

    split: tuple[int, ...] = ()
    repeats: int = 1
    note: str = ""
    inner: bool = True


def fused_blocks(site: Site, fan_out: int, fan_in: int) -> Blocks:
    """The maps that a layer fuses.

    Args:
        site: the layer's weight. What its parent calls the layer, e.g. ``"qkv"``, and the class, attributes and config
            of the parent give the sizes; the last layer of an ``nn.Sequential`` has the name of the whole.
        fan_out: rows of the weight.
        fan_in: columns of the weight.
    """
    names = list(_names_and_parents(site))
    for name, parent in names:
        for find in (_of_known_class, _of_code, _of_common_name):
            blocks = find(name, parent, fan_out, fan_in)
            if blocks is not None and blocks.repeats * sum(blocks.split) == fan_out:
                return blocks
    if _gated_in_sequential(site, fan_out) or _gated_beside(site, fan_out):
        return Blocks((fan_out // 2,) * 2, note="value | gate")
    called = (*(name for name, _ in names), *site.path[-2:])
    if any(map(_MAYBE_FUSED.search, called)) and fan_out != fan_in:
        return Blocks(note=_UNSETTLED)
    return Blocks()


def raw_blocks(name: str, owner: nn.Module, fan_out: int, fan_in: int) -> Blocks:
    """The maps of a tensor that a module holds itself, as its code splits them; a note if only the name shows them."""
    blocks = _of_code(name, owner, fan_out, fan_in)
    if blocks is not None:
        return blocks
    return Blocks(note=_UNSETTLED) if _MAYBE_FUSED.search(name) and fan_out != fan_in else Blocks()


def expert_blocks(name: str, owner: nn.Module, fan_out: int) -> Blocks:
    """The maps that a stacked expert weight fuses along its fan-out: gate and up, in halves or interleaved."""
    if "gate_up" not in name or fan_out % 2:
        return Blocks()
    interleaved = not getattr(owner, "is_concatenated", type(owner).__name__ != "GptOssExperts")
    if interleaved:
        return Blocks((1, 1), fan_out // 2, "gate | up, interleaved")
    return Blocks((fan_out // 2, fan_out // 2), note="gate | up")


def _of_known_class(name: str, parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    """Block structure of families that a name alone would get wrong."""
    kind = type(parent).__name__
    heads = _size(parent, *_HEADS)
    if kind in _PER_HEAD and name in {"query_key_value", "in_proj", "qkv_proj"}:
        return _per_head(fan_out, heads)
    if kind.startswith("Falcon") and name == "query_key_value":
        return _falcon(parent, fan_out, heads)
    if kind == "GPTBigCodeAttention" and name == "c_attn" and not getattr(parent, "multi_query", False):
        return _per_head(fan_out, heads)
    if (kind, name) in _PER_GROUP or (name == "attn" and _size(parent, "n_query_groups")):
        return _per_group(parent, fan_out, heads)
    if any(type(child).__name__ == "QKVAttentionLegacy" for child in parent.children()):
        # OpenAI's guided diffusion, before its "new attention order".
        return _per_head(fan_out, heads)
    key_dim, value_dim = _size(parent, "key_dim"), _size(parent, "val_dim")
    if key_dim and value_dim and heads and name in {"qkv", "kv"}:
        # LeViT, EfficientFormer and TinyViT in timm.
        split = (key_dim, key_dim, value_dim)[3 - len(name) :]
        return Blocks(split, heads, f"{' | '.join(name)} of each of {heads} heads")
    if kind == "CodeGenAttention" and name == "qkv_proj":
        return Blocks((fan_out // 12,) * 3, 4, "q | v | k, four times over")
    if kind in _SHORT_CONV and name == "in_proj":
        return Blocks((fan_out // 3,) * 3, note="B | C | x")
    state = _size(parent, "ssm_state_size", "d_state")
    inner = _size(parent, "intermediate_size", "d_inner")
    if kind in _MAMBA_1 and inner and state:
        if name == "in_proj":
            return Blocks((inner, inner), note="x | z")
        rank = _size(parent, "time_step_rank", "dt_rank")
        if name == "x_proj" and rank:
            return Blocks((rank, state, state), note="dt | B | C")
    if kind in _MAMBA_2 and name == "in_proj" and inner and state and heads:
        shared = _size(parent, "n_groups") * state
        return Blocks((inner, inner, shared, shared, heads), note="z | x | B | C | dt")
    return None


def _of_code(name: str, parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    """Parts into which the parent's code cuts the output of the layer."""
    fused = fused_maps(type(parent)).get(name)
    if fused is None:
        return None
    sizes = _sizes_of_parts(fused, parent, fan_out)
    if not sizes or sum(sizes) != fan_out or min(sizes) < 1:
        return None
    convolved = isinstance(_child(parent, name), nn.modules.conv._ConvNd)
    certain = fused.dim in ({1, -3, -4} if convolved else {-1, 2, 3})
    # Different sizes that add up to the fan-out do not split tokens.
    certain = certain or (fused.dim in {None, 1} and len(set(fused.sizes)) > 1)
    if not certain and (fused.dim is not None or not set(sizes) <= _widths_taken(parent)):
        return None
    names = {3: "q | k | v", 2: "k | v"} if _QKV_LIKE.search(name) else {}
    note = names.get(fused.parts, f"{fused.parts} parts, as its code cuts them")
    by_name = _MAYBE_FUSED.search(name) or _of_common_name(name, parent, fan_out, fan_in)
    return Blocks(sizes, note=note, inner=not fused.sizes or bool(by_name))


def _sizes_of_parts(fused: Fused, parent: nn.Module, fan_out: int) -> tuple[int, ...]:
    """Rows of each part; empty if the code does not fix them."""
    if not fused.sizes:
        return (fan_out // fused.parts,) * fused.parts if fan_out % fused.parts == 0 else ()
    sizes = [evaluate_size(size, parent) for size in fused.sizes]
    known = [size for size in sizes if size is not None]
    return tuple(known) if len(known) == len(sizes) else ()


def _child(parent: nn.Module, name: str) -> nn.Module | None:
    """A child, or the last layer of a child that is an ``nn.Sequential``."""
    child = parent._modules.get(name)
    return list(child.children())[-1] if isinstance(child, nn.Sequential) and len(child) else child


def _gated_in_sequential(site: Site, fan_out: int) -> bool:
    """Whether ``nn.GLU`` or a similar module follows a layer in an ``nn.Sequential``, perhaps after a dropout."""
    if not isinstance(site.parent, nn.Sequential) or fan_out % 2:
        return False
    layers = list(site.parent._modules.items())
    place = next((index for index, (name, _) in enumerate(layers) if name == site.owner_name), len(layers))
    following = (layer for _, layer in layers[place + 1 :] if "dropout" not in type(layer).__name__.lower())
    gate = next(following, None)
    return gate is not None and _is_gate(gate)


def _gated_beside(site: Site, fan_out: int) -> bool:
    """Whether a gated activation is beside a layer, and a layer beside it takes half of this layer's output."""
    if site.parent is None or isinstance(site.parent, nn.Sequential) or fan_out % 2:
        return False
    return fan_out // 2 in _widths_taken(site.parent) and any(map(_is_gate, site.parent.children()))


def _is_gate(module: nn.Module) -> bool:
    """Whether a module without weights multiplies one half of its input by a gate computed from the other half."""
    return type(module).__name__ in _GATED and not any(True for _ in module.parameters())


def _falcon(parent: nn.Module, fan_out: int, heads: int) -> Blocks | None:
    head_dim = _size(parent, "head_dim")
    if not heads or not head_dim:
        return None
    if getattr(parent, "new_decoder_architecture", False):
        groups = _size(parent, "num_kv_heads")
        if not groups:
            return None
        return Blocks((heads // groups * head_dim, head_dim, head_dim), groups, f"q | k | v of each of {groups} groups")
    if getattr(parent, "multi_query", False):
        return Blocks((heads * head_dim, head_dim, head_dim), note="q | k | v")
    return _per_head(fan_out, heads)


def _per_head(fan_out: int, heads: int) -> Blocks | None:
    if not heads or fan_out % (3 * heads):
        return None
    return Blocks((fan_out // (3 * heads),) * 3, heads, f"q | k | v of each of {heads} heads")


def _per_group(parent: nn.Module, fan_out: int, heads: int) -> Blocks | None:
    """The queries of a group, its key and its value, group after group."""
    groups, head_dim = _size(parent, *_KEY_HEADS) or heads, _size(parent, *_HEAD_DIMS)
    if not heads or not groups or heads % groups:
        return None
    head_dim = head_dim or fan_out // (heads + 2 * groups)
    return Blocks((heads // groups * head_dim, head_dim, head_dim), groups, f"q | k | v of each of {groups} groups")


def _of_common_name(name: str, parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    """Block structure by the name's convention, where the sizes agree with it."""
    lower = name.lower()
    words = set(lower.split("_"))
    if lower in _QKV_NAMES or (words & _QKV_WORDS and words <= _QKV_WORDS | _NEUTRAL_WORDS):
        return _queries_keys_values(lower, parent, fan_out, fan_in)
    if words & _KV_WORDS and words <= _KV_WORDS | _NEUTRAL_WORDS:
        return _keys_values(parent, fan_out, fan_in)
    if lower in _GATE_UP_NAMES:
        # A gated unit: the layer beside it takes half of the fused fan-out.
        inner = {getattr(other, "in_features", None) for other in parent.children()}
        if fan_out % 2 == 0 and fan_out // 2 in inner:
            return Blocks((fan_out // 2,) * 2, note="gate | up")
    return None


def _queries_keys_values(name: str, parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    if name == "c_attn" and fan_out == 2 * fan_in:
        return Blocks((fan_in,) * 2, note="k | v")
    heads = _size(parent, *_HEADS)
    key_heads = 1 if getattr(parent, "multi_query", False) is True else _size(parent, *_KEY_HEADS) or heads
    head_dim = _size(parent, *_HEAD_DIMS) or (heads and fan_in // heads)
    sizes = [(heads * head_dim, key_heads * head_dim, key_heads * head_dim)]
    if name == "qkv_linears":
        # Interpretable attention of the temporal fusion transformer: the heads share their values.
        sizes.append((heads * head_dim, heads * head_dim, head_dim))
    if key_heads == heads:
        sizes += [(inner,) * 3 for inner in (fan_in, *_widths_taken(parent))]
    note = "k | q | v" if "kqv" in name else "q | k | v"
    return next((Blocks(split, note=note) for split in sizes if sum(split) == fan_out), None)


def _keys_values(parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    heads = _size(parent, *_HEADS)
    head_dim = _size(parent, *_HEAD_DIMS)
    inner = {fan_in, heads * head_dim, _size(parent, *_KEY_HEADS) * head_dim, *_widths_taken(parent)}
    if fan_out % 2 == 0 and fan_out // 2 in inner:
        return Blocks((fan_out // 2,) * 2, note="k | v")
    return None


def _widths_taken(parent: nn.Module) -> set[int]:
    """Widths that the layers beside take, such as ``to_out``, which reads all heads side by side."""
    layers = [child[0] if isinstance(child, nn.Sequential) and len(child) else child for child in parent.children()]
    widths = (getattr(layer, "in_features", getattr(layer, "in_channels", None)) for layer in layers)
    return {width for width in widths if isinstance(width, int)}


def _names_and_parents(site: Site) -> Iterator[tuple[str, nn.Module]]:
    """The layer's name and parent, and those of modules that wrap only this layer.

    ``to_qkv`` may be an ``nn.Sequential`` that ends in the layer, ``qkv`` a module that holds the layer and its norm,
    ``kqv_lin`` one that holds a layer for each type of node.
    """
    name, parent = site.owner_name, site.parent
    if parent is None:
        return
    yield name, parent
    if any("earrange" in type(child).__name__ for child in parent.children()):
        return
    for depth in range(len(site.path) - 2, -1, -1):
        outer, inner = site.parents[depth], site.parents[depth + 1]
        layers = [part for part in inner.modules() if _shape(part) is not None]
        wraps = isinstance(inner, nn.ModuleDict) or len(inner._modules) == 1
        alike = wraps and len({(_shape(part) or (0, 0))[1] for part in layers}) == 1
        last = isinstance(inner, nn.Sequential) and bool(layers) and layers[-1] is site.owner
        if not (alike or last or len(layers) == 1):
            return
        yield site.path[depth], outer


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    return linear_shape(module)


def _size(module: nn.Module, *names: str) -> int:
    """The first of these attributes of a module or of its config that is a positive int; 0 if there is none."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
