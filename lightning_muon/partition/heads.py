"""Which layers are output heads, by evidence from most to least certain.

1. The model says so: ``get_output_embeddings()`` (Hugging Face), ``get_classifier()`` (timm),
   ``nn.AdaptiveLogSoftmaxWithLoss``.
2. Outside the base model of a Hugging Face model, a last layer with ``num_labels`` or ``vocab_size`` outputs.
3. A layer that ends a branch of the module in the space of the data: as wide as the input of a layer that reads data.
   See :mod:`~lightning_muon.partition.data_space`.
4. A common head name (``lm_head``, ``classifier``, ``args_proj``, ``theta_b_fc``, ...). See
   :mod:`~lightning_muon.partition.head_names`.
5. Only if 1, 2 and 4 found no head of the whole model and no Linear is tied to an embedding: the last registered layer,
   unless there are signs that its output is a hidden state. :func:`_last_layer` lists the signs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_muon.partition.branches import ends_branch, ends_in_hidden_width, parallel_ends
from lightning_muon.partition.data_space import data_space_heads
from lightning_muon.partition.head_names import basis_heads, inside_projection_head, named_heads
from lightning_muon.partition.leaves import Leaf, find_leaves, inside_known, is_hugging_face, is_repeated
from lightning_muon.partition.linear import linear_shape, linear_weights
from lightning_muon.partition.names import class_name
from lightning_muon.partition.sites import Site

_CLASS_COUNTS = ("num_classes", "n_classes", "num_labels", "vocab_size", "num_items", "n_items", "num_tokens")


def find_heads(module: nn.Module, sites: Sequence[Site]) -> dict[int, str]:
    """Find the output heads of a module.

    Args:
        module: the root module.
        sites: all its parameter sites.

    Returns:
        A sentence for each head, by ``id`` of its weight.
    """
    leaves = find_leaves(sites)
    declared, is_declared = _declared(module)
    found = [*named_heads(leaves, sites), *_of_hugging_face(leaves)]
    named = {leaf for leaf, _ in found}
    in_data_space = data_space_heads(leaves, sites, named)
    # A single output may also be a score inside the model, as in attention pooling: the search goes on.
    certain = is_declared or declared or any(leaf.fan_out > 1 for leaf, _ in found) or _has_tied_head(sites)
    found = [*in_data_space, *basis_heads(leaves), *found]
    if not certain:
        found += _last_layer(module, leaves, sites)
    heads = {id(site.parameter): reason for leaf, reason in reversed(found) for site in leaf.sites}
    return {**heads, **declared}


def _declared(module: nn.Module) -> tuple[dict[int, str], bool]:
    """Return the heads that models declare, and whether a model declared anything, even that it has no head."""
    heads: dict[int, str] = {}
    declared = False
    for part in module.modules():
        if isinstance(part, nn.AdaptiveLogSoftmaxWithLoss):
            heads.update({id(p): f"Output head: part of {class_name(part)}." for p in part.parameters() if p.ndim == 2})
        # Looked up on the class: wrappers such as peft's pass unknown attributes on to the model inside.
        for method in ("get_output_embeddings", "get_classifier"):
            if not callable(getattr(type(part), method, None)):
                continue
            try:
                head = getattr(part, method)()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            declared = declared or method == "get_classifier"
            for one in head if isinstance(head, (tuple, list)) else (head,):
                for weight in _weights_of(one):
                    heads[id(weight)] = f"Output head: {class_name(part)}.{method}() returns it."
    return heads, declared


def _weights_of(head: object) -> list[nn.Parameter]:
    """Return the weight of a head; of its last layer, if the head has several layers."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, nn.Parameter):
        return [weight]
    layers = [part for part in head.modules() if linear_shape(part)] if isinstance(head, nn.Module) else []
    weights = [layers[-1]._parameters[name] for name in linear_weights(layers[-1])] if layers else []
    return [weight for weight in weights if weight is not None]


def _of_hugging_face(leaves: Sequence[Leaf]) -> list[tuple[Leaf, str]]:
    """Return last layers outside the base model with as many outputs as the config has labels or tokens."""
    last: dict[tuple[int, str], tuple[Leaf, nn.Module]] = {}
    for leaf in leaves:
        for depth, model in enumerate(leaf.site.parents):
            base = getattr(model, "base_model", None) if is_hugging_face(model) else None
            if base is not None and base is not model and base not in leaf.modules and leaf.kind != "other":
                last[id(model), leaf.path[depth]] = (leaf, model)
    found = []
    for leaf, model in last.values():
        for count in ("num_labels", "vocab_size"):
            if leaf.fan_out == getattr(getattr(model, "config", None), count, None):
                found.append((leaf, f"Output head: outside the base model, with {count} = {leaf.fan_out} outputs."))
    return found


def _has_tied_head(sites: Sequence[Site]) -> bool:
    embedded = {id(site.parameter) for site in sites if isinstance(site.owner, nn.Embedding)}
    return any(id(site.parameter) in embedded and linear_shape(site.owner) for site in sites)


def _last_layer(module: nn.Module, leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    """Return the last registered layer and those parallel to it, unless its output shows signs of a hidden state.

    The signs are:

    * It belongs to a repeated block, an attention or transformer layer, a projection head of self-supervised learning,
      or a Hugging Face base model.
    * It is as wide as an embedding or a norm, which have the width of the residual stream. The last layer writes there
      in a model that is scored against its embeddings.
    * A layer that does not read data takes inputs of this width.
    * It fuses several maps.
    * Another branch ends in the same width: two towers that meet in a dot product.

    A convolution must also be pointwise or return to the channels of the input. The last layer of a plain
    ``nn.Sequential`` model is a head whatever its width. So is a layer with as many outputs as a module around it has
    classes, labels, tokens or items.
    """
    trainable = [leaf for leaf in leaves if leaf.trainable] or list(leaves)
    if not trainable or trainable[-1].site.owner is module or trainable[-1].kind == "other":
        return []
    last = trainable[-1]
    if inside_known(last) or is_repeated(last) or inside_projection_head(last):
        return []
    if last.kind == "conv" and not _is_output_conv(last, trainable):
        return []
    if count := _class_count(last):
        reason = f"Output head: the last layer, with {count} = {last.fan_out} outputs."
    elif _ends_sequential(module, last):
        reason = "Output head: the model ends in this layer. A rule can send it to the matrix group."
    elif last.fan_out > 1 and (ends_in_hidden_width(last, trainable, sites) or ends_branch(last, trainable)):
        return []
    else:
        reason = (
            f"Output head: the last layer, and no hidden state has its width, {last.fan_out}. "
            "A rule can send it to the matrix group."
        )
    beside = f"Output head: beside the last layer, {'.'.join(last.path)!r}, and has as many inputs."
    return [(last, reason), *((leaf, beside) for leaf in parallel_ends(last, trainable))]


def _is_output_conv(leaf: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether a convolution gives classes for each position (pointwise), or as many channels as the input has."""
    kernel = leaf.site.owner.kernel_size
    convolution = isinstance(leaf.site.owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    pointwise = convolution and all(size == 1 for size in kernel)  # type: ignore[union-attr]
    return pointwise or leaf.fan_out == leaves[0].fan_in


def _class_count(leaf: Leaf) -> str:
    """Return the attribute, hyperparameter or config entry around the leaf that counts classes and is its fan-out."""
    for module in reversed(leaf.site.parents):
        for source in (module, getattr(module, "config", None), getattr(module, "hparams", None)):
            for name in _CLASS_COUNTS:
                value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
                if isinstance(value, int) and value == leaf.fan_out:
                    return name
    return ""


def _ends_sequential(module: nn.Module, leaf: Leaf) -> bool:
    """Whether nothing but ``nn.Sequential`` containers, each ending in the next, lie between the root and the leaf."""
    while module is not leaf.site.owner:
        parts = [child for child in module.children() if any(True for _ in child.parameters())]
        if not parts or (len(parts) > 1 and not isinstance(module, nn.Sequential)):
            return False
        module = parts[-1]
    return True
