"""How the errors of library code name options on the command line.

Library code knows no command line: its errors name fields as Python does, `r=0: the rank must be at least 1`, and put
those without a value in backticks. What a user typed is `--lora_r 0`: so it reads where a command shows the error.
"""

import re
from collections.abc import Callable, Iterable

from litgpt.cli.classes import accepted
from litgpt.cli.flat import prefixed_fields
from litgpt.cli.signature import Signature
from litgpt.cli.usage_error import UsageError

# Not within a path, an address, quotes or a command line.
_FIELD = re.compile(r"(?<![\w./\\'\"`=&?-])([A-Za-z_][\w.]*)=(?=\S)|`([A-Za-z_][\w.]*)`")

# Of the command that runs now, as `litgpt.cli.record` has its settings.
_option_of: Callable[[str], str | None] = lambda field: None  # noqa: E731


def remember(function: Callable[..., object], signature: Signature, chosen: Iterable[tuple[str, str]]) -> None:
    """Keep the names of the options of the command that runs now.

    Args:
        function: The command.
        signature: Its options.
        chosen: The options that name a class, and the class that each names.
    """
    global _option_of
    options = prefixed_fields(function)
    for parameter in signature.of_kind("class"):
        for name, class_path in chosen:
            if name == parameter.name:
                try:
                    cls = parameter.choice.resolve(class_path)[1]
                except UsageError:
                    continue
                options |= {field: f"{name}.{field}" for field in accepted(cls)}

    def option_of(field: str) -> str | None:
        path = signature.locate(tuple(field.split(".")))
        parameter = signature.parameters.get(path[0])
        if parameter is None:
            return options.get(field)
        if len(path) > 1 and parameter.kind in ("group", "overrides") and path[1] not in parameter.fields:
            return None
        return ".".join(path)

    _option_of = option_of


def on_command_line(message: str) -> str:
    """An error's message with the fields that it names written as the options of the command that ran."""

    def written(found: re.Match[str]) -> str:
        option = _option_of(found[1] or found[2])
        if option is None:
            return found[0]
        return f"--{option}" if found[2] else f"--{option} "

    return _FIELD.sub(written, message)
