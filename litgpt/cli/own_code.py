"""Modules that the user's own settings name: installed ones, and those in the working directory."""

import importlib
import os
import sys
from types import ModuleType


def import_named(module: str) -> ModuleType:
    """Import a module, from the working directory too.

    The directory comes last and only now, not first and for everything: it may be a stranger's checkpoint.

    Raises:
        ImportError: There is no such module, or something that it imports is not there.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    return importlib.import_module(module)


def find_named(module: str) -> ModuleType | None:
    """The same; None where there is no module of that name."""
    try:
        return import_named(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise
