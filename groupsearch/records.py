"""The JSON documents that one stage writes and the next one reads.

Every document carries ``schema_version``, ``kind``, ``model``, ``environment`` and ``settings``;
what else it carries depends on its kind. No torch here: a document is read on any machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.units import slug

SCHEMA_VERSION = 1
KINDS = ("profile", "search", "verify", "train", "study")
COMMANDS = {"profile": "profile", "search": "optimize", "verify": "verify", "train": "train", "study": "study clip21"}
PACKAGES = ("groupsearch", "torch", "numpy", "optuna", "plotly", "transformers", "dp-accounting", "scikit-learn")
_HEADER = ("model", "environment", "settings")
_NAMED_SETTINGS = {
    "checkpoint": ("checkpoint", "none"),
    "micro_batches": ("micro-batches", "1"),
    "autocast": ("autocast", "none"),
    "norm_method": ("norms", "mixed"),
}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where a document's numbers come from: interpreter, platform, cores, package versions and ``device``.

    Versions are read from the installed packages' metadata, so nothing heavy is imported;
    a package that is not installed is left out.
    """
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "python": platform.python_version(),
        "torch": packages.get("torch"),
        "platform": f"{platform.system()} {platform.machine()}",
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "packages": packages,
    }


def new_document(
    kind: str, model: Mapping[str, Any], environment: Mapping[str, Any], settings: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    """A document of this kind: the header that all kinds share, and the ``parts`` of this one.

    Raises:
        GroupSearchError: for a kind that is not one of :data:`KINDS`, or a part
            named ``schema_version``, which belongs to the header.
    """
    if kind not in KINDS:
        raise GroupSearchError(f"Expected kind to be one of {', '.join(KINDS)}, found {kind!r}.")
    if "schema_version" in parts:
        raise GroupSearchError("Found a part named 'schema_version', which the header holds; name the part otherwise.")
    header = {"model": dict(model), "environment": dict(environment), "settings": dict(settings)}
    return {"schema_version": SCHEMA_VERSION, "kind": kind, **header, **parts}


def default_path(document: Mapping[str, Any]) -> Path:
    """Where a document goes when nobody says: ``profiles/<model>-b<batch>-<device>.json``.

    Other kinds go to ``reports/`` with the kind at the end. What is not as usual about the step is part of
    the name: checkpointing, several micro-batches, autocast, a norm method; and so is that a profile also
    tells what fits. Only letters, digits, dots, underscores and dashes are used.

    >>> str(default_path({"kind": "profile", "model": {"name": "hf:gpt2", "batch_size": 4},
    ...                   "environment": {"device": "cpu"}, "settings": {}}))
    'profiles/hf-gpt2-b4-cpu.json'
    """
    model, settings = document["model"], document["settings"]
    parts = [str(model["name"]), f"b{model['batch_size']}", str(document["environment"].get("device", "cpu"))]
    for key, (word, usual) in _NAMED_SETTINGS.items():
        found = str(settings.get(key) or usual)
        parts += [] if found == usual else [word, found]
    parts += ["fit"] if "fit" in document else []
    parts += [] if document["kind"] == "profile" else [document["kind"]]
    stem = slug("-".join(parts))
    return Path("profiles" if document["kind"] == "profile" else "reports") / f"{stem[-200:]}.json"


def write_document(path: str | Path, document: Mapping[str, Any], *, force: bool = False) -> Path:
    """Write a document whole or not at all, and return its path.

    Keys are sorted and separators fixed, so equal documents are equal files; a float that is not
    finite (a diverged loss) becomes null. The text goes to a temporary file beside ``path``,
    is forced to disk, then renamed; the temporary file never outlives the call.

    Raises:
        GroupSearchError: when ``path`` exists and ``force`` is not given, when its folder is
            missing or cannot be written, or when a value has no JSON form.
    """
    return write_text(path, document_text(document) + "\n", force=force)


def write_text(path: str | Path, text: str, *, force: bool = False) -> Path:
    """Write a text whole or not at all, by the rules of :func:`write_document`, and return its path."""
    path = check_destination(path, force=force)
    _replace(path, text)
    return path


def check_destination(path: str | Path, *, force: bool = False) -> Path:
    """The path, if a file may be written there: to be asked before the work, not after it.

    Raises:
        GroupSearchError: when ``path`` is a folder or exists and ``force`` is not given, or when its
            folder is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise GroupSearchError(f"Expected a file to write to, found the folder {path}. Name a file in it.")
    if path.exists() and not force:
        raise GroupSearchError(
            f"{path} exists already and is not overwritten. Name another file, or overwrite it with --force."
        )
    if not path.parent.is_dir():
        raise GroupSearchError(
            f"Expected the folder {path.parent} to write {path.name} into, found none. "
            f"Create it with `mkdir -p {path.parent}`, or name another file."
        )
    return path


def document_text(document: Mapping[str, Any]) -> str:
    """The JSON text of a document, as :func:`write_document` writes it.

    Raises:
        GroupSearchError: when a value has no JSON form.
    """
    try:
        return _laid_out(plain(document), "\n")
    except TypeError as error:
        raise GroupSearchError(
            f"Expected a document of lists, strings, numbers and mappings by string, found otherwise: {error}. "
            f"Convert the value before it goes into the document."
        ) from error


def read_document(path: str | Path, kind: str | tuple[str, ...] | None = None) -> dict[str, Any]:
    """The document in a file, with every key it has, known here or not.

    Args:
        path: the file.
        kind: the kind, or kinds, that the caller can use; None for any.

    Raises:
        DocumentError: when the file is missing, unreadable, cut short, not JSON, not a document of
            groupsearch, of another schema, or of another kind than asked for.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else f"no UTF-8 text at byte {error.start}"
        raise DocumentError(
            f"Expected a groupsearch document at {path}, found: {found}. "
            f"Check the path, or write a document with `groupsearch profile MODEL`."
        ) from error
    document: dict[str, Any] = _parse(path, text)
    check_header(path, document)
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and document["kind"] not in wanted:
        commands = " or ".join(f"`groupsearch {COMMANDS.get(name, name)}`" for name in wanted)
        raise DocumentError(
            f"Expected a document of kind {' or '.join(wanted)}, found one of kind {document['kind']} in {path}. "
            f"Name one written by {commands}."
        )
    return document


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """The value in JSON's own types; NumPy's scalars and arrays are unwrapped."""
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:  # json.dumps would turn 1 into "1" without a word
            raise TypeError(f"key {odd[0]!r} of type {type(odd[0]).__name__}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def _laid_out(value: Any, line: str) -> str:
    """JSON with a line for each item; what holds no lists or mappings of its own is one line."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(part, (dict, list)) and part for part in parts):
        return json.dumps(value, sort_keys=True, allow_nan=False)
    inner = line + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_laid_out(value[key], inner)}" for key in sorted(value)]
        return "{" + inner + ("," + inner).join(items) + line + "}"
    return "[" + inner + ("," + inner).join(_laid_out(part, inner) for part in value) + line + "]"


def _replace(path: Path, text: str) -> None:
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode would hide the document from other users
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise GroupSearchError(
            f"Expected to write {path}, found: {error.strerror or error}. Nothing was written. "
            f"Make the folder {path.parent} writable (and see that its disk has room), or name another file."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _parse(path: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        cut = error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())
        found = f"a file cut short at {place} (after {len(text)} characters)" if cut else f"no JSON at {place}"
        remedy = "Copy it again, or write it again" if cut else "Name a file written by groupsearch, or write one"
        raise DocumentError(
            f"Expected a groupsearch document in {path}, found {found}: {error.msg}. "
            f"{remedy} with the command that makes it (`groupsearch profile`, `groupsearch optimize`)."
        ) from error
    except RecursionError as error:
        raise DocumentError(
            f"Expected a groupsearch document in {path}, found JSON nested too deep to be one. Name another file."
        ) from error


def check_header(path: str | Path, document: Any) -> None:
    """Raise unless a plain structure begins as a document of this schema does.

    Raises:
        DocumentError: saying what it is instead; ``path`` is what it is called.
    """
    if not isinstance(document, dict) or "schema_version" not in document or "kind" not in document:
        raise DocumentError(
            f"Expected a groupsearch document in {path} (JSON with schema_version and kind), found other JSON. "
            f"Name a file written by `groupsearch profile` or `groupsearch optimize`."
        )
    version, kind = document["schema_version"], document["kind"]
    if type(version) is not int or kind not in KINDS:
        raise DocumentError(
            f"Expected schema_version to be a whole number and kind one of {', '.join(KINDS)} in {path}, found "
            f"{version!r} and {kind!r}. Name a file written by groupsearch, or upgrade groupsearch."
        )
    if version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        remedy = "Upgrade groupsearch" if newer else f"Write it again with `groupsearch {COMMANDS[kind]}`"
        raise DocumentError(
            f"{path} has schema {version}, which is {'newer' if newer else 'older'} than schema {SCHEMA_VERSION}, "
            f"the one that this groupsearch reads. {remedy}."
        )
    garbled = [key for key in _HEADER if not isinstance(document.get(key), dict)]
    if garbled:
        raise DocumentError(
            f"Expected {path} to say its {', '.join(_HEADER)}, found no usable {', '.join(garbled)}. "
            f"Write it again with `groupsearch {COMMANDS[kind]}`."
        )
