"""From a function's signature and docstring to a command line: normalise, parse, call.

`signature.py` reads what the function takes (`flat.py`: options that several commands have in common); `words.py`
and `config_files.py` read what the user gave; `settings.py` puts both on one footing (full names, later layers over
earlier ones); `resolve.py` has jsonargparse check types and fill in defaults; `run_command.py` ties it together and
calls the function. `classes.py` finds classes by name, `help.py` writes the help, `record.py` keeps the settings for
`hyperparameters.yaml`. What the whole package uses lies here, too: `untrusted.py`, `resources.py`, `secret.py`,
`suggest.py`, `own_code.py`, `plural.py`.
"""

import importlib
from typing import Any

from litgpt.cli.usage_error import UsageError

# Name -> module that defines it. Imported on first use: what needs none of these does not wait for their libraries.
_PLACES = {
    "ConfigOverrides": "litgpt.cli.signature",
    "Flat": "litgpt.cli.flat",
    "describe_settings": "litgpt.cli.record",
    "resolved_settings": "litgpt.cli.record",
    "run": "litgpt.cli.run_command",
    "save_hyperparameters": "litgpt.cli.record",
    "spread": "litgpt.cli.flat",
}

__all__ = [
    "ConfigOverrides",
    "Flat",
    "UsageError",
    "describe_settings",
    "resolved_settings",
    "run",
    "save_hyperparameters",
    "spread",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'litgpt.cli' has no attribute {name!r}")
