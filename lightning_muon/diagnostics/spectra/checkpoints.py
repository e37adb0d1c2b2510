"""Checkpoints as the matrices that they hold."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muon.diagnostics.matrices import WatchedParameter, find_matrices
from lightning_muon.diagnostics.spectra.histories import Histories, read_histories
from lightning_muon.partition import MatrixLayout
from lightning_muon.partition.names import WRAPPER_NAMES, near_names
from lightning_muon.partition.partition import LAYOUTS_KEY

_GUESSED = (
    "Nothing says which tensors are matrices: all with two dimensions or more are shown, as they are. With --model "
    "my.Module they are read as its partition says."
)
_ONLY_LIGHTNING = "That takes Lightning checkpoints, which plain state dicts are not."
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_LIGHTNING_KEY = "pytorch-lightning_version"
_PARALLEL_PREFIX = "module."  # of DistributedDataParallel and DataParallel


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint with matrices; the message says what it is and what to do."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one file holds.

    Args:
        path: the file.
        step: Lightning's ``global_step``; None in a plain state dict.
        parameters: all tensors that can be read as matrices, in the model's order.
        histories: what the spectral monitors of the run had measured until then.
        notes: sentences for the user about how they are read; none where the checkpoint or the model says so.
    """

    path: Path
    step: int | None
    parameters: list[WatchedParameter]
    histories: Histories
    notes: Sequence[str] = ()


def read_checkpoints(paths: Sequence[Path], module_class: type | None = None) -> list[Checkpoint]:
    """Read Lightning checkpoints and plain state dicts.

    The partition of ``module_class`` says which tensors are matrices and how they are read; without it the entry
    ``matrix_layouts`` of the checkpoint, or else that of the first of the others that has one; without any, all
    floating-point tensors with two dimensions or more are matrices, as they are.

    Args:
        paths: files of ``torch.save`` or ``.safetensors`` files. No code in them is run.
        module_class: a LightningModule, which loads each checkpoint.

    Raises:
        CheckpointError: for a path that is none of these, or that ``module_class`` cannot load.
    """
    contents = [_load(path) for path in paths]
    if module_class is not None:
        return [_as_module(*pair, module_class) for pair in zip(paths, contents, strict=True)]
    layouts = [_layouts(*pair) for pair in zip(paths, contents, strict=True)]
    knows = next((index for index, found in enumerate(layouts) if found is not None), None)
    checkpoints = []
    for path, content, found in zip(paths, contents, layouts, strict=True):
        state, notes = _state(path, content)
        if found is None and knows is not None:
            found = layouts[knows]
            notes.append(f"{path} does not say which of its tensors are matrices: it is read as {paths[knows]} is.")
        elif found is None:
            lightning = all("state_dict" in content for content in contents)
            notes.append(_GUESSED if lightning else f"{_GUESSED} {_ONLY_LIGHTNING}")
        parameters = _parameters(path, _tensors(path, content, state), found)
        checkpoints.append(Checkpoint(path, _step(content), parameters, read_histories(content), notes))
    return checkpoints


def _load(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        siblings = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        raise CheckpointError(f"No such file: {path}. {near_names(path.name, siblings) if siblings else ''}".strip())
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint. {_inside(path)}")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds an object of type {type(content).__name__}, not a state dict."
        )
    return content


def _inside(folder: Path) -> str:
    if (folder / ".metadata").exists():
        return f"Make one file of its shards: python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}"
    found = [file for file in folder.rglob("*") if file.suffix in _SUFFIXES]
    if not found:
        return f"There is no {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file in it."
    files = [str(file) for file in sorted(found, key=lambda file: (_SUFFIXES.index(file.suffix), file))]
    return f"In it: {', '.join(files[:5])}{', ...' if len(files) > 5 else '.'}"


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    if find_spec("safetensors") is None:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors")
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _load_pickle(path: Path) -> object:
    zipped = zipfile.is_zipfile(path)
    try:
        # Mapped, so that optimizer states stay on the disk.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {_what_it_is(path, zipped)}") from error


def _what_it_is(path: Path, zipped: bool) -> str:
    if path.stat().st_size == 0:
        return "the file is empty."
    if not zipped:
        return "torch.save did not write it, or not all of it is there."
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError):
        classes = []
    if not classes:
        return "it is a zip archive without a state dict."
    return (
        f"it holds Python objects ({', '.join(sorted(classes)[:5])}), and loading them could run any code. Save the "
        "tensors alone: torch.save(module.state_dict(), path)."
    )


def _as_module(path: Path, content: Mapping[str, Any], module_class: type) -> Checkpoint:
    if "state_dict" not in content:
        raise CheckpointError(
            f"{path} is a plain state dict, and --model loads Lightning checkpoints. Leave --model out."
        )
    _tensors(path, content, _state(path, content)[0])  # which refuses what has no values
    try:
        module = module_class.load_from_checkpoint(path, map_location="cpu", weights_only=True)  # type: ignore[attr-defined]
        return Checkpoint(path, _step(content), find_matrices(module, {}), read_histories(content))
    except Exception as error:  # whatever the user's class raises
        raise CheckpointError(
            f"{module_class.__name__} does not load {path}: {type(error).__name__}: "
            f"{shorten(str(error), 400, placeholder=' ...')}"
        ) from error


def _step(content: Mapping[str, Any]) -> int | None:
    step = content.get("global_step") if "state_dict" in content else None
    return step if isinstance(step, int) else None


def _layouts(path: Path, content: Mapping[str, Any]) -> dict[str, MatrixLayout] | None:
    entry = content.get(LAYOUTS_KEY) if "state_dict" in content else None
    if entry is None:
        return None
    try:
        return {name: MatrixLayout(**fields) for name, fields in entry.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The entry {LAYOUTS_KEY!r} of {path} is not what MuonMixin writes ({error}). Give --model my.Module."
        ) from error


def _state(path: Path, content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict: Lightning's, the content itself, or what lies under one of its keys, and a note where it does."""
    if "state_dict" in content:
        state = content["state_dict"]
        return state if isinstance(state, Mapping) else {}, []
    deeper = {key: of for key, of in content.items() if isinstance(of, Mapping) and any(map(_is_matrix, of.values()))}
    if not deeper or any(map(_is_matrix, content.values())):
        return content, []
    first, *others = deeper
    note = f"Of {path} the state dict under {first!r} is read"
    return deeper[first], [f"{note}, and not what is under {', '.join(map(repr, others))}." if others else f"{note}."]


def _is_matrix(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.ndim >= 2
        and value.numel() > 0
    )


def _tensors(path: Path, content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict's tensors, by names without the prefixes of wrappers."""
    tensors = {_clean(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise CheckpointError(
            f"{path} is not a checkpoint: no state dict of tensors under 'state_dict', at its top or under one of its "
            f"keys. Its keys: {keys}."
        )
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{path} has tensors without values, on the device meta, {empty[0]!r} among them: save it after the "
            "weights of the model were loaded or initialized."
        )
    # A LightningModule may itself call its only child so.
    if _LIGHTNING_KEY not in content and all(name.startswith(_PARALLEL_PREFIX) for name in tensors):
        return {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def _parameters(
    path: Path, tensors: Mapping[str, Tensor], layouts: Mapping[str, MatrixLayout] | None
) -> list[WatchedParameter]:
    shared: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if _is_matrix(tensor):
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            shared.setdefault(place, []).append(name)
    parameters = []
    for names in shared.values():
        name = next((name for name in names if name in (layouts or ())), names[0])
        layout = (layouts or {}).get(name)
        try:
            parameters.append(
                WatchedParameter(
                    name,
                    nn.Parameter(tensors[name], requires_grad=False),
                    layout or MatrixLayout(),
                    aliases=tuple(alias for alias in names if alias != name),
                    by_default=layouts is None or layout is not None,
                )
            )
        except ValueError as error:
            raise CheckpointError(
                f"{name!r} in {path} cannot be read as the entry {LAYOUTS_KEY!r} says: {error} Give --model my.Module."
            ) from error
    return parameters
