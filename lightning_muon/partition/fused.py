"""Which maps a fused projection holds: the block structure of q/k/v, gate/up and state-space projections.

A split is used where the block structure is known: from the module's class where families differ (some keep the q, k
and v of each head together), or else from a common name together with sizes that fit. Otherwise the weight stays one
matrix, and the note says so.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

_QKV_NAMES = {"qkv", "wqkv", "qkv_proj", "c_attn", "in_proj_qkv", "to_qkv", "qkv_linear", "att_proj", "query_key_value"}
_GATE_UP_NAMES = {"gate_up_proj", "gate_up", "w12", "wi", "weights_in", "input_linear"}
_MAYBE_FUSED = re.compile(r"qkv|query_key_value|^kv|_kv|gate_up|^w12$|^c_attn$|^in_proj|^x_proj$", re.IGNORECASE)

_PER_HEAD = {
    "BloomAttention",
    "DisentangledSelfAttention",
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "PersimmonAttention",
}
_MAMBA_1 = {"FalconMambaMixer", "JambaMambaMixer", "Mamba", "MambaMixer"}
_MAMBA_2 = {
    "BambaMixer",
    "FalconH1Mixer",
    "GraniteMoeHybridMambaLayer",
    "Mamba2Mixer",
    "NemotronHMamba2Mixer",
    "Zamba2MambaMixer",
}
_SHORT_CONV = {"Lfm2ShortConv", "Lfm2MoeShortConv"}


class Blocks(NamedTuple):
    """Sizes of the maps along fan-out, how often they recur, and a phrase for the user; no sizes for one matrix."""

    split: tuple[int, ...] = ()
    repeats: int = 1
    note: str = ""


def fused_blocks(name: str, parent: nn.Module | None, fan_out: int, fan_in: int) -> Blocks:
    """The maps that a linear layer fuses.

    Args:
        name: what its parent calls the layer, e.g. ``"qkv"``.
        parent: the module that the layer is part of, whose class, attributes and config give the sizes.
        fan_out: rows of the weight.
        fan_in: columns of the weight.
    """
    blocks = None
    if parent is not None:
        blocks = _of_known_class(name, parent, fan_out) or _of_common_name(name, parent, fan_out, fan_in)
    if blocks is not None and blocks.repeats * sum(blocks.split) == fan_out:
        return blocks
    if _MAYBE_FUSED.search(name) and fan_out != fan_in:
        return Blocks(note="perhaps several maps in an order not known: read as one; a rule can set split")
    return Blocks()


def expert_blocks(name: str, owner: nn.Module, fan_out: int) -> Blocks:
    """The maps that a stacked expert weight fuses along its fan-out: gate and up, in halves or interleaved."""
    if "gate_up" not in name or fan_out % 2:
        return Blocks()
    interleaved = not getattr(owner, "is_concatenated", type(owner).__name__ != "GptOssExperts")
    if interleaved:
        return Blocks((1, 1), fan_out // 2, "gate | up, interleaved")
    return Blocks((fan_out // 2, fan_out // 2), note="gate | up")


def _of_known_class(name: str, parent: nn.Module, fan_out: int) -> Blocks | None:
    """Block structure of families that a name alone would get wrong."""
    kind = type(parent).__name__
    heads = _size(parent, "num_attention_heads", "num_heads", "n_head")
    if kind in _PER_HEAD and name in {"query_key_value", "in_proj", "qkv_proj"}:
        return _per_head(fan_out, heads)
    if kind.startswith("Falcon") and name == "query_key_value":
        return _falcon(parent, fan_out, heads)
    if kind == "GPTBigCodeAttention" and name == "c_attn" and not getattr(parent, "multi_query", False):
        return _per_head(fan_out, heads)
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


def _of_common_name(name: str, parent: nn.Module, fan_out: int, fan_in: int) -> Blocks | None:
    """Block structure by the name's convention, where the sizes agree with it."""
    lower = name.lower()
    if lower in _QKV_NAMES and lower != "query_key_value":
        if fan_out == 3 * fan_in:
            return Blocks((fan_in,) * 3, note="q | k | v")
        if lower == "c_attn" and fan_out == 2 * fan_in:
            return Blocks((fan_in,) * 2, note="k | v")
        heads = _size(parent, "num_attention_heads", "num_heads", "n_head")
        key_heads = _size(parent, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
        head_dim = _size(parent, "head_dim") or (heads and fan_in // heads)
        if getattr(parent, "multi_query", False):
            key_heads = 1
        if heads and fan_out == (heads + 2 * key_heads) * head_dim:
            return Blocks((heads * head_dim, key_heads * head_dim, key_heads * head_dim), note="q | k | v")
    if lower in _GATE_UP_NAMES:
        # A gated unit: the layer beside it takes half of the fused fan-out.
        inner = {getattr(other, "in_features", None) for other in parent.children()}
        if fan_out % 2 == 0 and fan_out // 2 in inner:
            return Blocks((fan_out // 2,) * 2, note="gate | up")
    return None


def _size(module: nn.Module, *names: str) -> int:
    """The first of these attributes of a module or of its config that is a positive int; 0 if there is none."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0
