"""The JSON Schemas that are shipped: ``python -m tests.documents.schemas`` writes them anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from groupsearch import documents

FOLDER = Path(documents.__file__).parent / "schemas"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def texts() -> dict[Path, str]:
    """Every file and what is to be in it."""
    return {
        FOLDER / f"{kind.__name__.lower()}.json": json.dumps(documents.json_schema(kind), indent=1) + "\n"
        for kind in documents.KINDS
    }


def violations(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Where a value is not what a schema says, as far as our schemas use the language."""
    known = {"$schema", "title", "description", "$defs", "$ref", "anyOf", "const", "type", "properties", "required"}
    assert schema.keys() <= known | {"items", "prefixItems", "minItems", "maxItems", "additionalProperties"}
    if "$ref" in schema:
        yield from violations(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, where)
    if "anyOf" in schema and all(any(violations(each, value, root)) for each in schema["anyOf"]):
        yield f"{where}: {value!r:.60} is none of {schema['anyOf']}"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r:.60} is not {schema['const']!r}"
    if "type" in schema and not (
        isinstance(value, _TYPES[schema["type"]]) and (schema["type"] == "boolean" or not isinstance(value, bool))
    ):
        yield f"{where}: {value!r:.60} is no {schema['type']}"
        return
    if isinstance(value, dict):
        yield from (f"{where}: no {name}" for name in schema.get("required", ()) if name not in value)
        for name, each in value.items():
            below = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from violations(below, each, root, f"{where}.{name}")
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for i, each in enumerate(value):
            below = first[i] if i < len(first) else schema.get("items", {})
            yield from violations(below, each, root, f"{where}[{i}]")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
