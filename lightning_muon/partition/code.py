"""Which tensors the code of a class applies as linear maps, and from which side.

The source of the class is read; nothing is run. Only plain uses count: ``F.linear(x, w)``,
``x @ w``, ``torch.matmul(x, w)`` (or ``mm``, ``addmm``) and ``einsum`` of two operands, where ``w`` is
``self.name``, ``self.name[i]``, an element of a loop over ``self.name``, a local name for one of these, or its
transpose.
"""

from __future__ import annotations

import ast
import dis
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import NamedTuple, TypeGuard

from torch import nn

from lightning_muon.partition.methods import functions_of, live_methods, parsed_methods

_CASTS = {"to", "type_as", "type", "float", "half", "double", "bfloat16", "contiguous"}
_FLIPS = {"t", "T", "mT", "transpose"}
_ACTIVATIONS = {"silu", "swish", "relu", "gelu", "elu", "sigmoid", "tanh", "softplus", "act", "act_fn", "activation"}
_NORM = re.compile(r"(^|_)(ln|(layer|rms)?_?norm|drop(out)?)(_|$)", re.IGNORECASE)
_EQUATION = re.compile(r"^([A-Za-z.]+),([A-Za-z]+)->([A-Za-z.]+)$")
# Inputs are compared with the rows of such tensors: x @ self.keys.T is not a layer.
_ROWS = re.compile(
    r"(^|_)(keys?|quer(y|ies)|mem|memory|memories|prototypes?|cent(er|roid)s?|anchors?|slots?|tokens?|latents?|atoms?)(_|$)",
    re.IGNORECASE,
)


ONLY_MAP = ""
"""Key for the only map of a class, if the code does not show its name."""


class Applied(NamedTuple):
    """How code applies a tensor.

    Args:
        transposed: whether the tensor is (fan-in, fan-out): multiplied from the right as it is.
        indexed: whether the code applies elements of it, one at a time: a stack or a list of maps.
    """

    transposed: bool
    indexed: bool


class Fused(NamedTuple):
    """How code splits a layer's output.

    Args:
        parts: number of parts.
        dim: the dimension that is split; None if it is not a constant.
        sizes: the code for the size of each part, e.g. ``"self.rank"``; empty if the sizes are equal.
    """

    parts: int
    dim: int | None
    sizes: tuple[str, ...] = ()


def applied_maps(owner: type[nn.Module]) -> Mapping[str, Applied]:
    """Return the attributes that a class's methods apply as linear maps, always in the same way."""
    uses: dict[str, set[Applied]] = {}
    for base, methods in live_methods(owner):
        for name, applied in _uses_in(base, methods):
            uses.setdefault(name, set()).add(applied)
    return {name: next(iter(found)) for name, found in uses.items() if len(found) == 1}


def fused_maps(owner: type[nn.Module]) -> Mapping[str, Fused]:
    """Return the layers of a class whose output its methods split into parts: several maps fused in one.

    Found are ``self.name(x).chunk(3, dim=-1)`` or ``torch.chunk``, ``split`` into named parts, and ``F.glu``, which has
    two parts. The input may be a local name or a sum of several layers' outputs, as for the gates of a recurrent cell.
    """
    found: dict[str, set[Fused]] = {}
    for base, methods in live_methods(owner):
        for name, fused in _cuts_in(base, methods):
            found.setdefault(name, set()).add(fused)
    return {name: next(iter(fused)) for name, fused in found.items() if len(fused) == 1}


@functools.lru_cache(maxsize=4096)
def _cuts_in(base: type, methods: frozenset[str]) -> tuple[tuple[str, Fused], ...]:
    return tuple({cut for method in parsed_methods(base, methods) for cut in _cuts_in_method(method)})


def _cuts_in_method(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, Fused]]:
    """Yield splits of the output of ``self.name(...)``, in the order of the lines, because names may be bound again."""
    arguments = [*method.args.posonlyargs, *method.args.args]
    self_name = arguments[0].arg if arguments else ""
    made: dict[str, set[str]] = {}
    for statement in sorted((n for n in ast.walk(method) if isinstance(n, ast.stmt)), key=lambda n: n.lineno):
        if isinstance(
            statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.For, ast.While, ast.If, ast.With, ast.Try)
        ):
            continue
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call) or _is_attribute_of(node.func, self_name):
                continue  # self.glu(x) is a layer, perhaps one with weights.
            if (cut := _cut(node, _targets(statement, node))) is not None:
                source, fused = cut
                names = _sources(source, self_name, made)
                if len(names) > 1 and fused.dim == 1:
                    # Perhaps gates of a recurrent cell, whose inputs have no dimension of tokens.
                    fused = fused._replace(dim=None)
                for name in sorted(names):
                    yield name, fused
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    made[target.id] = _sources(statement.value, self_name, made)


def _targets(statement: ast.stmt, call: ast.Call) -> int:
    """Return the number of names to which a statement unpacks the result of a call; 0 if it does not unpack it."""
    if isinstance(statement, ast.Assign) and statement.value is call and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Tuple) and not any(isinstance(part, ast.Starred) for part in target.elts):
            return len(target.elts)
    return 0


def _cut(call: ast.Call, targets: int) -> tuple[ast.expr, Fused] | None:
    """Return (tensor, how) of a call that splits a tensor into parts, which are bound to ``targets`` names."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    arguments = list(call.args)
    if name in {"chunk", "split"} and isinstance(function, ast.Attribute) and not _is_module_of_torch(function.value):
        arguments = [function.value, *arguments]
    if name == "glu" and arguments:
        return arguments[0], Fused(2, _constant(arguments[1] if len(arguments) > 1 else named.get("dim"), -1))
    if name not in {"chunk", "split"} or not arguments:
        return None
    how = next((named[key] for key in ("chunks", "split_size_or_sections", "split_size") if key in named), None)
    how = arguments[1] if len(arguments) > 1 else how
    dim = _constant(arguments[2] if len(arguments) > 2 else named.get("dim"), 0)
    if name == "split":
        if isinstance(how, (ast.List, ast.Tuple)):
            sizes = tuple(ast.unparse(size) for size in how.elts)
        else:
            sizes = (ast.unparse(how),) * targets if how is not None else ()
        return (arguments[0], Fused(len(sizes), dim, sizes)) if len(sizes) > 1 else None
    count = _constant(how, None)
    return (arguments[0], Fused(count, dim)) if count is not None and count > 1 else None


def _sources(node: ast.expr, self_name: str, made: Mapping[str, set[str]]) -> set[str]:
    """Return the names of the layers and maps of ``self`` whose output an expression is.

    The expression is ``self.name(...)``, ``x @ self.name`` or similar, a local name, an activation or norm of one, or a
    sum of these.
    """
    if isinstance(node, ast.Name):
        return made.get(node.id, set())
    applied = [right for _, right, _ in _products(node)]
    if applied:
        return {part.attr for part in applied if _is_attribute_of(part, self_name)}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _sources(node.left, self_name, made), _sources(node.right, self_name, made)
        return left | right if left and right else set()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return set()
    if node.args and (node.func.attr.lower() in _ACTIVATIONS or _NORM.search(node.func.attr)):
        return _sources(node.args[0], self_name, made)
    return {node.func.attr} if _is_attribute_of(node.func, self_name) else set()


def _is_attribute_of(node: ast.expr, self_name: str) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self_name


def evaluate_size(expression: str, owner: nn.Module) -> int | None:
    """Evaluate a size in a module's code: an integer computed from attributes of ``self``; None for anything else."""
    return _evaluate(ast.parse(expression, mode="eval").body, owner)


def _evaluate(node: ast.expr, owner: nn.Module) -> int | None:
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, owner), _evaluate(node.right, owner)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.FloorDiv):
            return left // right if right else None
        operation = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__}.get(type(node.op))
        return operation(left, right) if operation is not None else None
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names, node = [node.attr, *names], node.value
    value: object = owner if isinstance(node, ast.Name) and node.id == "self" and names else None
    for name in names:
        value = getattr(value, name, None)
    return value if type(value) is int else None


def _constant(node: ast.expr | None, default: int | None) -> int | None:
    """Return an integer in code; the default if the argument is left out; None for anything else."""
    if node is None:
        return default
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int) else None


def _is_module_of_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"torch", "th"}


@functools.lru_cache(maxsize=4096)
def _uses_in(base: type, names: frozenset[str]) -> tuple[tuple[str, Applied], ...]:
    methods = parsed_methods(base, names)
    if not methods:
        return _uses_in_bytecode(functions_of(base, names))
    return tuple(sorted({use for method in methods for use in _uses_in_method(method)}))


def _uses_in_bytecode(methods: Sequence[FunctionType]) -> tuple[tuple[str, Applied], ...]:
    """Return how a class without source (typed at a prompt, or piped in) applies its only map, if in one way."""
    names: set[str] = set()
    products = False
    for method in methods:
        names |= set(method.__code__.co_names)
        products |= any(
            "MATRIX_MULTIPLY" in line.opname or line.argrepr == "@" for line in dis.get_instructions(method)
        )
    products |= not names.isdisjoint({"matmul", "mm", "addmm"})
    if products == ("linear" in names):
        return ()
    return ((ONLY_MAP, Applied(transposed=products and names.isdisjoint(_FLIPS), indexed=False)),)


def _uses_in_method(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, Applied]]:
    arguments = [*method.args.posonlyargs, *method.args.args]
    if not arguments:
        return
    reader = _Reader(arguments[0].arg, method)
    for node in ast.walk(method):
        for left, right, from_right in _products(node):
            found = reader.tensor(right)
            if found is None or reader.tensor(left) is not None or _is_one_hot(left):
                continue
            if "basis" in found.name or (_ROWS.search(found.name) and found.flipped == from_right):
                continue
            yield found.name, Applied(transposed=from_right != found.flipped, indexed=found.indexed)


def _is_one_hot(node: ast.expr) -> bool:
    """Whether an input is one-hot and selects rows of the tensor, so that the tensor is a table."""
    names = (getattr(part, "attr", getattr(part, "id", "")) for part in ast.walk(node))
    return any(isinstance(name, str) and "onehot" in name.lower().replace("_", "") for name in names)


def _products(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr, bool]]:
    """Yield (input, map, whether the map is multiplied from the right as it is stored) of a product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield node.left, node.right, True
    if not isinstance(node, ast.Call):
        return
    function, arguments = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "linear" and len(arguments) >= 2:
        yield arguments[0], arguments[1], False
    elif name in {"matmul", "mm", "bmm", "dot"} and len(arguments) == 2:
        yield arguments[0], arguments[1], True
    elif name in {"matmul", "mm", "bmm"} and len(arguments) == 1 and isinstance(function, ast.Attribute):
        yield function.value, arguments[0], True
    elif name == "addmm" and len(arguments) == 3:
        yield arguments[1], arguments[2], True
    elif name == "einsum" and len(arguments) == 3 and isinstance(arguments[0], ast.Constant):
        direction = _direction(str(arguments[0].value).replace(" ", ""))
        if direction is not None:
            yield arguments[1], arguments[2], direction


def _direction(equation: str) -> bool | None:
    """Whether the second operand of an einsum is a map (..., fan-in, fan-out), from the right; None if it is no map."""
    parts = _EQUATION.match(equation)
    if parts is None:
        return None
    inputs, weight, outputs = parts.groups()
    kinds = "".join(
        {(True, False): "i", (False, True): "o", (True, True): "b"}.get((letter in inputs, letter in outputs), "?")
        for letter in weight
    )
    return {"io": True, "oi": False}.get(kinds.lstrip("b"))


class _Held(NamedTuple):
    """A tensor of ``self`` in an expression: its name, whether it is transposed, and whether it is indexed."""

    name: str
    flipped: bool = False
    indexed: bool = False


class _Reader:
    """Reads the expressions of one method, with local names that mean one tensor throughout the method."""

    def __init__(self, self_name: str, method: ast.AST) -> None:
        self._self = self_name
        self._names: dict[str, _Held] = {}
        values: dict[str, list[_Held | None]] = {}
        for node in ast.walk(method):
            for name, value in self._bound(node):
                values.setdefault(name, []).append(value)
        self._names = {name: found[0] for name, found in values.items() if len(found) == 1 and found[0] is not None}

    def tensor(self, node: ast.expr) -> _Held | None:
        """Return the tensor of ``self`` that an expression is, or whose transpose, cast or element it is; else None."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            held = self.tensor(node.func.value)
            if held is None or node.func.attr in _CASTS:
                return held
            return held._replace(flipped=not held.flipped) if node.func.attr in _FLIPS else None
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == self._self:
                return _Held(node.attr)
            held = self.tensor(node.value)
            return held._replace(flipped=not held.flipped) if held is not None and node.attr in _FLIPS else None
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, (ast.Slice, ast.Tuple)):
            held = self.tensor(node.value)
            return held._replace(indexed=True) if held is not None and not held.indexed else None
        return None

    def _bound(self, node: ast.AST) -> Iterator[tuple[str, _Held | None]]:
        """Yield the names that a statement binds."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, self.tensor(node.value)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and isinstance(node.target, ast.Name):
            yield node.target.id, None
        elif isinstance(node, (ast.For, ast.comprehension)):
            yield from self._looped(node.target, node.iter)

    def _looped(self, target: ast.expr, iterated: ast.expr) -> Iterator[tuple[str, _Held | None]]:
        """``w in self.ws``, ``i, w in enumerate(self.ws)``, ``w, b in zip(self.ws, self.bs)``."""
        if isinstance(iterated, ast.Call) and isinstance(target, ast.Tuple):
            called = getattr(iterated.func, "id", "")
            if called == "enumerate" and len(target.elts) == 2 and iterated.args:
                yield from self._looped(target.elts[1], iterated.args[0])
            elif called == "zip" and len(target.elts) == len(iterated.args):
                for element, source in zip(target.elts, iterated.args, strict=True):
                    yield from self._looped(element, source)
        elif isinstance(target, ast.Name):
            held = self.tensor(iterated)
            yield target.id, held._replace(indexed=True) if held is not None and not held.indexed else None
