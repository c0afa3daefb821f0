"""The numbers in docs/search.md, from documents; ``python -m tests.support.search_page`` writes them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from groupsearch.units import format_bytes, format_count, format_interval, format_number, format_seconds
from tests.support.memory_page import BLOCK, ROOT, document, table_head, table_row

PAGE = ROOT / "docs" / "search.md"
WAYS = (
    "front",
    "tpe, warm start",
    "random, warm start",
    "optuna default",
    "nsga2",
    "random",
    "uniform",
    "exact memory",
)
_NAMES = {"front": "**`front`, the default**"}


def with_numbers(text: str) -> str:
    """The page's text with its blocks of numbers made anew."""
    return BLOCK.sub(lambda block: "".join([block[1], *(f"{line}\n" for line in BLOCKS[block[2]]()), block[3]]), text)


def synthetic() -> dict[str, Any]:
    """The document of ``benchmarks.bench_search``."""
    found: dict[str, Any] = json.loads((ROOT / "profiles" / "search-synthetic.json").read_text(encoding="utf-8"))
    return found


def mean_share(way: str, length: int, trials: int) -> float:
    """Of the exact hypervolume, over all problems of a length and all seeds."""
    (found,) = (e for e in synthetic()["summary"] if (e["way"], e["length"], e["shape"]) == (way, length, "all"))
    return float(found[f"found_{trials}"])


def _synthetic() -> Iterator[str]:
    lengths = sorted({each["length"] for each in synthetic()["summary"]})
    columns = [(length, trials) for length in lengths for trials in (60, 200)]
    yield from table_head("way of searching", *(f"{length} sites, {trials} trials" for length, trials in columns))
    for way in WAYS:
        yield table_row(_NAMES.get(way, way), *(f"{mean_share(way, *column):.3f}" for column in columns))


def _fronts() -> Iterator[str]:
    for case in document("fronts")["cases"]:
        percent = "accuracy" in case["metric"]
        again = ", checkpointed" if case["checkpoint"] != "none" else ""
        yield f"**{case['model']}{again}, epsilon {format_number(case['epsilon'])}** (without privacy"
        yield f"{format_bytes(case['nonprivate_peak_bytes'])}; finding the front took"
        yield f"{format_number(case['trainings_to_find'])} full trainings). {case['answer']}"
        yield ""
        yield from table_head("grouping", "groups", "peak", case["metric"], "seeds", "front")
        for each in case["rows"]:
            value = format_interval(each["mean"], each["half_width"], percent=percent)
            mark = "yes" if each["on_front"] else "" if each["searched"] else "trained besides"
            peak = format_bytes(each["peak_bytes"])
            yield table_row(each["grouping"], str(each["groups"]), peak, value, str(len(each["values"])), mark)
        yield ""


def _correlations() -> Iterator[str]:
    yield from table_head("workload", "epsilon", "proxy, short runs", "decided", "short runs, full runs")
    for case in document("fronts")["cases"]:
        pairs = {(each["lower"], each["upper"]): each for each in reversed(case["correlations"])}
        first = pairs["proxy", "short"]
        decided = "proxy used" if first["used"] else "proxy dropped"
        said = [_correlation(first), decided, _correlation(pairs["short", "full"])]
        yield table_row(case["model"], format_number(case["epsilon"]), *said)


def _correlation(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _scale() -> Iterator[str]:
    found = document("scale")
    yield from table_head("storage", "workers", "throughput against one", "overhead of a trial")
    for each in found["throughput"]:
        speedup, overhead = f"{each['speedup']:.2f}x", f"{1000 * each['overhead_seconds_per_trial']:.0f} ms"
        yield table_row(each["storage"], str(each["workers"]), speedup, overhead)
    yield ""
    for each in found["size"]:
        yield f"A study of {format_count(each['trials'])} trials on {each['storage']} opens, resumes and is drawn in"
        yield f"{format_seconds(each['total_seconds'])}, in {format_bytes(each['peak_bytes'])} of memory."


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    "synthetic": _synthetic,
    "fronts": _fronts,
    "correlations": _correlations,
    "scale": _scale,
}

if __name__ == "__main__":
    PAGE.write_text(with_numbers(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
