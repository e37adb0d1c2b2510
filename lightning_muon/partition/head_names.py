"""Heads by their names, if the layers around them agree.

There are three kinds of names, from strong to weak:

* Distribution, quantile and basis heads of forecasting libraries (GluonTS, pytorch-forecasting, neuralforecast, darts,
  transformers): heads wherever they are registered, in every block.
* Common head names (``lm_head``, ``classifier``): where no later layer takes the output, outside repeated blocks.
* Names that hidden layers have too (``out``, ``output_layer``): also the width must not be that of a hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lightning_muon.partition.branches import ends_branch, ends_in_hidden_width, is_read_within, parallel_ends
from lightning_muon.partition.leaves import Leaf, inside_known, is_repeated
from lightning_muon.partition.names import class_name
from lightning_muon.partition.sites import Site

_HEAD_NAMES = {
    "bbox_predictor",
    "class_labels_classifier",
    "classification_head",
    "classifier",
    "class_head",
    "cls_head",
    "decoder_pred",
    "embed_out",
    "global_skip",
    "head",
    "head_dist",
    "heads",
    "lm_head",
    "logits",
    "logits_proj",
    "lookback_skip",
    "mlp_head",
    "output_head",
    "output_heads",
    "prediction_head",
    "prediction_heads",
    "prototypes",
    "qa_outputs",
    "score",
    "segmentation_head",
    "task_heads",
    "to_logits",
    "to_pixels",
}
# Always heads, even if layers registered later read the same width.
_SURE_NAMES = {"class_head", "decoder_pred", "embed_out", "lm_head", "qa_outputs", "segmentation_head", "to_logits"}
# Names that hidden layers have too: they count only if no hidden state has the width.
_LIKELY_NAMES = {
    "fc_out",
    "final_layer",
    "generator",
    "last_layer",
    "out",
    "out_layer",
    "output",
    "output_adapter",
    "output_layer",
    "output_lin",
    "output_linear",
    "output_projector",
    "predictor",
    "project_out",
    "projection_layer",
    "temporal_decoder",
}
# get_args_proj and param_proj (GluonTS), parameter_projection (transformers), distribution_projector
# (pytorch-forecasting), distr_output (neuralforecast), quantile_proj (GluonTS' MQ models and many others).
_DISTRIBUTION = re.compile(
    r"^(args|params?|parameters?|distr|dist|distribution|quantiles?|likelihood|emission)_"
    r"(proj|projs|projections?|projectors?|outputs?|heads?|layers?|linear|lin|fc|net|mlp|mu|presigma|sigma|loc|scale)$"
    r"|^(mean|mu|loc|sigma|scale|quantiles?|point|linear)_(forecasters?|heads?)$",
    re.IGNORECASE,
)
# theta_b_fc, theta_f_fc, backcast_fc (pytorch-forecasting), backcast_linear_layer, forecast_g (darts), theta_layer.
_BASIS = re.compile(
    r"^thetas?(_(b|f|backcast|forecast))?(_(fc|layers?|linear|lin|proj|projection|head|net|out))?$"
    r"|^(backcast|forecast)(_(fc|linear|lin|g|layers?|linear_layer|proj|projection|head|out|output|result|short_cut|basis|thetas?))?$"
    r"|^basis(_(fc|layers?|linear|lin|proj|projection|parameters|coefficients|coeffs?|weights?|expansion|b|f|backcast|forecast))?$",
    re.IGNORECASE,
)
_BASIS_CLASS = re.compile(r"Basis$")
_BASIS_CHILD = re.compile(r"^(\w+_)?basis(_\w+)?$", re.IGNORECASE)
_PROJECTION_HEAD = re.compile(r"(Projection|Proj)Head$|^Projector$", re.IGNORECASE)
_PROJECTION_NAMES = {"projection_head", "proj_head"}


def named_heads(leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    """Return heads of the whole model by their names, with a sentence for each."""
    return [*_wherever_registered(leaves, _DISTRIBUTION), *_common(leaves, sites)]


def basis_heads(leaves: Sequence[Leaf]) -> list[tuple[Leaf, str]]:
    """Return heads of blocks by their names: the coefficients of a basis and the basis of each block, as in N-BEATS."""
    return [*_wherever_registered(leaves, _BASIS), *_before_a_basis(leaves)]


def inside_projection_head(leaf: Leaf) -> bool:
    """Whether the leaf is in a projection head of self-supervised learning, which ends in an embedding."""
    if leaf.path[-1:] in (("last_layer",), ("prototypes",)):
        return False  # Scores of prototypes in DINO and SwAV are classes.
    by_class = any(_PROJECTION_HEAD.search(type(part).__name__) for part in leaf.modules)
    return by_class or not _PROJECTION_NAMES.isdisjoint(leaf.path)


def _wherever_registered(leaves: Sequence[Leaf], names: re.Pattern[str]) -> list[tuple[Leaf, str]]:
    """Return the last layers of parts named like distribution, quantile or basis heads, in every block."""
    found = []
    what = "of a basis expansion" if names is _BASIS else "of a distribution or of quantiles"
    for path, part in _parts(leaves, names).items():
        parent = part[0].modules[len(path) - 1]
        for leaf in _ends(part):
            if names is _BASIS:
                is_head = _is_basis_head(leaf, path, leaves)
            else:
                is_head = not is_read_within(leaf, leaves, parent)
            if is_head:
                found.append((leaf, f"Output head: the last layer of {path[-1]!r}, parameters {what}."))
    return found


def _is_basis_head(leaf: Leaf, path: tuple[str, ...], leaves: Sequence[Leaf]) -> bool:
    """Whether only basis layers take a layer's output, and the block has a forecast or layers before this one.

    The coefficients and the basis that they weigh are factors of one linear map to the forecast.
    """
    if leaf.fan_in == leaf.fan_out:
        return False
    parent = leaf.modules[len(path) - 1]
    later = [other for other in leaves[leaves.index(leaf) + 1 :] if parent in other.modules]
    if any(
        other.fan_in == leaf.fan_out and not any(map(_BASIS.search, other.path[len(path) - 1 :])) for other in later
    ):
        return False
    names = {name for name in (*parent._modules, *parent._parameters, *parent._buffers) if name != path[-1]}
    beside = any(_BASIS.search(name) or _BASIS_CHILD.search(name) or "cast" in name for name in names)
    if beside or "cast" in path[-1]:
        return True
    earlier = [other for other in leaves[: leaves.index(leaf)] if parent in other.modules]
    return any(other.fan_out == leaf.fan_in for other in earlier)


def _before_a_basis(leaves: Sequence[Leaf]) -> list[tuple[Leaf, str]]:
    """Return last layers of blocks that pass their output to a basis, a part without a layer that reads that width."""
    found: dict[int, tuple[Leaf, str]] = {}
    for leaf in leaves:
        for depth, block in enumerate(leaf.modules[:-1]):
            name = next((n for n, child in block._modules.items() if child is not None and _is_basis(n, child)), None)
            if name is None or leaf.path[depth] == name or leaf.kind == "other":
                continue
            inside = [other for other in leaves if block in other.modules]
            part = [other for other in inside if other.path[depth] != name]
            taken = any(other.fan_in == leaf.fan_out for other in inside if other not in part)
            if part[-1] is leaf and not taken:
                reason = f"Output head: gives the coefficients of {name!r}, {class_name(block._modules[name])}."  # type: ignore[arg-type]
                found[id(leaf)] = (leaf, reason)
    return list(found.values())


def _is_basis(name: str, child: nn.Module) -> bool:
    return bool(_BASIS_CHILD.search(name) or _BASIS_CLASS.search(type(child).__name__)) and "linear" not in name


def _common(leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    """Return the last layers of each part with a head's name, if no later layer takes their output."""
    found = []
    for path, part in _parts(leaves, _HEAD_NAMES | _LIKELY_NAMES).items():
        named = next(name for name in reversed(path) if name in _HEAD_NAMES | _LIKELY_NAMES)
        last = part[-1]
        # A norm inside the part itself may follow the output, as in TiDE of neuralforecast.
        around = [site for site in sites if site.path[: len(path)] != path]
        if named in _LIKELY_NAMES and _looks_hidden(last, leaves, around):
            continue
        if inside_projection_head(last) or _keeps_its_space(named, part):
            continue
        for leaf in _ends_of_tasks(part, len(path)) if named.endswith("heads") else _ends(part):
            if named in _SURE_NAMES or not _is_read_later(leaf, part, leaves):
                found.append((leaf, f"Output head: the last layer of {named!r}, and no layer follows it."))
    return found


def _parts(leaves: Sequence[Leaf], names: set[str] | re.Pattern[str]) -> dict[tuple[str, ...], list[Leaf]]:
    """Return the layers of each part with such a name, by its path; common names only outside repeated blocks."""
    parts: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
        for depth, name in enumerate(leaf.path):
            fits = names.search(name) if isinstance(names, re.Pattern) else name in names
            repeated = not isinstance(names, re.Pattern) and any(is_repeated(leaf, outer) for outer in range(depth))
            if not fits or repeated or leaf.kind == "other":
                continue
            # peft keeps the original head beside the trained copy: both are heads.
            copies = leaf.path[depth + 1 : depth + 2] in (("original_module",), ("modules_to_save",))
            parts.setdefault(leaf.path[: depth + 1 + copies], []).append(leaf)
            break
    return parts


def _ends(part: Sequence[Leaf]) -> list[Leaf]:
    """Return the last layer of a part, parallel layers with the same input, and layers added to its output."""
    last = part[-1]
    taken = {leaf.fan_in for leaf in part}
    added = (leaf for leaf in part[:-1] if (leaf.kind, leaf.fan_out) == (last.kind, last.fan_out))
    return list(
        dict.fromkeys([last, *parallel_ends(last, part), *(leaf for leaf in added if leaf.fan_out not in taken)])
    )


def _ends_of_tasks(part: Sequence[Leaf], depth: int) -> list[Leaf]:
    """Return the last layer of each child of a container of heads."""
    last = {leaf.path[depth : depth + 1]: leaf for leaf in part}
    return list(last.values())


def _looks_hidden(last: Leaf, leaves: Sequence[Leaf], sites: Sequence[Site]) -> bool:
    return inside_known(last) or ends_in_hidden_width(last, leaves, sites) or ends_branch(last, leaves)


def _keeps_its_space(name: str, part: Sequence[Leaf]) -> bool:
    """Whether a part of several layers returns to its input width: a predictor as in BYOL, not an output."""
    return name in {"head", "prediction_head", "predictor"} and len(part) > 1 and part[0].fan_in == part[-1].fan_out


def _is_read_later(leaf: Leaf, part: Sequence[Leaf], leaves: Sequence[Leaf]) -> bool:
    """Whether a later layer takes the output of a layer, or the concatenated outputs of its part's children."""
    later = leaves[leaves.index(part[-1]) + 1 :]
    together = {leaf.fan_out}
    if len(part) > 1 and all(other.fan_out == leaf.fan_out for other in part):
        ends = len({other.path[:-1] for other in part})
        together |= {leaf.fan_out * ends, leaf.fan_out * len(part)}
    return any(other.fan_in in together for other in later)
