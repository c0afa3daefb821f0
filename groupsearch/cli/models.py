"""``groupsearch models``: the workloads there are."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from groupsearch.cli.parameters import json_option, no_seed_option
from groupsearch.cli.terminal import say


@click.command("models")
@no_seed_option
@json_option
def command(as_json: bool) -> None:
    """List the models that are built in, one line each.

    \b
    groupsearch models
    groupsearch models --json
    """
    from groupsearch.workloads.catalogue import list_workloads

    found = list_workloads()
    if as_json:
        click.echo(json.dumps({"models": [asdict(info) for info in found]}, indent=1))
        return
    width = max(len(info.name) for info in found)
    for info in found:
        use = "optimize" if info.has_data else "profile"
        click.echo(f"{info.name:<{width}}  {use:<8}  {info.summary}; {info.task}")
    say(
        "Those marked optimize have data to train on; --json tells the settings of each. Your own model is "
        "path/to/file.py:factory or package.module:factory, another transformers model is hf:NAME, with data if "
        "--setting data=FOLDER is given."
    )
