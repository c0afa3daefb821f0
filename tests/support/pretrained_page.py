"""The commands and numbers in docs/pretrained.md, from the example; ``python -m tests.support.pretrained_page``."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from typing import Any

from groupsearch.units import format_at_most, format_bytes, format_count, format_number, format_percent
from tests.support.memory_page import BLOCK, ROOT

PAGE = ROOT / "docs" / "pretrained.md"
EXAMPLE = ROOT / "examples" / "pretrained_to_private.py"
FOUND = ROOT / "profiles" / "pretrained-to-private.json"


def with_numbers(text: str) -> str:
    """The page's text with its blocks made anew."""
    return BLOCK.sub(lambda block: "".join([block[1], *(f"{line}\n" for line in BLOCKS[block[2]]()), block[3]]), text)


def _found() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FOUND.read_text(encoding="utf-8"))
    return found


def _commands(name: str) -> Iterator[str]:
    yield ""
    for line in runpy.run_path(str(EXAMPLE))["commands"](name):
        yield f"    groupsearch {line}"
    yield ""


def _classifier() -> Iterator[str]:
    found = _found()["tasks"]["classifier"]
    right, guessed = (format_percent(found[key]) for key in ("reported", "before"))
    yield f"It found {_grouping(found)}. The trained classifier is right about {right} of"
    yield f"the lines it was not trained on (guessing: {guessed}), at {_spent(found)}."


def _language_model() -> Iterator[str]:
    found = _found()["tasks"]["language-model"]
    before, after = (format_number(-found[key], 4) for key in ("before", "reported"))
    yield f"It found {_grouping(found)}. The loss per token falls from {before} to {after}, at"
    yield f"{_spent(found)}."


def _again() -> Iterator[str]:
    yield "| | the command said | of the weights loaded again |"
    yield "|---|---|---|"
    for name, each in _found()["tasks"].items():
        yield f"| {name} | {each['reported']!r} | {each['loaded']!r} |"


def _made() -> Iterator[str]:
    found = _found()
    train, validation = (format_count(found["examples"][side]) for side in ("train", "validation"))
    yield f"The numbers below are of Python {found['python']}, {train} lines to train on and {validation} to judge by."


def _grouping(found: dict[str, Any]) -> str:
    groups = f"{found['groups']} group{'' if found['groups'] == 1 else 's'}"
    return f"{groups} with a peak of {format_bytes(found['peak_bytes'])}"


def _spent(found: dict[str, Any]) -> str:
    return f"epsilon {format_at_most(found['epsilon'])} and delta {format_at_most(found['delta'])}"


BLOCKS = {
    "made": _made,
    "classifier_commands": lambda: _commands("classifier"),
    "classifier": _classifier,
    "language_model_commands": lambda: _commands("language-model"),
    "language_model": _language_model,
    "again": _again,
}

if __name__ == "__main__":
    PAGE.write_text(with_numbers(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
