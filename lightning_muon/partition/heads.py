"""Which layers are output heads, by evidence from most to least certain.

1. The model says so: ``get_output_embeddings()`` (Hugging Face), ``get_classifier()`` (timm),
   ``nn.AdaptiveLogSoftmaxWithLoss``.
2. A common head name (``lm_head``, ``classifier``, ...), where no later layer takes its output.
3. Outside the base model of a Hugging Face model, a last layer with ``num_labels`` or ``vocab_size`` outputs.
4. Only if none of these was found and no Linear is tied to an embedding: the last registered layer, unless something
   shows that its output is a hidden state. See :func:`_last_layer` for what does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_muon.partition.fused import Blocks, fused_blocks
from lightning_muon.partition.sites import Site

_HEAD_NAMES = {
    "bbox_predictor",
    "class_labels_classifier",
    "classification_head",
    "classifier",
    "cls_head",
    "embed_out",
    "head",
    "lm_head",
    "logits",
    "logits_proj",
    "output_head",
    "prediction_head",
    "qa_outputs",
    "score",
    "to_logits",
}
# Names that hidden layers have too: they count only where the width is that of no hidden state.
_LIKELY_NAMES = {"fc_out", "final_layer", "out", "out_layer", "output", "output_layer", "predictor"}
_CLASS_COUNTS = ("num_classes", "n_classes", "num_labels", "vocab_size", "num_items", "n_items", "num_tokens")
_COMPOSITES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OTHER_LAYERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A layer that maps fan-in to fan-out features; both are 0 for layers that are never heads, such as a GRU."""

    site: Site
    fan_in: int
    fan_out: int

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules around the layer and the layer, outermost first."""
        return (*self.site.parents, self.site.owner)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(fan-in, fan-out) of ``nn.Linear``, Hugging Face ``Conv1D``, and modules with the attributes of ``nn.Linear``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return None
    if is_hf_conv1d(module):
        return weight.shape[0], weight.shape[1]
    shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return (weight.shape[1], weight.shape[0]) if shape == (weight.shape[1], weight.shape[0]) else None


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's ``Conv1D``, a linear layer with a transposed weight."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf")


def find_heads(module: nn.Module, sites: Sequence[Site]) -> dict[int, str]:
    """Output heads of a module.

    Args:
        module: the root.
        sites: all its parameter sites.

    Returns:
        A sentence for each head, by ``id`` of its weight.
    """
    leaves = _leaves(sites)
    heads, declared = _declared(module)
    found = [*_named(leaves, sites), *_of_hugging_face(leaves)]
    # A single output may also be a score inside the model, as in attention pooling: no reason to stop looking.
    certain = declared or heads or any(leaf.fan_out > 1 for leaf, _ in found) or _has_tied_head(sites)
    if not certain:
        found += _last_layer(module, leaves, sites)
    return {**{id(leaf.site.parameter): reason for leaf, reason in reversed(found)}, **heads}


def _leaves(sites: Sequence[Site]) -> list[Leaf]:
    leaves: list[Leaf] = []
    seen: set[int] = set()
    for site in sites:
        if id(site.owner) in seen or any(name.startswith("lora_") for name in site.path):
            continue
        shape = linear_shape(site.owner)
        if isinstance(site.owner, _CONVS):
            shape = site.owner.in_channels, site.owner.out_channels
        if shape and site.local == "weight" and site.part != "magnitude":
            leaves.append(Leaf(site, *shape))
            seen.add(id(site.owner))
        elif isinstance(site.owner, _OTHER_LAYERS) and not isinstance(site.owner, _CONVS):
            leaves.append(Leaf(site, 0, 0))
            seen.add(id(site.owner))
    return leaves


def _declared(module: nn.Module) -> tuple[dict[int, str], bool]:
    """Heads that models declare, and whether a model declared anything (also that it has no head)."""
    heads: dict[int, str] = {}
    declared = False
    for part in module.modules():
        kind = type(part).__name__
        if isinstance(part, nn.AdaptiveLogSoftmaxWithLoss):
            heads.update({id(p): f"Output head: part of {kind}." for p in part.parameters() if p.ndim == 2})
        # Looked up on the class: wrappers such as peft's pass unknown attributes on to the model inside.
        for method in ("get_output_embeddings", "get_classifier"):
            if not callable(getattr(type(part), method, None)):
                continue
            try:
                head = getattr(part, method)()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            declared = declared or method == "get_classifier"
            weight = getattr(head, "weight", None)
            if isinstance(weight, nn.Parameter):
                heads[id(weight)] = f"Output head: {kind}.{method}() returns it."
    return heads, declared


def _named(leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    """The last layer of each part with a head's name, where no later layer takes its output."""
    last: dict[tuple[str, ...], int] = {}
    for index, leaf in enumerate(leaves):
        for depth, name in enumerate(leaf.site.path):
            if (
                name in _HEAD_NAMES | _LIKELY_NAMES
                and leaf.fan_out
                and not any(_repeated(leaf, outer) for outer in range(depth))
            ):
                # peft keeps the original head beside the trained copy: both are heads.
                copies = leaf.site.path[depth + 1 : depth + 2] in (("original_module",), ("modules_to_save",))
                last[leaf.site.path[: depth + 1 + copies]] = index
                break
    found = []
    for path, index in last.items():
        leaf = leaves[index]
        named = next(name for name in reversed(path) if name in _HEAD_NAMES | _LIKELY_NAMES)
        likely_hidden = named in _LIKELY_NAMES and (_inside_known(leaf) or _looks_hidden(leaf, leaves, sites))
        if not likely_hidden and not any(other.fan_in == leaf.fan_out for other in leaves[index + 1 :]):
            found.append((leaf, f"Output head: the last layer of {named!r}, and no layer follows it."))
    return found


def _of_hugging_face(leaves: Sequence[Leaf]) -> list[tuple[Leaf, str]]:
    """Last layers outside the base model with as many outputs as the config has labels or tokens."""
    last: dict[tuple[int, str], tuple[Leaf, nn.Module]] = {}
    for leaf in leaves:
        for depth, model in enumerate(leaf.site.parents):
            base = getattr(model, "base_model", None) if _is_hugging_face(model) else None
            if base is not None and base is not model and base not in leaf.modules:
                last[id(model), leaf.site.path[depth]] = (leaf, model)
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
    """The last registered layer and those parallel to it, unless there is a sign that its output is a hidden state.

    Signs: it belongs to a repeated block, an attention or transformer layer, or a Hugging Face base model; it is as
    wide as an embedding or a norm (the width of the residual stream; in a model scored against its embeddings the last
    layer writes there); another layer, other than the first, takes inputs of this width; it fuses several maps; another
    branch ends in the same width (two towers that meet in a dot product). A convolution also needs to be pointwise or
    to return to the channels of the input. The last layer of a plain ``nn.Sequential`` model is a head whatever its
    width, and so is one with as many outputs as a module around it says there are classes, labels, tokens or items.
    """
    trainable = [leaf for leaf in leaves if leaf.site.parameter.requires_grad] or list(leaves)
    if not trainable or trainable[-1].site.owner is module or not trainable[-1].fan_out:
        return []
    last = trainable[-1]
    if _inside_known(last) or any(_repeated(last, depth) for depth in range(len(last.site.path))):
        return []
    if isinstance(last.site.owner, _CONVS) and not _is_output_conv(last, trainable):
        return []
    if count := _class_count(last):
        reason = f"Output head: the last layer, with {count} = {last.fan_out} outputs."
    elif _ends_sequential(module, last):
        reason = "Output head: the model ends in this layer. A rule can send it to the matrix group."
    elif last.fan_out > 1 and _looks_hidden(last, trainable, sites):
        return []
    else:
        reason = (
            f"Output head: the last layer, and its width, {last.fan_out}, is that of no hidden state. "
            "A rule can send it to the matrix group."
        )
    beside = f"Output head: takes the same input as the last layer, {'.'.join(last.site.path)!r}."
    return [(last, reason), *((leaf, beside) for leaf in _parallel(last, trainable))]


def _inside_known(leaf: Leaf) -> bool:
    """Whether the leaf is part of a Hugging Face model or of a transformer layer of torch."""
    return any(_is_hugging_face(part) or isinstance(part, _COMPOSITES) for part in leaf.modules)


def _is_hugging_face(module: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _repeated(leaf: Leaf, depth: int) -> bool:
    """Whether the leaf lies inside one of several like modules in a container, e.g. the blocks of a transformer."""
    if depth >= len(leaf.site.path) - 1:
        return False
    container, block = leaf.modules[depth], leaf.modules[depth + 1]
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    return any(other is not block and type(other) is type(block) for other in container.children())


def _is_output_conv(leaf: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether a convolution gives each position's classes (pointwise) or an image like the input's."""
    kernel = leaf.site.owner.kernel_size
    return all(size == 1 for size in kernel) or leaf.fan_out == leaves[0].fan_in  # type: ignore[union-attr]


def _class_count(leaf: Leaf) -> str:
    """An attribute, hyperparameter or config entry around the leaf that counts classes and equals its fan-out."""
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


def _looks_hidden(last: Leaf, leaves: Sequence[Leaf], sites: Sequence[Site]) -> bool:
    for site in sites:
        owner, shape = site.owner, site.parameter.shape
        if isinstance(owner, nn.Embedding) and owner.embedding_dim == last.fan_out:
            return True
        if "norm" in type(owner).__name__.lower() and site.local == "weight" and shape[-1:] == (last.fan_out,):
            return True
    if any(leaf.fan_in == last.fan_out for leaf in leaves[1:]):
        return True
    if fused_blocks(last.site.owner_name, last.site.parent, last.fan_out, last.fan_in) != Blocks():
        return True
    return any(leaf.fan_out == last.fan_out and _ends_branch(leaf, last, leaves) for leaf in leaves if leaf is not last)


def _ends_branch(leaf: Leaf, last: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether the leaf is the last of another child of the module that holds both: the other of two towers."""
    depth = next((i for i, (a, b) in enumerate(zip(leaf.site.path, last.site.path, strict=False)) if a != b), 0)
    if leaf.modules[depth] is leaf.site.parent is last.site.parent:
        return False
    branch = leaf.site.path[: depth + 1]
    return [other for other in leaves if other.site.path[: depth + 1] == branch][-1] is leaf


def _parallel(last: Leaf, leaves: Sequence[Leaf]) -> list[Leaf]:
    """Layers registered just before the last one in the same module that take the same input: heads of other tasks."""
    found = []
    for leaf in reversed(leaves[: leaves.index(last)]):
        same = leaf.site.parents[-1:] == last.site.parents[-1:] and leaf.fan_in == last.fan_in
        if not same or leaf.fan_out in (0, last.fan_in):
            break
        found.append(leaf)
    return found
