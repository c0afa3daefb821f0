"""Where a command's document goes: a file, standard output, or both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from groupsearch.cli.console import say
from groupsearch.errors import GroupSearchError
from groupsearch.records import check_destination, default_path, document_text, write_document


@dataclass(frozen=True)
class Output:
    """What was asked of -o, --force and --json.

    Attributes:
        path: the file to write, or None where only standard output was asked for.
        force: whether a file that exists is overwritten.
        as_json: whether the document goes to standard output.
    """

    path: Path | None
    force: bool
    as_json: bool

    @classmethod
    def plan(cls, header: Mapping[str, Any], output: str | None, force: bool, as_json: bool) -> Output:
        """Choose the file and see that it can be written, before any work is done.

        Args:
            header: the document so far; it names the file where ``output`` is not given.
            output: the file asked for. Without it ``--json`` writes no file.
            force: overwrite.
            as_json: write to standard output.

        Raises:
            GroupSearchError: when the file exists or its folder cannot be written.
        """
        if output is None and as_json:
            return cls(None, force, as_json)
        path = Path(output) if output is not None else default_path(header)
        if output is None:
            make_folder(path.parent)
        return cls(writable(path, force=force), force, as_json)

    def save(self, document: Mapping[str, Any], *, again: bool = False) -> None:
        """Write the document wherever it was asked for; ``again`` replaces what an earlier save wrote."""
        if self.path is not None:
            write_document(self.path, document, force=self.force or again)
            say(f"Wrote {self.path}")
        if self.as_json:
            click.echo(document_text(document))


def writable(path: str | Path, *, force: bool) -> Path:
    """The path, if a file can be written there.

    Raises:
        GroupSearchError: when it exists (without ``force``), or its folder is missing or not writable.
    """
    path = check_destination(path, force=force)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise GroupSearchError(
            f"Expected to write {path}, found that its folder may not be written. Nothing was done. "
            f"Make {path.parent} writable, or name another file with -o."
        )
    return path


def make_folder(folder: Path) -> None:
    """Make a folder that nobody named, unless it is there.

    Raises:
        GroupSearchError: when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GroupSearchError(
            f"Expected to write into the folder {folder}, found that it cannot be made: {error.strerror}. "
            f"Name a file elsewhere with -o."
        ) from error
