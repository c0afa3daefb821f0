"""``groupsearch compare``: two documents side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import click

from groupsearch.cli.parameters import Share, json_option, no_seed_option
from groupsearch.cli.terminal import print_table
from groupsearch.errors import DocumentError, ToleranceError
from groupsearch.report.subject import Read, Row, options_of, read
from groupsearch.units import format_bytes, format_number, format_percent, format_seconds, format_signed_percent

_SETTINGS = (
    *("model", "epsilon", "delta", "grouping", "boundaries", "rule", "max_grad_norm", "allocation", "noise_allocation"),
    *("noise_multiplier", "optimizer", "learning_rate", "sampling", "sampling_rate", "steps", "randomness"),
)


class Difference(NamedTuple):
    """One number that both documents tell.

    ``change`` is how far b lies above a, as a share of a's size, and ``worse`` the share by which b is the worse of the
    two: more bytes, or less of a metric. Steps are timed on machines that do other things, too, and never worse.
    """

    what: str
    grouping: str
    a: float
    b: float

    @property
    def change(self) -> float:
        """How far b is from a, relative to a."""
        return (self.b - self.a) / abs(self.a) if self.a else float(self.b != self.a)

    @property
    def worse(self) -> float:
        """How much worse b is; negative where it is better."""
        if self.what == "step time":
            return 0.0
        return -self.change if self.what == "metric" else self.change


@click.command("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--fail-over", type=Share(), help="Exit 1 when B needs more memory, or has less of its metric, by this.")
@no_seed_option
@json_option
def command(a: str, b: str, fail_over: float | None, as_json: bool) -> None:
    """Show two documents side by side.

    Every peak and metric that both A and B tell is compared; with --fail-over it becomes a check. Of two trainings,
    whatever their groupings, epsilon and the settings that differ come first, and the curves are shown step by step.

    \b
    groupsearch compare before.json after.json --fail-over 2%
    """
    from groupsearch.records import document_text, read_document

    first, second = read(read_document(a)), read(read_document(b))
    rows = differences(first, second)
    trainings = first["kind"] == second["kind"] == "train"
    settings, curves = (unlike(first, second), overlaid(first, second)) if trainings else ([], [])
    if not rows and not trainings:
        raise DocumentError(
            f"Expected two documents that share a grouping, found none that both {a} and {b} tell of. "
            f"Profile both with the same --grouping."
        )
    if as_json:
        listed = [{**row._asdict(), "change": row.change} for row in rows]
        more = {"settings": settings, "curves": curves} if trainings else {}
        click.echo(document_text({"a": a, "b": b, "rows": listed, **more}))
    else:
        title = f"A: {a}\nB: {b}"
        if settings:
            told = [(str(each["setting"]), _said(each["a"]), _said(each["b"])) for each in settings]
            print_table(("setting ", "A ", "B "), told, title=f"{title}\nTrained in different ways:", to_stdout=True)
            title = ""
        cells = [(r.what, r.grouping, _text(r, r.a), _text(r, r.b), format_signed_percent(r.change)) for r in rows]
        print_table(("what ", "grouping ", "A", "B", "B / A - 1"), cells, title=title, to_stdout=True)
        if curves:
            points = [[_said(value) for value in each.values()] for each in curves]
            print_table(("step", "loss A", "loss B", "metric A", "metric B"), points, to_stdout=True)
    failed = [row for row in rows if fail_over is not None and row.worse > fail_over]
    if failed:
        worst = max(failed, key=lambda row: row.worse)
        raise ToleranceError(
            f"Expected B to be at most {format_percent(fail_over or 0.0)} worse than A, found {len(failed)} of "
            f"{len(rows)} numbers beyond that; the worst is {worst.what} of {worst.grouping}, "
            f"{format_signed_percent(worst.change)}."
        )


def unlike(a: Read, b: Read) -> list[dict[str, object]]:
    """What two trainings do not share, and what they cost in privacy in any case, by name."""
    first, second = _trained_with(a), _trained_with(b)
    names = dict.fromkeys((*first, *second))
    always = ("epsilon", "delta")
    return [
        {"setting": name, "a": first.get(name), "b": second.get(name)}
        for name in sorted(names, key=lambda name: name not in always)
        if name in always or first.get(name) != second.get(name)
    ]


def _trained_with(document: Read) -> dict[str, object]:
    told: dict[str, object] = {name: document.get(name) for name in _SETTINGS}
    asked = document.get("settings") or {}
    of_model = asked.get("workload")
    told |= {f"model {name}": value for name, value in of_model.items()} if isinstance(of_model, Mapping) else {}
    told |= {name: value for name, value in asked.items() if name != "workload" and name not in told}
    metric, environment = document.get("metric") or {}, document.get("environment") or {}
    told |= {"model": (document.get("model") or {}).get("name"), "metric": metric.get("name")}
    return told | {name: environment[name] for name in ("device", "python", "packages") if name in environment}


def overlaid(a: Read, b: Read) -> list[dict[str, float | None]]:
    """The curves at every step that either was evaluated at; None where one was not."""
    first, second = ({point[0]: point[1:] for point in each.get("curve") or ()} for each in (a, b))
    nothing = (None, None)
    rows = []
    for step in sorted({*first, *second}, key=lambda step: step or 0):
        (loss_a, metric_a), (loss_b, metric_b) = first.get(step, nothing), second.get(step, nothing)
        rows.append({"step": step, "loss_a": loss_a, "loss_b": loss_b, "metric_a": metric_a, "metric_b": metric_b})
    return rows


def differences(a: Read, b: Read) -> list[Difference]:
    """Every number that both documents tell, in the order of the first.

    Two trainings are compared whatever they were trained with; two metrics only where they have one name.
    """
    if a["kind"] == b["kind"] == "train":
        one, other = dict(_of_training(a)), dict(_of_training(b))
        alike = (a.get("metric") or {}).get("name") == (b.get("metric") or {}).get("name")
        shown = [name for name in one if name in other and (alike or name != "metric")]
        both = " / ".join(dict.fromkeys((a["grouping"], b["grouping"])))
        return [Difference(name, both, one[name], other[name]) for name in shown]
    first, second = dict(_numbers(a)), dict(_numbers(b))
    return [Difference(*key, value, second[key]) for key, value in first.items() if key in second]


def _of_training(document: Read) -> Iterator[tuple[str, float]]:
    for name, value in (
        ("peak", document.get("peak_bytes")),
        ("metric", _mean(document)),
        ("step time", document.get("step_seconds")),
    ):
        if value is not None:
            yield name, value


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
    if row.what == "step time":
        return format_seconds(value)
    return format_number(value) if row.what == "metric" else format_bytes(value)


def _said(value: object) -> str:
    """A value in a table: numbers short, nothing for what is not there, None as JSON says it."""
    if isinstance(value, float):
        return format_number(value, 4)
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)
