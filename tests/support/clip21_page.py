"""The numbers in docs/clip21.md, from its document; ``python -m tests.support.clip21_page`` writes them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from statistics import median

from groupsearch.documents import Study
from groupsearch.documents.rows import Cell
from groupsearch.units import format_at_most, format_count, format_number
from tests.support.memory_page import BLOCK, ROOT, table_head, table_row

PAGE = ROOT / "docs" / "clip21.md"
DOCUMENT = ROOT / "reports" / "clip21-study.json"


@cache
def study() -> Study:
    return Study.load(DOCUMENT)


def cells(method: str, epsilon: float | None = None, steps: str = "tuned") -> list[Cell]:
    """Of one method, in every setting."""
    return [c for c in study().cells if (c.method, c.epsilon, c.steps) == (method, epsilon, steps)]


def medians(method: str, epsilon: float | None = None, problem: str = "") -> list[float]:
    """Of the squared gradient norms over the settings, threshold by threshold; what diverged counts as infinite."""
    rows = [c.squared for c in cells(method, epsilon) if problem in c.problem]
    return [median(float("inf") if v is None else v for v in column) for column in zip(*rows, strict=True)]


def with_numbers(text: str) -> str:
    """The page's text with its blocks of numbers made anew."""
    return BLOCK.sub(lambda block: "".join([block[1], *(f"{line}\n" for line in BLOCKS[block[2]]()), block[3]]), text)


def _heads(*first: str) -> Iterator[str]:
    yield from table_head(*first, *(f"threshold {format_number(bound)}" for bound in study().thresholds))


def _plain() -> Iterator[str]:
    yield from _heads("method")
    for method in ("clip-gd", "clip21-gd", "alpha-normec", "clip-sgd", "clip21-sgd", "clip21-sgd2m"):
        yield table_row(method, *(f"{value:.1e}" for value in medians(method)))


def _groups() -> Iterator[str]:
    yield from _heads("clip21-gd on the networks")
    names = {"clip21-gd": "all at once", "clip21-gd, layers, uniform": "by layer, uniform"}
    for method, name in {**names, "clip21-gd, layers, dimension": "by layer, by dimension"}.items():
        yield table_row(name, *(f"{value:.1e}" for value in medians(method, problem="network")))


def _inactive() -> Iterator[str]:
    yield from _heads("clip21-gd")
    columns = list(zip(*(c.inactive_from for c in cells("clip21-gd")), strict=True))
    known = [[step for step in column if step is not None] for column in columns]
    yield table_row(
        "settings in which clipping ended", *(f"{len(k)} of {len(c)}" for k, c in zip(known, columns, strict=True))
    )
    yield table_row("from this step, in their median", *(format_number(median(k)) if k else "" for k in known))


def _noise() -> Iterator[str]:
    yield from _heads("method", "epsilon")
    for method in ("dp-sgd", "dp-clip21-gd", "dp-clip21-sgd2m", "dp-alpha-normec"):
        for epsilon in (8.0, 18.0):
            yield table_row(method, format_number(epsilon), *(f"{value:.1e}" for value in medians(method, epsilon)))


def _guarantees() -> Iterator[str]:
    yield from table_head("workers", "noise multiplier", "delta", "epsilon of the weights", "of a worker's messages")
    for row in study().guarantees:
        yield table_row(
            format_count(row.workers),
            format_number(row.noise_multiplier),
            format_number(row.delta),
            format_at_most(row.of_weights),
            format_at_most(row.of_messages),
        )


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    "plain": _plain,
    "inactive": _inactive,
    "groups": _groups,
    "noise": _noise,
    "guarantees": _guarantees,
}

if __name__ == "__main__":
    PAGE.write_text(with_numbers(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
