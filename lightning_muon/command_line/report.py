"""Reads an error report of jsonargparse, an indented tree, down to the leaf that explains the error.

A report names a key, then the members of its type. For each member it names the class that was tried, then a key of
that class, and so on. The text is the same in jsonargparse 4.40 and 4.53. The exceptions behind it keep only the first
member.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from textwrap import dedent

from lightning_muon.command_line.names import resolve


@dataclass(frozen=True)
class Problem:
    """A leaf of the report.

    Args:
        text: what jsonargparse says at the leaf.
        key: dotted key of the setting, less ``init_args``.
        owner: path of the class whose argument the leaf is about, if any.
        kinds: classes that the setting may be of.
        value: the given value, as text.
        expected: simple types and choices of the setting, if the value is none of them.
    """

    text: str
    key: str = ""
    owner: str | None = None
    kinds: tuple[type, ...] = ()
    value: str | None = None
    expected: tuple[str, ...] = ()


def read_report(report: str) -> Problem:
    """Return the leaf that explains the error; for a union, that of the member that fits the value best."""
    return _read(report, Problem(""))


def _read(text: str, at: Problem) -> Problem:
    text = dedent(text).strip("\n")
    text = re.sub(r"\AValidation failed: |\A- Expected a (?:config )?path but [^\n]*\n(?:- )?", "", text)
    if found := re.match(r'Parser key "([^"]+)"(?: element \d+)?:', text):
        key = ".".join(filter(None, (at.key, found[1].replace(".init_args.", "."))))
        return _read(text[found.end() :].removeprefix(" "), replace(at, key=key, expected=()))
    if text.startswith("Does not validate against any of the Union subtypes"):
        return _read_union(text, at)
    if found := re.match(r"Problem with given class_path '([^']+)':", text):
        return _read(text[found.end() :], replace(at, owner=found[1]))
    if found := re.match(r"Type [^\n]*? expects a function or a callable class: ", text):
        rest = text[found.end() :]
        if given := re.search(r"\. Got value: (?:Namespace\(|\{')class_path'?[=:] ?'([^']*)'.*\Z", rest, re.DOTALL):
            rest, at = rest[: given.start()], replace(at, owner=given[1])
        return _read(rest, at)
    if found := re.match(r"(.*?)\. Got value: ([^\n]*)", text, re.DOTALL):
        text, at = found[1], replace(at, value=found[2])
    return replace(at, text=text, expected=_expected(text))


def _read_union(text: str, at: Problem) -> Problem:
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if line.startswith("Given value type:")), len(lines))
    given = "\n".join(lines[end + 1 :]).removeprefix("Given value: ")
    if nested := re.fullmatch(r"NestedArg\(key='[^']*', val='?(.*?)'?\)", given, re.DOTALL):
        given = nested[1]
    at = replace(at, kinds=_classes_in(lines[1]), value=given)
    members = re.split(r"^- ", dedent("\n".join(lines[3:end])), flags=re.MULTILINE)[1:]
    leaves = [_read(re.sub(r"^  ", "", member, flags=re.MULTILINE), at) for member in members]
    if not leaves:
        return replace(at, text=text)
    best = max(leaves, key=lambda leaf: _nearness(leaf, at))  # the first of equals
    if best.expected and best.key == at.key:
        expected = (choice for leaf in leaves if leaf.key == at.key for choice in leaf.expected if choice != "null")
        return replace(best, expected=tuple(dict.fromkeys(expected)) or best.expected)
    return best


def _nearness(leaf: Problem, union: Problem) -> int:
    """How far the value came with a member of the union."""
    if leaf.key != union.key:
        return 6  # the class was right, and an argument is not
    if re.match(r"Expected '[^']*' to be |Import path |Not a valid subclass|Expected an import path or", leaf.text):
        return 3
    if leaf.owner != union.owner:
        return 6
    if leaf.text.startswith("Multiple subclasses"):
        return 5
    if found := re.match(r"Expected a dot import path string: (.*)", leaf.text):
        return 4 if found[1][:1].isupper() else 1
    if leaf.expected:
        return {"null": 0, "list": 1, "dict": 1}.get(leaf.expected[0], 2)
    return 3


def _expected(text: str) -> tuple[str, ...]:
    """Types and choices of ``Expected a <class 'float'>`` and ``Expected a typing.Literal['a', 'b']``."""
    if literal := re.fullmatch(r"Expected an? typing\.Literal\[(.*)\]", text):
        return tuple(literal[1].split(", "))
    if found := re.fullmatch(r"Expected an? <class '([\w.]+)'>", text):
        name = found[1].rsplit(".", 1)[-1]
        return ({"NoneType": "null", "Iterable": "list", "Sequence": "list", "Mapping": "dict"}.get(name, name),)
    return ()


def _classes_in(annotation: str) -> tuple[type, ...]:
    """Return the classes that a type names, in the order of its text, without builtins and collections."""
    paths = re.findall(r"(?:\w+\.)+[A-Z]\w*", annotation)
    found = (resolve(path) for path in paths if path.split(".")[0] not in ("typing", "collections"))
    return tuple(dict.fromkeys(cls for cls in found if isinstance(cls, type)))
