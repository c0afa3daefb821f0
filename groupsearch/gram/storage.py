"""Grams in a file: NumPy's own format, with the sites as JSON text."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.gram.matrices import Grams
from groupsearch.records import check_destination
from groupsearch.trace import Site

VERSION = 1


def write_grams(path: str | Path, grams: Grams, *, force: bool = False) -> Path:
    """Write Grams whole or not at all, readable by the user alone, and return the path.

    Raises:
        GroupSearchError: when ``path`` exists and ``force`` is not given, or cannot be written.
    """
    path = check_destination(path, force=force)
    said = {
        "version": VERSION,
        "sites": [site.to_json() for site in grams.sites],
        "parameter_sizes": dict(grams.parameter_sizes),
        "steps": list(grams.steps),
        "pairs": [list(pair) for pair in grams.pairs],
    }
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, said=np.array(json.dumps(said)), grams=grams.grams, crosses=grams.crosses)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise GroupSearchError(f"Could not write {path}: {error}. Name a file in a folder with room.") from error
    return path


def read_grams(path: str | Path) -> Grams:
    """The Grams that :func:`write_grams` wrote.

    Raises:
        DocumentError: when the file is missing or does not hold Grams of this version.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            said, grams, crosses = json.loads(str(stored["said"])), stored["grams"], stored["crosses"]
        if said["version"] != VERSION:
            raise DocumentError(
                f"Expected Grams of version {VERSION} in {path}, found version {said['version']}. Take them again."
            )
        sites = tuple(map(Site.from_json, said["sites"]))
        pairs = tuple((early, late) for early, late in said["pairs"])
        return Grams(sites, said["parameter_sizes"], tuple(said["steps"]), grams, pairs, crosses)
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DocumentError(
            f"Expected a file of Grams, found {path}, which is none: {error}. Take them again."
        ) from error
