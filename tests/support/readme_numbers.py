"""The numbers in the README, from the documents that its opening mark lists.

``python -m tests.support.readme_numbers`` writes them in. Documents that are not listed, such as those of
somebody's own runs, change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from groupsearch.records import COMMANDS, read_document
from groupsearch.units import (
    format_bytes,
    format_count,
    format_interval,
    format_percent,
    format_ratio,
    format_signed_percent,
)

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- numbers:(.*?)-->\n).*(<!-- /numbers -->)", re.DOTALL)
NEAR_FLOOR = 1.01


def readme_with_numbers(text: str) -> str:
    """The README's text with its block of numbers made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{_numbers(block[2].split())}{block[3]}", text)


def _numbers(paths: list[str]) -> str:
    loaded = {path: json.loads((ROOT / path).read_text(encoding="utf-8")) for path in paths}
    documents = [read_document(ROOT / path) for path, found in loaded.items() if found["kind"] in COMMANDS]
    benchmarks = {found["kind"]: found for found in loaded.values()}
    profiles = [document for document in documents if document["kind"] == "profile"]
    searches = [document for document in documents if document["kind"] == "search"]
    lines = [*(_peaks(profiles) if profiles else ()), *(line for search in searches for line in _search(search))]
    if "accuracy-benchmark" in benchmarks and "step-benchmark" in benchmarks:
        lines += [*_benchmarks(benchmarks["accuracy-benchmark"], benchmarks["step-benchmark"])]
    return "".join(line + "\n" for line in lines)


def _peaks(profiles: list[dict[str, Any]]) -> Iterator[str]:
    yield "Peak memory of one training step (engine on fake CPU tensors), relative to the same step without privacy:"
    yield ""
    yield "| model | batch | checkpointing | no privacy | all-layer | layer-wise | few groups, placed well |"
    yield "|---|---|---|---|---|---|---|"
    for document in profiles:
        yield f"| {' | '.join(_peak_cells(document))} |"
    yield ""


def _peak_cells(document: Mapping[str, Any]) -> tuple[str, ...]:
    plain, model = document["nonprivate_peak_bytes"], document["model"]
    named = {row["grouping"]: row for row in document["estimates"]}
    few = next(
        (row for row in document["front"] if row["peak_bytes"] <= NEAR_FLOOR * document["floor_bytes"]),
        document["front"][-1],
    )

    def ratio(row: Mapping[str, Any]) -> str:
        return format_ratio(row["peak_bytes"] / plain)

    return (
        model["name"],
        str(model["batch_size"]),
        document["settings"]["checkpoint"],
        format_bytes(plain),
        ratio(named["all-layer"]),
        f"{ratio(named['layer-wise'])} ({named['layer-wise']['groups']} groups)",
        f"**{ratio(few)}** ({few['groups']} groups)",
    )


def _search(document: Mapping[str, Any]) -> Iterator[str]:
    name, epsilon = document["model"]["name"], document["training"]["epsilon"]
    how = f"trained with privacy at epsilon {epsilon:.2g}, with activation checkpointing"
    yield f"{name}, {how} (an experiment, mean of 3 seeds):"
    yield ""
    yield "| grouping | peak memory | validation |"
    yield "|---|---|---|"
    for row in sorted(document["candidates"], key=lambda row: int(row["peak_bytes"])):
        metric = row.get("metric") or {}
        if metric.get("mean") is None or not (row["on_front"] or row["source"] in ("all-layer", "layer-wise")):
            continue
        value = format_interval(metric["mean"], metric["half_width"], percent="accuracy" in metric["name"])
        mark = ", recommended" if row["boundaries"] == document["recommended"]["boundaries"] else ""
        groups = f"{row['groups']} group{'' if row['groups'] == 1 else 's'}"
        yield f"| {groups} ({row['source']}{mark}) | {format_bytes(row['peak_bytes'])} | {value} |"
    yield ""


def _benchmarks(accuracy: Mapping[str, Any], step: Mapping[str, Any]) -> Iterator[str]:
    errors = accuracy["summary"]["all"]["estimate/measurement"]
    yield (
        f"Against {format_count(errors['numbers'])} measured peaks of small models on a CPU, the estimate is off by "
        f"{format_percent(errors['median_absolute'], 4)} in the median and {format_signed_percent(errors['worst'])} at"
    )
    yield "worst. A private step (all-layer) takes, against the same step without privacy on the same two cores:"
    yield ""
    for row in step["rows"]:
        ratios = row["ratio_to_non_private"]
        yield (
            f"- {row['model']['name']}: **{format_ratio(ratios['all-layer'])}** the time (Opacus' ghost mode "
            f"{format_ratio(ratios['opacus-ghost'])})"
        )
    yield ""


if __name__ == "__main__":
    README.write_text(readme_with_numbers(README.read_text(encoding="utf-8")), encoding="utf-8")
