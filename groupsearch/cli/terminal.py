"""What a person reads and where documents go: messages, tables and progress on standard error, documents in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from groupsearch.documents import Document, Memory, Table
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Advanced, Begun, Event, Interrupted
from groupsearch.records import check_destination, default_path, document_text, write_document

_PIPE_WIDTH = 120
D = TypeVar("D", bound=Document)


def console(*, to_stdout: bool = False) -> Console:
    """A console on the stream as it is now; into a pipe it does not fold at 80 columns."""
    stream = sys.stdout if to_stdout else sys.stderr
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False)


def say(text: str) -> None:
    """One paragraph, folded by the terminal and never by us."""
    console().print(text, markup=False, soft_wrap=True)


def print_error(text: str) -> None:
    """One paragraph in red where there is colour."""
    console().print(text, markup=False, soft_wrap=True, style="red")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", to_stdout: bool = False
) -> None:
    """A table whose columns are right-aligned but for those whose heading ends in a blank."""
    table = RichTable(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        left = heading.endswith(" ")
        table.add_column(heading.strip(), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_literal, row))
    console(to_stdout=to_stdout).print(table)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal; into a pipe or a file nothing is drawn."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = console()
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bars:
        yield bars


def _literal(text: str) -> str:
    return text.replace("[", r"\[")


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


class Watch:
    """Prints events, one bar at a time, and sees where the document can go before any work is done."""

    def __init__(self, output: str | None, force: bool, as_json: bool) -> None:
        self.asked = output, force, as_json
        self._stack = ExitStack()
        self._bars: Progress | None = None
        self._bar: tuple[str, TaskID] | None = None
        self.output: Output | None = None

    def __call__(self, event: Event) -> None:
        """Print it, move the bar, or plan the output."""
        if isinstance(event, Begun):
            self.begin(event.header)
        elif isinstance(event, Advanced):
            self._advance(event)
        else:
            self.say(event)

    def begin(self, header: Mapping[str, Any]) -> None:
        """See that the document can be written."""
        self.output = Output.plan(header, *self.asked)

    def say(self, event: Event) -> None:
        """Print an event that is no bar."""
        say(str(event))

    def save(self, document: D) -> D:
        """Write the document, which says how to go on with it as it lies there, and return it."""
        assert self.output is not None  # every job begins
        followed = document.followed(self.output.path)
        self.output.save(followed.to_json())
        return followed

    def close(self) -> None:
        """Take the bar away."""
        self._stack.close()

    def _advance(self, event: Advanced) -> None:
        if self._bars is None:
            self._bars = self._stack.enter_context(progress())
        if self._bar is not None and self._bar[0] != event.stage:
            self._bars.remove_task(self._bar[1])
            self._bar = None
        if self._bar is None:
            self._bar = event.stage, self._bars.add_task(event.stage, total=event.total)
        said = event.item or event.stage
        self._bars.update(self._bar[1], description=said, completed=event.done, total=event.total)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """While a job runs: an interrupt leaves the document of what was done, and the bar is gone afterwards."""
    try:
        yield
    except Interrupted as interrupt:
        watch.close()
        if interrupt.document is not None:
            watch.save(interrupt.document)
        raise
    finally:
        watch.close()


def show(table: Table) -> None:
    """Print a document's table."""
    print_table(table.columns, table.rows, title=table.title)


def show_peaks(found: Memory) -> None:
    """Print estimates and their checks, and what they come to."""
    show(found.peaks())
    say_not_measured(found)
    say(found.summary)
    if found.doubt:
        print_error(f"Warning: {found.doubt}")


def say_next(found: Document) -> None:
    """Print what to do with what was found: lines to paste, each as long as it is."""
    following = found.next
    if following is None:
        return
    if following.command is not None:
        say(f"Next:{f' {following.note}' if following.note else ''}\n  {following.command}")
    if following.python:
        say("In Python:\n" + "\n".join(f"  {line}".rstrip() for line in following.python))


def say_not_measured(found: Memory) -> None:
    """Say of numbers for a card that is not there that they are of one."""
    if found.not_measured is not None:
        say(found.not_measured)
