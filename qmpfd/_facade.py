"""Packages that show names from their modules, and load those when a name is first used.

The short verbs of the command line need a tenth of what is here, and have to start fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def homes(modules: Mapping[str, str]) -> dict[str, str]:
    """The module of each name.

    Args:
        modules: the names that each module has, with blanks between them.
    """
    return {name: module for module, names in modules.items() for name in names.split()}


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of *package* (PEP 562).

    Args:
        package: its name.
        homes: for each name that it shows, the module that has it, relative to the package.
    """

    def getattribute(name: str) -> object:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home, package), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute
