"""Float64 references of the rules, by the name of the package's class. See common.py for how to add one."""

from __future__ import annotations

import importlib
import pkgutil

from tests.optim.references.common import Reference

REFERENCES: dict[str, type[Reference]] = {}

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _name, _value in vars(_module).items():
        if isinstance(_value, type) and issubclass(_value, Reference) and _value.__module__ == _module.__name__:
            REFERENCES[_name] = _value
# What is left has a public name and is a rule, not a base of some.
REFERENCES = {name: value for name, value in REFERENCES.items() if name != "Reference" and not name.startswith("_")}
