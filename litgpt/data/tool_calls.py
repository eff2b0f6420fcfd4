"""Tools and calls of them in records: the many ways in which files write them, made the one that templates take.

{"type": "function", "function": {"name", "description", "parameters"}}            a tool
{"id", "type": "function", "function": {"name", "arguments": {...}}}              a call
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from litgpt.cli.untrusted import ExcessError, parse_json
from litgpt.data.wording import value_kind

CALL_KEYS = ("arguments", "parameters")  # Llama 3 says parameters


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a record; None where there are none.

    Args:
        value: A list of tools or of bare functions {name, description, parameters}, each perhaps as JSON text, or JSON
            text of the whole.

    Raises:
        ValueError: It is something else.
    """
    value = _parsed(value, "its 'tools' key")
    if not value:
        return None
    if not isinstance(value, Sequence):
        raise ValueError(f"its 'tools' are {value_kind(value)}; a list is expected.")
    return [_tool(number, _parsed(entry, f"tool {number}")) for number, entry in enumerate(value, start=1)]


def _tool(number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"tool {number} is {value_kind(entry)}; an object is expected.")
    entry = present(entry)
    if isinstance(function := entry.get("function"), Mapping):
        return {**entry, "function": present(function)}
    if "name" in entry and entry.get("type", "function") == "function":
        bare = {key: value for key, value in entry.items() if key != "type"}
        return {"type": "function", "function": bare}
    return entry  # a tool of a kind that only its template knows


def read_calls(value: Any) -> list[dict[str, Any]]:
    """The calls of a message.

    Args:
        value: A call or a list of them, or JSON text of that; a call is OpenAI's, or bare {name, arguments}. The
            arguments are an object, or its JSON text.

    Raises:
        ValueError: It is something else.
    """
    value = _parsed(value, "its call of a tool")
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence):
        raise ValueError(f"its calls of tools are {value_kind(value)}; a list is expected.")
    return [_call(_parsed(entry, "a call of a tool")) for entry in entries]


def _call(entry: Any) -> dict[str, Any]:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    function = function if isinstance(function, Mapping) else entry
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"a call of a tool is {value_kind(entry)} without a name; {{name, arguments}} is expected.")
    written = next((function[key] for key in CALL_KEYS if function.get(key) is not None), {})
    arguments = _parsed(written, f"the argument list of the call of {name!r}")
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return {"id": str(entry["id"]), **call} if entry.get("id") is not None else call


def present(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its keys that are null: null means absent."""
    return {key: value for key, value in entry.items() if value is not None}


def _parsed(value: Any, what: str) -> Any:
    """What a JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ExcessError as error:
        raise ValueError(f"{what} holds a JSON text that cannot be taken: {error}.") from None
    except ValueError:
        raise ValueError(f"{what} holds a text that is not JSON.") from None
