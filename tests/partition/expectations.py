"""Short tables of the expected partition of every parameter of a model."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from lightning_muon.partition import ParameterAssignment, Partition, partition_parameters


def assert_partition(module: nn.Module, expected: str) -> Partition:
    """Check every parameter of a module against a table.

    A line is ``glob xcount role [layout | layout ...]``. Each parameter belongs to the first line whose glob matches;
    each line must have exactly ``count`` parameters. Hidden parameters are in the group matrix with a layout of the
    line; if it lists several layouts, all of them must occur. All others are in the group other, without a layout.
    Layouts have the form of :func:`layout_text`.
    """
    partition = partition_parameters(module)
    assert [entry.name for entry in partition] == [name for name, _ in module.named_parameters()]
    lines = [line.split(maxsplit=3) for line in expected.splitlines() if line.strip()]
    spoken: list[list[ParameterAssignment]] = [[] for _ in lines]
    for entry in partition:
        index = next((i for i, line in enumerate(lines) if fnmatchcase(entry.name, line[0])), None)
        assert index is not None, (
            f"No line for {entry.name} {tuple(entry.parameter.shape)}: {entry.role}, {entry.reason}"
        )
        spoken[index].append(entry)
    for (glob, count, role, *layouts), entries in zip(lines, spoken, strict=True):
        assert f"x{len(entries)}" == count, f"{glob}: {[entry.name for entry in entries]}"
        for entry in entries:
            assert entry.role == role, f"{entry.name}: {entry.role}, not {role}. {entry.reason}"
            assert entry.group == ("matrix" if role == "hidden" else "other"), entry.name
            assert entry.reason.endswith("."), entry.reason
        texts = {layout_text(entry) for entry in entries}
        assert texts == ({text.strip() for text in layouts[0].split("|")} if layouts else {""}), f"{glob}: {texts}"
    return partition


def layout_text(entry: ParameterAssignment) -> str:
    """Shapes as in ``"3 of 32 x 32"``, after ``T`` for transposed storage, ``r4`` for repeats and ``g4`` for groups."""
    layout = entry.layout
    if layout is None:
        return ""
    flags = ["T"] if layout.transposed else []
    flags += [f"r{layout.repeats}"] if layout.repeats > 1 else []
    flags += [f"g{layout.groups}"] if layout.groups > 1 else []
    return " ".join([*flags, layout.describe(entry.parameter.shape)])
