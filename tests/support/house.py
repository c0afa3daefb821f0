"""Figures of a package's house: ``python -m tests.support.house [--json] [PATH]``, before and after a change of it.

Modules, functions, arguments, imports and ``Any`` are counted from the source alone; nothing is imported. PATH is the
folder of a package, ``groupsearch`` if not given. All imports count: those within functions and those under
``TYPE_CHECKING``, too.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2] / "groupsearch"
MOST_ARGUMENTS = 6
Function = ast.FunctionDef | ast.AsyncFunctionDef
Imports = Mapping[str, set[str]]


def figures(package: Path) -> dict[str, Any]:
    """Everything that is counted of the package in a folder, by its name."""
    texts = {_name(path, package): path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    packages = {_name(path, package) for path in package.rglob("__init__.py")}
    imports = {name: set(_imported(name, tree, name in packages, set(trees))) for name, tree in trees.items()}
    found = [each for tree in trees.values() for each in _functions(tree)]
    lengths = [_body_lines(function) for function, _ in found]
    arguments = [_arguments(function, in_class) for function, in_class in found]
    importers = {name: sorted(other for other in imports if name in imports[other]) for name in imports}
    return {
        "modules": len(trees),
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "functions": len(found),
        "body_lines": {"median": _rank(lengths, 0.5), "p90": _rank(lengths, 0.9), "max": max(lengths, default=0)},
        "arguments": {
            "p90": _rank(arguments, 0.9),
            "max": max(arguments, default=0),
            f"more_than_{MOST_ARGUMENTS}": sum(number > MOST_ARGUMENTS for number in arguments),
        },
        "any": {"in_signatures": any_in_signatures(*trees.values()), "in_all": _any_in(trees.values())},
        "circles": circles(imports),
        "arrows": [" -> ".join(pair) for pair in sorted(_arrows(imports))],
        "imported_once": {name: others[0] for name, others in importers.items() if len(others) == 1},
    }


def any_in_signatures(*trees: ast.AST) -> int:
    """How often ``Any`` is named by parameters, returns and the fields of classes."""
    functions = (function for tree in trees for function, _ in _functions(tree))
    classes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    fields = (node.annotation for each in classes for node in each.body if isinstance(node, ast.AnnAssign))
    return _any_in([*(note for function in functions for note in _annotations(function)), *fields])


def circles(imports: Imports) -> list[list[str]]:
    """The modules that import each other, directly or through others: Tarjan's strongly connected components."""
    indices: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        indices[name] = lowest[name] = len(indices)
        path.append(name)
        for other in sorted(imports[name]):
            if other not in indices:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in path:
                lowest[name] = min(lowest[name], indices[other])
        if lowest[name] == indices[name]:
            start = path.index(name)
            if len(path) - start > 1:
                found.append(sorted(path[start:]))
            del path[start:]

    for name in sorted(imports):
        if name not in indices:
            visit(name)
    return sorted(found)


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, tree: ast.AST, is_package: bool, modules: set[str]) -> Iterator[str]:
    """The modules of the same package that a module names, without those that Python imports on the way to them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            inside = {alias.name: f"{home}.{alias.name}" for alias in node.names}
            named = [full if full in modules else home for full in inside.values()]
        else:
            continue
        yield from (each for each in named if each in modules and each != name)


def _functions(tree: ast.AST) -> Iterator[tuple[Function, bool]]:
    """Every function, and whether it is a method; those within functions, too."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, Function):
                yield node, isinstance(parent, ast.ClassDef)


def _body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _arguments(function: Function, in_class: bool) -> int:
    """Arguments as the linter counts them: without ``self`` and ``cls``, ``*args`` and ``**kwargs``."""
    given = function.args
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    positional = len(given.posonlyargs) + len(given.args)
    return max(positional - (in_class and not static), 0) + len(given.kwonlyargs)


def _annotations(function: Function) -> Iterator[ast.expr]:
    given = function.args
    arguments = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
    notes = (*(each.annotation for each in arguments if each is not None), function.returns)
    yield from (note for note in notes if note is not None)


def _any_in(trees: Iterable[ast.AST]) -> int:
    return sum(
        "Any" in (getattr(node, "id", None), getattr(node, "attr", None)) for tree in trees for node in ast.walk(tree)
    )


def _arrows(imports: Imports) -> set[tuple[str, str]]:
    """Who imports whom among what lies directly in the package, whose own ``__init__`` is left out."""
    pairs = ((name.split("."), other.split(".")) for name, others in imports.items() for other in others)
    return {(a[1], b[1]) for a, b in pairs if len(a) > 1 and len(b) > 1 and a[1] != b[1]}


def _rank(numbers: Sequence[int], share: float) -> int:
    """The least number that is not exceeded by this share of them."""
    return sorted(numbers)[ceil(share * len(numbers)) - 1] if numbers else 0


def _as_text(found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        title = name.replace("_", " ")
        if isinstance(value, int):
            yield f"{title}: {value}"
        elif name in ("body_lines", "arguments", "any"):
            yield f"{title}: " + ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in value.items())
        else:
            yield f"{title}: {len(value)}"
            lines = (f"{key} <- {by}" for key, by in value.items()) if isinstance(value, dict) else map(str, value)
            yield from (f"  {line}" for line in lines)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.house", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=HOME, help="the folder of a package")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    found = figures(given.path.resolve())
    print(json.dumps(found, indent=1) if given.json else "\n".join(_as_text(found)))


if __name__ == "__main__":
    main()
