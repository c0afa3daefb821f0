"""What a job tells, on standard error; and its document, wherever that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.progress import Progress, TaskID

from groupsearch.cli.console import print_table, progress, say
from groupsearch.cli.output import Output
from groupsearch.documents import Document, Memory, Table
from groupsearch.jobs.events import Advanced, Begun, Event, Interrupted


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

    def save(self, document: Document) -> None:
        """Write the document."""
        assert self.output is not None  # every job begins
        self.output.save(document.to_json())

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


def say_not_measured(found: Memory) -> None:
    """Say of numbers for a card that is not there that they are of one."""
    if found.not_measured is not None:
        say(found.not_measured)
