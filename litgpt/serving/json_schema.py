"""Whether a JSON schema allows any value at all (https://json-schema.org/draft/2020-12/json-schema-core)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALARS = {"string", "number", "integer", "boolean", "null"}
KINDS = SCALARS | {"object", "array"}


def allows_something(schema: Any) -> bool:
    """False where no value that ends keeps to the schema: it refers to itself without a way out, as `{"$ref": "#"}`
    does, or an object that must hold another of its own kind.

    What contradicts itself otherwise (`minimum` above `maximum`) is left to whoever compiles it.

    Args:
        schema: The schema; references to other documents count as what allows something.
    """
    known: set[int] = set()
    while True:
        search = _Search(schema, known)
        if search.allows(schema):
            return True
        if search.found <= known:
            return False
        known |= search.found


class _Search:
    """One walk through a schema: what refers to what is just being looked at allows nothing, unless an earlier walk has
    found that it does.

    Args:
        root: The whole schema.
        known: The identities of subschemas that allow something.
    """

    def __init__(self, root: Any, known: set[int]) -> None:
        self.root, self.known = root, known
        self.found: set[int] = set()
        self._seen: dict[int, bool] = {}

    def allows(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return schema is not False
        if id(schema) in self.known:
            return True
        if id(schema) in self._seen:
            return self._seen[id(schema)]
        self._seen[id(schema)] = False
        self._seen[id(schema)] = answer = self._allows(schema)
        if answer:
            self.found.add(id(schema))
        return answer

    def _allows(self, schema: Mapping[str, Any]) -> bool:
        if "$ref" in schema and not self.allows(self._target(schema["$ref"])):
            return False
        if not all(self.allows(part) for part in _list(schema, "allOf")):
            return False
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list) and not any(self.allows(part) for part in _list(schema, name)):
                return False
        if "const" in schema or "enum" in schema:
            return bool(schema.get("enum", True))
        kinds = schema.get("type", list(KINDS))
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return (
            any(kind in SCALARS or kind not in KINDS for kind in map(str, kinds))  # others are named by who compiles it
            or ("object" in kinds and self._allows_object(schema))
            or ("array" in kinds and self._allows_array(schema))
        )

    def _allows_object(self, schema: Mapping[str, Any]) -> bool:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        others = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        return all(self.allows(properties.get(name, others)) for name in required)

    def _allows_array(self, schema: Mapping[str, Any]) -> bool:
        minimum = schema.get("minItems", 0)
        minimum = minimum if isinstance(minimum, (int, float)) else 0
        needed = [part for place, part in enumerate(_list(schema, "prefixItems")) if place < minimum]
        rest = schema.get("items", True)
        return all(map(self.allows, needed)) and (len(needed) >= minimum or self.allows(rest))

    def _target(self, reference: Any) -> Any:
        """What a reference within the document points at (RFC 6901)."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        target = self.root
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                return True
        return target


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
