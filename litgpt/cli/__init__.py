"""From a function's signature and docstring to a command line: normalise, parse, call.

`signature.py` reads what the function takes (`flat.py`: options that several commands have in common); `arguments.py`
and `config_files.py` read what the user gave; `settings.py` puts both on one footing (full names, later layers over
earlier ones); `resolve.py` has jsonargparse check types and fill in defaults; `run.py` ties it together and calls the
function. `classes.py` finds classes by name, `help.py` writes the help, `record.py` keeps the settings for
`hyperparameters.yaml`.
"""

from litgpt.cli.errors import UsageError
from litgpt.cli.flat import Flat, spread
from litgpt.cli.record import describe_settings, resolved_settings, save_hyperparameters
from litgpt.cli.run import run
from litgpt.cli.signature import ConfigOverrides

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
