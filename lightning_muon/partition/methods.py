"""The methods of a class that an instance can reach, and their source; nothing is run."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
from collections.abc import Iterator
from types import CodeType, FunctionType


def live_methods(owner: type) -> Iterator[tuple[type, frozenset[str]]]:
    """Yield the classes whose code is read, each with the names of its methods that ``owner`` can reach.

    A method that a class earlier in the MRO overrides is dead, unless a live method calls it by ``super()`` or by its
    class.
    """
    defined: set[str] = set()
    by_super: set[str] = set()
    by_class: set[tuple[type, str]] = set()
    for base in owner.__mro__:
        own = vars(base).keys()
        live = frozenset(n for n in own if n not in defined or n in by_super or (base, n) in by_class)
        defined |= own
        by_super -= own  # super() ends at the first class that has the method
        for called, name in {call for method in live for call in _calls_of_bases(vars(base)[method])}:
            if called == "super":
                by_super.add(name)
            for named in (one for one in owner.__mro__ if one.__name__ == called):
                by_class.add((next((one for one in named.__mro__ if name in vars(one)), named), name))
        if base.__module__.partition(".")[0] not in {"torch", "builtins", "lightning", "pytorch_lightning"}:
            yield base, live


def parsed_methods(base: type, names: frozenset[str]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the methods of a class with these names, except ``__init__``, if their files can be read."""
    found = []
    for method in functions_of(base, names):
        code = inspect.unwrap(method).__code__
        node = _functions_in(code.co_filename).get(code.co_firstlineno)
        if node is not None and node.name == code.co_name:
            found.append(node)
    return found


def functions_of(base: type, names: frozenset[str]) -> list[FunctionType]:
    methods = [method for name, method in vars(base).items() if name in names]
    return [method for method in methods if inspect.isfunction(method) and method.__name__ != "__init__"]


def _calls_of_bases(method: object) -> frozenset[tuple[str, str]]:
    """``("super", name)`` for ``super().name`` in a method, and ``("Base", name)`` for ``Base.name``."""
    return _calls_in(inspect.unwrap(method).__code__) if inspect.isfunction(method) else frozenset()


@functools.lru_cache(maxsize=16384)
def _calls_in(function: CodeType) -> frozenset[tuple[str, str]]:
    """Cached per function: every layer has the methods of ``nn.Module``, more than a hundred."""
    calls: set[tuple[str, str]] = set()
    codes = [function]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        loaded = ""
        for line in dis.get_instructions(code):
            if line.opname in {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"}:
                loaded = loaded if loaded == "super" else str(line.argval)  # also in super(Owner, self)
            elif line.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_")):
                if loaded:
                    calls.add((loaded, str(line.argval)))
                loaded = str(line.argval)  # module.Base.name
            elif line.opname.startswith("LOAD_FAST") and loaded != "super":
                loaded = ""
    return frozenset(calls)


@functools.lru_cache(maxsize=256)
def _functions_in(filename: str) -> dict[int, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a file, or of a cell of a notebook, by their first lines."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return {}
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {min([node.lineno, *(mark.lineno for mark in node.decorator_list)]): node for node in functions}
