"""What a person reads: messages, tables and progress, all on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPE_WIDTH = 120


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
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
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
