"""The fuzzer's command: a table of verdicts, or one program."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tests.engine.fuzzing import Outcome, generate, judge, smallest, verdict_of
from tests.engine.programs import recipe, write
from tests.engine.writer import MIXED

Found = dict[int, Outcome]


def run(seeds: Iterable[int], workers: int) -> Found:
    """The outcome of every seed."""
    seeds = list(seeds)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return dict(zip(seeds, pool.map(verdict_of, seeds, chunksize=20), strict=True))


def share_refused(found: Found) -> tuple[int, int]:
    """How many of the right programs were refused, and how many there are."""
    right = [
        o for seed, o in found.items() if not o.refusable and o.verdict != "unusable" and recipe(seed).verdict != MIXED
    ]
    return sum(o.verdict == "refused" for o in right), len(right)


def table(found: Found) -> str:
    """Verdicts by what the programs are, reasons of refusals, and faults with their seeds."""
    rows: Counter[tuple[str, str]] = Counter((_class(seed, o), o.verdict) for seed, o in found.items())
    lines = [f"{len(found)} programs"]
    for kind in ("right", "either", "mixed"):
        parts = [f"{verdict} {n}" for (k, verdict), n in sorted(rows.items()) if k == kind]
        lines.append(f"  {kind:7s} {', '.join(parts)}")
    refused, right = share_refused(found)
    lines.append(f"right programs refused: {refused} of {right} ({refused / max(right, 1):.1%})")
    for title, chosen in (
        ("right, refused", lambda s, o: o.verdict == "refused" and _class(s, o) == "right"),
        ("FAULTS", lambda s, o: o.fault),
        ("mixed, accepted, no sum seen to move", lambda s, o: o.verdict == "quiet"),
        ("unusable", lambda s, o: o.verdict == "unusable"),
    ):
        lines += _reasons(title, {s: o for s, o in found.items() if chosen(s, o)})
    return "\n".join(lines)


def _class(seed: int, outcome: Outcome) -> str:
    verdict = recipe(seed).verdict
    return "either" if verdict == "right" and outcome.refusable else verdict


def _reasons(title: str, found: Found) -> list[str]:
    by_key: dict[tuple[str, str], list[int]] = defaultdict(list)
    for seed, o in found.items():
        by_key[
            o.verdict if o.verdict in ("wrong", "moved", "leak", "quiet") else o.where,
            "" if o.verdict in ("wrong", "moved", "leak", "quiet") else o.key,
        ].append(seed)
    lines = [f"{title}: {len(found)}"]
    for (what, key), seeds in sorted(by_key.items(), key=lambda item: -len(item[1])):
        rest = Counter(name for seed in seeds for name in set(recipe(seed).ingredients))
        common = ", ".join(f"{name} {n}" for name, n in rest.most_common(5))
        lines.append(f"  {len(seeds):4d} {what}: {key}\n       seeds {seeds[:8]}; {common}")
    return lines


def main() -> None:
    """Print what was asked for."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--seeds", default="0:200", help="FROM:TO, or one")
    ask.add_argument("--show", action="store_true", help="print each program, its smallest version and the verdict")
    ask.add_argument("--faults", action="store_true", help="the same for every seed with a fault")
    ask.add_argument("--workers", type=int, default=2)
    asked = ask.parse_args()
    start, _, stop = asked.seeds.partition(":")
    seeds = range(int(start), int(stop or int(start) + 1))
    if asked.show:
        for seed in seeds:
            show(seed)
        return
    found = run(seeds, asked.workers)
    print(table(found))
    if asked.faults:
        for seed, outcome in found.items():
            if outcome.fault:
                show(seed)


def show(seed: int) -> None:
    """A seed's verdict and its smallest program with the same."""
    outcome = judge(generate(seed), whole_trace=seed % 8 == 0)
    least = smallest(
        recipe(seed),
        lambda other: other.verdict == outcome.verdict and (outcome.verdict != "crash" or other.key == outcome.key),
    )
    made = recipe(seed)
    print(f"# seed {seed}: {', '.join(made.ingredients)} ({made.verdict}): {outcome.verdict} {outcome.where}")
    print(f"# {outcome.detail}")
    print(f"# smallest: {', '.join(least.ingredients)}: {judge(write(least)).detail}\n{write(least).source}")
