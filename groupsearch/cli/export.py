"""``groupsearch export``: a grouping in the words of another engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from groupsearch.cli.parameters import Positive, json_option, no_seed_option
from groupsearch.errors import DocumentError
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.joint import JOINT
from groupsearch.plan.trace import Trace

FORMATS = ("fastdp", "jax-privacy")


@click.command("export")
@click.argument("document", type=click.Path())
@click.option("--format", "engine", type=click.Choice(FORMATS), required=True, help="Whose words.")
@click.option("--grouping", "text", help="A grouping. [default: the one that was recommended or trained with]")
@click.option("--max-grad-norm", type=Positive(), default=1.0, help="R, the norm that thresholds are allotted from.")
@no_seed_option
@json_option
def command(document: str, engine: str, text: str | None, max_grad_norm: float, as_json: bool) -> None:
    """Write a grouping of DOCUMENT for another engine.

    DOCUMENT is one that has a trace: of a profile, a search or a training run. Clipping is by min(1, R / norm), with
    the same threshold for every group; what the other engine would do wrong is refused.

    \b
    groupsearch export reports/digits-vit.json --format fastdp
    """
    from groupsearch.plan.clipping import ClipPlan
    from groupsearch.plan.export import to_fastdp, to_jax_privacy
    from groupsearch.records import read_document

    grouping = _grouping(document, read_document(document), text)
    plan = ClipPlan(grouping, max_grad_norm=max_grad_norm)
    exported = {"clipping_style": to_fastdp(plan)} if engine == "fastdp" else to_jax_privacy(plan)
    if as_json:
        exported = {"format": engine, "boundaries": list(grouping.boundaries), **exported}
    elif engine == "fastdp":
        click.echo("\n".join(exported["clipping_style"]))
        return
    click.echo(json.dumps(exported, indent=1))


def _grouping(path: str, document: Mapping[str, Any], text: str | None) -> Grouping:
    if "trace" not in document:
        raise DocumentError(
            f"Expected a document with a trace, found one of kind {document['kind']} without in {path}. Name one "
            "written by `groupsearch profile`, `groupsearch optimize` or `groupsearch train`."
        )
    trace = Trace.from_json(document["trace"])
    if text is not None:
        return Grouping.parse(trace, text)
    own = document if document["kind"] == "train" else document.get("recommended") or document.get(JOINT) or {}
    if "boundaries" not in own:
        raise DocumentError(
            f"Expected a document that recommends a grouping, found one of kind {document['kind']} that does not in "
            f"{path}. Name the grouping: --grouping best:4."
        )
    return Grouping.from_boundaries(trace, own["boundaries"])
