"""``groupsearch compare``: two documents side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click

from groupsearch.cli.parameters import Share, json_option, no_seed_option
from groupsearch.cli.terminal import print_table
from groupsearch.errors import DocumentError, ToleranceError
from groupsearch.report.subject import Read, Row, options_of, read
from groupsearch.units import format_bytes, format_number, format_percent, format_signed_percent


class Difference(NamedTuple):
    """One number that both documents tell.

    ``change`` is b / a - 1, and ``worse`` the share by which b is the worse of the two: more
    bytes, or less of a metric.
    """

    what: str
    grouping: str
    a: float
    b: float

    @property
    def change(self) -> float:
        """How far b is from a, relative to a."""
        return self.b / self.a - 1 if self.a else float(self.b != self.a)

    @property
    def worse(self) -> float:
        """How much worse b is; negative where it is better."""
        return -self.change if self.what == "metric" else self.change


@click.command("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--fail-over", type=Share(), help="Exit 1 when B needs more memory, or has less of its metric, by this.")
@no_seed_option
@json_option
def command(a: str, b: str, fail_over: float | None, as_json: bool) -> None:
    """Show two documents side by side.

    Every peak and metric that both A and B tell is compared; with --fail-over it becomes a check.

    \b
    groupsearch compare before.json after.json --fail-over 2%
    """
    from groupsearch.records import document_text, read_document

    rows = differences(read(read_document(a)), read(read_document(b)))
    if not rows:
        raise DocumentError(
            f"Expected two documents that share a grouping, found none that both {a} and {b} tell of. "
            f"Profile both with the same --grouping."
        )
    if as_json:
        listed = [{**row._asdict(), "change": row.change} for row in rows]
        click.echo(document_text({"a": a, "b": b, "rows": listed}))
    else:
        cells = [(r.what, r.grouping, _text(r, r.a), _text(r, r.b), format_signed_percent(r.change)) for r in rows]
        print_table(("what ", "grouping ", "A", "B", "B / A - 1"), cells, title=f"A: {a}\nB: {b}", to_stdout=True)
    failed = [row for row in rows if fail_over is not None and row.worse > fail_over]
    if failed:
        worst = max(failed, key=lambda row: row.worse)
        raise ToleranceError(
            f"Expected B to be at most {format_percent(fail_over or 0.0)} worse than A, found {len(failed)} of "
            f"{len(rows)} numbers beyond that; the worst is {worst.what} of {worst.grouping}, "
            f"{format_signed_percent(worst.change)}."
        )


def differences(a: Read, b: Read) -> list[Difference]:
    """Every number that both documents tell, in the order of the first."""
    first, second = dict(_numbers(a)), dict(_numbers(b))
    return [Difference(*key, value, second[key]) for key, value in first.items() if key in second]


def _numbers(document: Read) -> Iterator[tuple[tuple[str, str], float]]:
    for name, peak in (
        ("non-private", document.get("nonprivate_peak_bytes")),
        ("floor", document.get("floor_bytes")),
    ):
        if peak:
            yield ("peak", name), peak
    for what, rows in (
        ("estimate", document.get("estimates")),
        ("simulated", document.get("simulations")),
        ("measured", document.get("measurements")),
        ("measured", document.get("rows")),
    ):
        for row in rows or []:
            yield (what, row["grouping"]), row["peak_bytes"]
    for row in document.get("candidates") or []:
        cuts = ",".join(map(str, row["boundaries"])) or "all-layer"
        name = ", ".join((cuts, *options_of(row)))
        yield ("candidate", name), row["peak_bytes"]
        if (mean := _mean(row)) is not None:
            yield ("metric", name), mean
    if document["kind"] == "train" and (mean := _mean(document)) is not None:
        yield ("metric", document["grouping"]), mean


def _mean(row: Row | Read) -> float | None:
    metric = row.get("metric")
    return None if metric is None else metric.get("mean")


def _text(row: Difference, value: float) -> str:
    return format_number(value) if row.what == "metric" else format_bytes(value)
