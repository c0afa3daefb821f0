"""Between JSON and frozen dataclasses, by their type hints; and the JSON Schema that the hints make.

``object`` stands for any JSON. A field whose default is None may be missing, and is left out where it is None. What a
field cannot tell (a key that is not known, a null that was written, a part of an older form) is kept in ``extra``
and written again, so that nothing is lost between reading and writing.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import NamedTuple, Protocol, Self, TypeGuard, Union, get_args, get_origin, get_type_hints

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.records import plain

_SCALARS: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_NONE = type(None)
_HINTS: dict[type, dict[str, object]] = {}


class Foreign(Protocol):
    """A value that reads and writes itself: a trace, a privacy statement."""

    @classmethod
    def from_json(cls, data: dict[str, object], /) -> Self:
        """The value that a plain structure tells."""

    def to_json(self) -> object:
        """A plain structure."""


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
        hints = _hints(cls)
        known: dict[str, object] = {}
        extra: dict[str, object] = {}
        named = {each.name: each for each in _fields(cls)}
        for key, value in data.items():
            if key in named:
                known[key] = _read(hints[key], value, f"{where}.{key}")
                if (value is None and named[key].default is None) or _is_lossy(known[key], value):
                    extra[key] = value
            else:
                extra[key] = value
        missing = [name for name, each in named.items() if name not in known and _is_required(each)]
        if missing:
            raise DocumentError(
                f"Expected {where} to say its {', '.join(missing)}, found none. Write the document again with the "
                f"command that made it."
            )
        return cls(**known, extra=extra)

    def to_json(self) -> dict[str, object]:
        """A plain structure; :meth:`from_json` is its inverse."""
        values = {each.name: getattr(self, each.name) for each in _fields(type(self))}
        absent = {each.name for each in _fields(type(self)) if each.default is None and values[each.name] is None}
        return {name: _written(value) for name, value in values.items() if name not in absent} | dict(self.extra)


def schema(part: type[Part], **constants: object) -> dict[str, object]:
    """The JSON Schema (2020-12) of a part that has these constants, too."""
    found: dict[str, object] = {}
    properties, required = _object_schema(part, found)
    fixed = {name: {"const": value} for name, value in constants.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": part.__name__,
        "description": (part.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {**fixed, **properties},
        "required": [*constants, *required],
        "$defs": dict(sorted(found.items())),
    }


def _object_schema(part: type[Part], found: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """The schema of every field, and the names of those that may not be missing."""
    hints = _hints(part)
    properties: dict[str, object] = {each.name: _schema(hints[each.name], found) for each in _fields(part)}
    return properties, [each.name for each in _fields(part) if _is_required(each)]


def _schema(hint: object, found: dict[str, object]) -> dict[str, object]:
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
    if _is_named_tuple(hint):
        each = [_schema(one, found) for one in _hints_of_names(hint)]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    assert isinstance(hint, type)
    if not issubclass(hint, Part):
        return {"type": "object", "description": (hint.__doc__ or "").partition("\n")[0]}
    if hint.__name__ not in found:
        found[hint.__name__] = {}
        properties, required = _object_schema(hint, found)
        found[hint.__name__] = {"type": "object", "properties": properties, "required": required}
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _read(hint: object, value: object, where: str) -> object:
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
    if _is_named_tuple(hint) and isinstance(value, list) and len(value) == len(hint._fields):
        named = zip(hint._fields, _hints_of_names(hint), value, strict=True)
        return hint._make(_read(one, each, f"{where}.{name}") for name, one, each in named)
    if isinstance(hint, type) and issubclass(hint, Part):
        return hint.from_json(value, where)
    if _is_foreign(hint) and isinstance(value, dict):
        return _read_foreign(hint, value, where)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise _refused(where, _word(hint), value)


def _read_foreign(kind: type[Foreign], value: dict[str, object], where: str) -> Foreign:
    """A value that reads itself: a trace, a privacy statement."""
    try:
        return kind.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError, GroupSearchError) as error:
        raise DocumentError(
            f"Expected {where} to be a {kind.__name__}, found one that lacks or garbles {error}. Write the document "
            f"again with the command that made it."
        ) from error


def _is_lossy(found: object, value: object) -> bool:
    """Whether a value that reads itself writes something else than what was read."""
    if found is None or isinstance(found, (Part, str, int, float, tuple, Mapping)):
        return False
    return bool(_written(found) != value)


def _written(value: object) -> object:
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if isinstance(value, Mapping):
        return {key: _written(each) for key, each in value.items()}
    return [_written(each) for each in value] if isinstance(value, (tuple, list)) else value


def _fields(part: type[Part]) -> Iterator[Field[object]]:
    return (each for each in fields(part) if each.name != "extra")


def _is_required(each: Field[object]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _hints(part: type[Part]) -> dict[str, object]:
    if part not in _HINTS:
        _HINTS[part] = get_type_hints(part)
    return _HINTS[part]


def _is_named_tuple(hint: object) -> TypeGuard[type[NamedTuple]]:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _hints_of_names(hint: type[NamedTuple]) -> list[object]:
    known = get_type_hints(hint)
    return [known[name] for name in hint._fields]


def _is_foreign(hint: object) -> TypeGuard[type[Foreign]]:
    return hasattr(hint, "from_json")


def _word(hint: object) -> str:
    if get_origin(hint) is tuple or _is_named_tuple(hint):
        return "a list"
    return _SCALARS.get(hint, "a mapping")


def _refused(where: str, expected: str, value: object) -> DocumentError:
    found = "null" if value is None else f"{type(value).__name__} {value!r:.60}"
    return DocumentError(
        f"Expected {where} to be {expected if expected[:2] == 'a ' else f'of type {expected}'}, found {found}. Write "
        f"the document again with the command that made it."
    )
