"""The figures of a house, on a package whose figures are counted by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.house import HOME, any_in_signatures, circles, figures

FILES = {
    "__init__.py": "",
    "one.py": '''\
from __future__ import annotations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from made.two import Two


def long(a: int, /, b: Any, *rest: Any, c: Two, **more: int) -> dict[str, Any]:
    """A docstring
    of two lines."""
    found: Any = a

    return found
''',
    "two.py": """\
import typing

import made.one


class Two:
    size: int
    still: dict[str, typing.Any]

    def __init__(self): ...

    def seven(self, a, b, c, d, e, f, g):
        def inner(x) -> typing.Any:
            return x

        return inner(a)

    @staticmethod
    def quiet(a): return a
""",
    "sub/__init__.py": "from .deep import reach\n",
    "sub/deep.py": '''\
from . import side
from .. import one


def reach():
    """Nothing but words."""


async def late():
    from made import two
    return two
''',
    "sub/side.py": "import os\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "made"


def test_figures_of_a_package_counted_by_hand(package):
    assert figures(package) == {
        "modules": 6,
        "lines": 0 + 13 + 19 + 1 + 11 + 1,
        "functions": 7,  # long, __init__, seven, inner, quiet, reach, late
        "body_lines": {"median": 1, "p90": 4, "max": 4},  # 0, 1, 1, 1, 2, 3, 4
        "arguments": {"p90": 7, "max": 7, "more_than_6": 1},  # 0, 0, 0, 1, 1, 3, 7
        "any": {"in_signatures": 5, "in_all": 6},
        "circles": [["made.one", "made.two"]],
        "arrows": ["one -> two", "sub -> one", "sub -> two", "two -> one"],
        "imported_once": {"made.sub.deep": "made.sub", "made.sub.side": "made.sub.deep"},
    }


def test_circles_that_share_a_module_are_one():
    imports = {"a": {"b"}, "b": {"c", "a"}, "c": {"b", "d"}, "d": {"e"}, "e": {"f"}, "f": {"e"}, "g": {"a"}}
    assert circles(imports) == [["a", "b", "c"], ["e", "f"]]


def test_the_command_prints_the_figures(package):
    command = [sys.executable, "-m", "tests.support.house", str(package)]
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, cwd=HOME.parent)
    assert json.loads(as_json.stdout) == figures(package)
    as_text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME.parent)
    assert "arguments: p90 7, max 7, more than 6 1\n" in as_text.stdout
    assert "imported once: 2\n  made.sub.deep <- made.sub\n" in as_text.stdout


def test_no_modules_of_this_package_import_each_other():
    assert figures(HOME)["circles"] == []


@pytest.mark.parametrize("package", ["jobs", "documents", "report"])
def test_what_crosses_a_stage_has_a_type(package):
    paths = (HOME / package).glob("*.py")
    found = {path.name: any_in_signatures(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert len(found) >= 5
    assert {name: count for name, count in found.items() if count} == {}
