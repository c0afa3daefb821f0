"""What private thresholds and noise by group cost, as the tables of docs/clipping.md.

``python -m benchmarks.inflation`` writes them in. Nothing is measured: every figure is computed from a clip
plan, the second table's from the plans of a traced GPT-2, whose first and last group share the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan, gradient_noise_multiplier
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Trace
from groupsearch.records import read_document
from groupsearch.units import format_number, format_signed_percent

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clipping.md"
PROFILE = ROOT / "profiles" / "hf-gpt2-b16-cpu-checkpoint-blocks.json"
GROUPS = (1, 2, 4, 8, 12, 24, 50, 100)
COUNT_NOISES = (10.0, 25.0, 50.0, 100.0)
GROUPINGS = ("all-layer", "uniform:2", "uniform:4", "uniform:8", "block-wise", "layer-wise")


def page_with_tables(text: str) -> str:
    """The page's text with its tables made anew."""
    return _between(_between(text, "inflation", _inflation()), "allocation", _allocation())


def _between(text: str, name: str, lines: Iterable[str]) -> str:
    before, opening, rest = text.partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    return "".join((before, opening, *(f"{line}\n" for line in lines), closing, after))


def _inflation() -> Iterator[str]:
    yield f"| groups M | {' | '.join(f'count noise {noise:g}' for noise in COUNT_NOISES)} |"
    yield "|---" * (len(COUNT_NOISES) + 1) + "|"
    for groups in GROUPS:
        yield f"| {groups} | {' | '.join(_inflated(groups, noise) for noise in COUNT_NOISES)} |"


def _inflated(groups: int, count_noise: float) -> str:
    try:
        return format_signed_percent(gradient_noise_multiplier(1.0, groups, count_noise) - 1)
    except GroupSearchError:
        return "refused"


def _allocation() -> Iterator[str]:
    yield "| grouping | M | equal, over the threshold | uniform: global | equal | by dimension: global | equal |"
    yield "|---" * 7 + "|"
    trace = Trace.from_json(read_document(PROFILE)["trace"])
    for text in GROUPINGS:
        grouping = Grouping.parse(trace, text)
        cells = [text, str(grouping.groups), format_number(grouping.groups**0.5)]
        for thresholds in ("uniform", "dimension"):
            for noise in ("global", "equal"):
                scales = ClipPlan(grouping, allocation=thresholds, noise_allocation=noise).noise_scales.values()
                ends = dict.fromkeys(format_number(scale) for scale in (min(scales), max(scales)))
                cells.append(" to ".join(ends))
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
