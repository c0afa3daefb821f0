"""Between JSON and frozen dataclasses, by their type hints; and the JSON Schema that the hints make.

``object`` stands for any JSON. A field whose default is None may be missing, and is left out where it is None. What a
field cannot tell (a key that is not known, a null that was written, a part of an older form) is kept in ``extra``
and written again, so that nothing is lost between reading and writing.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.records import plain

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}
_NONE = type(None)
_HINTS: dict[type, dict[str, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a document.

    Attributes:
        extra: what was read besides, by key; it is written again.
    """

    extra: Mapping[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, data: object, where: str = "document") -> Self:
        """The part that a plain structure tells.

        Args:
            data: of strings, numbers, lists and mappings.
            where: what it is called in a refusal.

        Raises:
            DocumentError: naming what is missing, or of another type than expected.
        """
        if not isinstance(data, Mapping):
            raise _refused(where, "a mapping", data)
        hints, known, extra = _hints(cls), {}, {}
        named = {each.name: each for each in _fields(cls)}
        for key, value in data.items():
            if key in named:
                known[key] = _read(hints[key], value, f"{where}.{key}")
                if (value is None and named[key].default is None) or _is_lossy(hints[key], known[key], value):
                    extra[key] = value
            else:
                extra[key] = value
        missing = [name for name, each in named.items() if name not in known and _is_required(each)]
        if missing:
            raise DocumentError(
                f"Expected {where} to say its {', '.join(missing)}, found none. Write the document again with the "
                f"command that made it."
            )
        values: dict[str, Any] = {**known, "extra": extra}
        return cls(**values)

    def to_json(self) -> dict[str, object]:
        """A plain structure; :meth:`from_json` is its inverse."""
        values = {each.name: getattr(self, each.name) for each in _fields(type(self))}
        absent = {each.name for each in _fields(type(self)) if each.default is None and values[each.name] is None}
        return {name: _written(value) for name, value in values.items() if name not in absent} | dict(self.extra)


def schema(part: type[Part], **constants: object) -> dict[str, object]:
    """The JSON Schema (2020-12) of a part that has these constants, too."""
    found: dict[str, Any] = {}
    body = _object_schema(part, found)
    fixed = {name: {"const": value} for name, value in constants.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": part.__name__,
        "description": (part.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {**fixed, **body["properties"]},
        "required": [*constants, *body["required"]],
        "$defs": dict(sorted(found.items())),
    }


def _object_schema(part: type[Part], found: dict[str, Any]) -> dict[str, Any]:
    hints = _hints(part)
    return {
        "type": "object",
        "properties": {each.name: _schema(hints[each.name], found) for each in _fields(part)},
        "required": [each.name for each in _fields(part) if _is_required(each)],
    }


def _schema(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    if hint is object:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if hint is _NONE:
        return {"type": "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return {"anyOf": [_schema(each, found) for each in get_args(hint)]}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0], found)}
    if get_origin(hint) is Mapping:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1], found)}
    if hasattr(hint, "_fields"):
        each = [_schema(get_type_hints(hint)[name], found) for name in hint._fields]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    if not issubclass(hint, Part):
        return {"type": "object", "description": (hint.__doc__ or "").partition("\n")[0]}
    if hint.__name__ not in found:
        found[hint.__name__] = {}
        found[hint.__name__] = _object_schema(hint, found)
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _read(hint: Any, value: Any, where: str) -> Any:
    if hint is object:
        return value
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and _NONE in get_args(hint):
            return None
        (hint,) = (each for each in get_args(hint) if each is not _NONE)
        return _read(hint, value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_read(get_args(hint)[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if get_origin(hint) is Mapping and isinstance(value, dict):
        return {key: _read(get_args(hint)[1], each, f"{where}.{key}") for key, each in value.items()}
    if hasattr(hint, "_fields") and isinstance(value, list) and len(value) == len(hint._fields):
        named = zip(hint._fields, value, strict=True)
        return hint(*(_read(get_type_hints(hint)[name], each, f"{where}.{name}") for name, each in named))
    if isinstance(hint, type) and issubclass(hint, Part):
        return hint.from_json(value, where)
    if hasattr(hint, "from_json") and isinstance(value, dict):
        return _read_foreign(hint, value, where)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise _refused(where, _word(hint), value)


def _read_foreign(kind: Any, value: dict[str, Any], where: str) -> Any:
    """A value that reads itself: a trace, a privacy statement."""
    try:
        return kind.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError, GroupSearchError) as error:
        raise DocumentError(
            f"Expected {where} to be a {kind.__name__}, found one that lacks or garbles {error}. Write the document "
            f"again with the command that made it."
        ) from error


def _is_lossy(hint: Any, found: Any, value: Any) -> bool:
    """Whether a value that reads itself writes something else than what was read."""
    if found is None or isinstance(found, (Part, str, int, float, tuple, Mapping)):
        return False
    return bool(_written(found) != value)


def _written(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if isinstance(value, Mapping):
        return {key: _written(each) for key, each in value.items()}
    return [_written(each) for each in value] if isinstance(value, (tuple, list)) else value


def _fields(part: type[Part]) -> Iterator[Field[Any]]:
    return (each for each in fields(part) if each.name != "extra")


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _hints(part: type[Part]) -> dict[str, Any]:
    if part not in _HINTS:
        _HINTS[part] = get_type_hints(part)
    return _HINTS[part]


def _word(hint: Any) -> str:
    if get_origin(hint) is tuple or hasattr(hint, "_fields"):
        return "a list"
    return _SCALARS.get(hint, "a mapping")


def _refused(where: str, expected: str, value: object) -> DocumentError:
    found = "null" if value is None else f"{type(value).__name__} {value!r:.60}"
    return DocumentError(
        f"Expected {where} to be {expected if expected[:2] == 'a ' else f'of type {expected}'}, found {found}. Write "
        f"the document again with the command that made it."
    )
