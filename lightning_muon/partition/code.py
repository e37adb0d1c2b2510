"""What the code of a class does with its tensors: which of them it applies as linear maps, and from which side.

Read from the source of the class, as far as there is one; nothing is run. Only plain uses count: ``F.linear(x, w)``,
``x @ w``, ``torch.matmul(x, w)`` (or ``mm``, ``addmm``) and ``einsum`` of two operands, where ``w`` is
``self.name``, ``self.name[i]``, an element of a loop over ``self.name``, a local name for one of these, or its
transpose.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

_CASTS = {"to", "type_as", "type", "float", "half", "double", "bfloat16", "contiguous"}
_FLIPS = {"t", "T", "mT", "transpose"}
_EQUATION = re.compile(r"^([A-Za-z.]+),([A-Za-z]{2})->([A-Za-z.]+)$")
# Rows of such tensors are things that inputs are compared with: x @ self.keys.T is no layer.
_ROWS = re.compile(
    r"(^|_)(keys?|quer(y|ies)|mem|memory|memories|prototypes?|cent(er|roid)s?|anchors?|slots?|tokens?|latents?|atoms?)(_|$)",
    re.IGNORECASE,
)


class Applied(NamedTuple):
    """How code applies a tensor.

    Args:
        transposed: whether the tensor is (fan-in, fan-out): multiplied from the right as it is.
        indexed: whether the code applies elements of it, one at a time: a stack or a list of maps.
    """

    transposed: bool
    indexed: bool


@functools.lru_cache(maxsize=4096)
def applied_maps(owner: type[nn.Module]) -> Mapping[str, Applied]:
    """The attributes of a module's class that its methods apply as linear maps, always in the same way."""
    uses: dict[str, set[Applied]] = {}
    for base in owner.__mro__:
        if base.__module__.partition(".")[0] in {"torch", "builtins", "lightning", "pytorch_lightning"}:
            continue
        for name, applied in _uses_in(base):
            uses.setdefault(name, set()).add(applied)
    return {name: next(iter(found)) for name, found in uses.items() if len(found) == 1}


@functools.lru_cache(maxsize=4096)
def _uses_in(base: type) -> tuple[tuple[str, Applied], ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return ()
    methods = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = {use for method in methods if method.name != "__init__" for use in _uses_in_method(method)}
    return tuple(sorted(found))


def _uses_in_method(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, Applied]]:
    names = _local_names(method)
    for node in ast.walk(method):
        for left, right, from_right in _products(node):
            found = _tensor(right, names)
            if found is None or _tensor(left, names) is not None:
                continue
            name, flipped, indexed = found
            if _ROWS.search(name) and flipped == from_right:
                continue
            yield name, Applied(transposed=from_right != flipped, indexed=indexed)


def _products(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr, bool]]:
    """(input, map, whether the map is multiplied from the right as it is stored) of a product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield node.left, node.right, True
    if not isinstance(node, ast.Call):
        return
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    arguments = node.args
    if name == "linear" and len(arguments) >= 2:
        yield arguments[0], arguments[1], False
    elif name in {"matmul", "mm", "dot"} and len(arguments) == 2:
        yield arguments[0], arguments[1], True
    elif name in {"matmul", "mm"} and len(arguments) == 1 and isinstance(function, ast.Attribute):
        yield function.value, arguments[0], True
    elif name == "addmm" and len(arguments) == 3:
        yield arguments[1], arguments[2], True
    elif name == "einsum" and len(arguments) == 3 and isinstance(arguments[0], ast.Constant):
        equation = _EQUATION.match(str(arguments[0].value).replace(" ", ""))
        if equation is None:
            return
        inputs, weight, outputs = equation.groups()
        contracted = [letter not in outputs and letter in inputs for letter in weight]
        made = [letter in outputs and letter not in inputs for letter in weight]
        if contracted[0] and made[1]:
            yield arguments[1], arguments[2], True
        if contracted[1] and made[0]:
            yield arguments[1], arguments[2], False


def _local_names(method: ast.AST) -> dict[str, tuple[str, bool, bool]]:
    """Local names that stand for a tensor of ``self`` throughout a method."""
    values: dict[str, list[tuple[str, bool, bool] | None]] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(_tensor(node.value, {}))
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and isinstance(node.target, ast.Name):
            values.setdefault(node.target.id, []).append(None)
        elif isinstance(node, ast.For):
            for name, value in _looped(node.target, node.iter):
                values.setdefault(name, []).append(value)
    return {name: found[0] for name, found in values.items() if len(found) == 1 and found[0] is not None}


def _looped(target: ast.expr, iterated: ast.expr) -> Iterator[tuple[str, tuple[str, bool, bool] | None]]:
    """What the names of a loop stand for: ``w in self.ws``, ``i, w in enumerate(self.ws)``, ``w, b in zip(...)``."""
    if isinstance(iterated, ast.Call) and isinstance(target, ast.Tuple):
        called = getattr(iterated.func, "id", "")
        if called == "enumerate" and len(target.elts) == 2 and iterated.args:
            yield from _looped(target.elts[1], iterated.args[0])
        elif called == "zip" and len(target.elts) == len(iterated.args):
            for element, source in zip(target.elts, iterated.args, strict=True):
                yield from _looped(element, source)
    elif isinstance(target, ast.Name):
        found = _tensor(iterated, {})
        yield target.id, (found[0], found[1], True) if found is not None and not found[2] else None


def _tensor(node: ast.expr, names: Mapping[str, tuple[str, bool, bool]]) -> tuple[str, bool, bool] | None:
    """(attribute of self, whether it is transposed, whether an element of it is taken), or None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        found = _tensor(node.func.value, names)
        if found is None or node.func.attr in _CASTS:
            return found
        return (found[0], not found[1], found[2]) if node.func.attr in _FLIPS else None
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr, False, False
        found = _tensor(node.value, names)
        return (found[0], not found[1], found[2]) if found is not None and node.attr in {"T", "mT"} else None
    if isinstance(node, ast.Subscript) and not isinstance(node.slice, (ast.Slice, ast.Tuple)):
        found = _tensor(node.value, names)
        return (found[0], found[1], True) if found is not None and not found[2] else None
    return None
