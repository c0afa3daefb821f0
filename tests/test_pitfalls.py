"""The page of pitfalls: every one has its severity and remedy, and what is called noticed is held by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
PITFALLS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
TESTS = re.findall(r"(tests/\S+\.py)::(\w+)", PAGE)


@pytest.mark.parametrize("title", PITFALLS)
def test_a_pitfall_has_a_severity_what_is_noticed_and_a_remedy(title: str) -> None:
    body = PITFALLS[title].strip()
    assert re.match(r"\*\*(Severe|Serious|Mild)\*\*", body.replace(".**", "**"))
    noticed = body.partition("*Noticed*:")[2].partition("*Instead*:")
    assert noticed[2].strip()
    assert "::" in noticed[0] or noticed[0].strip().startswith("not at all")


@pytest.mark.parametrize(("path", "name"), sorted(set(TESTS)))
def test_what_is_noticed_is_held_by_a_test(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
