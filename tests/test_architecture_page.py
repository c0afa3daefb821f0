"""docs/architecture.md shows the layers that the linter holds, and every module of the package in one of them."""

from __future__ import annotations

import tomllib
from collections import Counter

from tests.support.architecture_page import PACKAGE, PAGE, ROOT, layers, with_layers

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_layers_are_those_of_the_contract():
    assert with_layers(TEXT) == TEXT, "run `python -m tests.support.architecture_page`"


def test_every_module_has_one_layer_and_a_purpose():
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert Counter(name for layer in layers() for name in layer) == Counter(there - {"__init__"})
    assert "|  |" not in TEXT


def test_imports_for_types_are_held_too():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["importlinter"].get("exclude_type_checking_imports", False) is False
