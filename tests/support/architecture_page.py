"""The layers in docs/architecture.md; ``python -m tests.support.architecture_page`` writes them, from the contract.

What a module is for is the first sentence of its own docstring.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "groupsearch"
BLOCK = re.compile(r"(<!-- layers -->\n).*(<!-- /layers -->)", re.DOTALL)


def with_layers(text: str) -> str:
    """The page's text with its table of layers made anew."""
    return BLOCK.sub(lambda block: "".join([block[1], *(f"{line}\n" for line in _table()), block[2]]), text)


def layers() -> list[list[str]]:
    """The modules of every layer that are there, the highest first, as the contract has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in settings["tool"]["importlinter"]["contracts"] if each.get("containers"))
    named = ([name.strip(" ()") for name in re.split(r"[|:]", layer)] for layer in contract["layers"])
    found = ([name for name in layer if _source(name) is not None] for layer in named)
    return [layer for layer in found if layer]


def _source(name: str) -> Path | None:
    return next((path for path in (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py") if path.exists()), None)


def _table() -> Iterator[str]:
    yield "| layer | module | what it is for |"
    yield "|---|---|---|"
    for number, modules in zip(range(len(layers()), 0, -1), layers(), strict=True):
        for name in modules:
            path = _source(name)
            assert path is not None
            place = path.parent if path.name == "__init__.py" else path
            link = f"[{name}](../{place.relative_to(ROOT).as_posix()})"
            yield f"| {number} | {link} | {_purpose(path)} |"


def _purpose(path: Path) -> str:
    """The first line of a module's docstring, in the marks of this page."""
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", words.split("\n")[0].replace("``", "`")).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_layers(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
