"""How close an adversary comes to the epsilon claimed: long audits of the real engine, and of broken ones.

Run with ``python -m benchmarks.audit [--output PATH] [--trials N]``; it writes ``profiles/audit-cpu.json``.
The audits are those of tests/privacy; here they have more runs, so their bounds are closer. Every bound
holds with the confidence stated. ``lower`` assumes nothing of the mechanism; ``lower_of_family`` takes it for a
subsampled Gaussian of unknown noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from groupsearch.plan.clipping import ClipPlan
from groupsearch.records import check_destination, document_text, environment, write_text
from tests.privacy import broken
from tests.privacy.audit import CanaryAudit, many_uses, two_groups
from tests.privacy.bounds import CONFIDENCE, Claim
from tests.privacy.one_run import audit_one_run
from tests.support.case import Case

OUTPUT = Path(__file__).parents[1] / "profiles" / "audit-cpu.json"
SILENT = broken.silent(["0.weight", "0.bias"])
# name: subject, claim, learning rate, share of the trials, damage
WHITE_BOX: dict[str, tuple[Callable[[], tuple[Case, ClipPlan]], Claim, float, float, broken.Damage]] = {
    "one step, all examples": (two_groups, Claim(1.0, 1.0, 1), 0.0, 1.0, broken.none),
    "one step, all examples, delta 1e-2": (two_groups, Claim(1.0, 1.0, 1, 1e-2), 0.0, 1.0, broken.none),
    "one quiet step, all examples": (two_groups, Claim(0.5, 1.0, 1), 0.0, 1.0, broken.none),
    "four steps, half of the examples": (two_groups, Claim(1.0, 0.5, 4), 0.0, 0.5, broken.none),
    "eight training steps, a fifth of the examples": (two_groups, Claim(0.6, 0.2, 8), 0.05, 0.15, broken.none),
    "a layer used 8 times, one step": (lambda: many_uses(8), Claim(1.0, 1.0, 1), 0.0, 0.4, broken.none),
    "broken: noise missing in one group": (two_groups, Claim(2.5, 0.5, 2), 0.0, 0.25, SILENT),
    "broken: parameter unclipped": (two_groups, Claim(2.5, 0.5, 2), 0.0, 0.25, broken.unclipped("2.bias")),
    "broken: tied term dropped": (many_uses, Claim(2.5, 0.5, 2), 0.0, 0.1, broken.tied_term_dropped),
    "broken: noise drawn once for two steps": (
        two_groups,
        Claim(2.5, 0.5, 2),
        0.0,
        0.25,
        broken.noise_kept_for_two_steps,
    ),
}
# name: claim, canaries, guesses, damage
ONE_RUN: dict[str, tuple[Claim, int, int, broken.Damage]] = {
    "one step, all examples": (Claim(1.0, 1.0, 1), 20_000, 800, broken.none),
    "one quiet step, all examples": (Claim(0.5, 1.0, 1), 20_000, 2_000, broken.none),
    "four steps, half of the examples": (Claim(1.0, 0.5, 4), 20_000, 800, broken.none),
    "broken: parameter unclipped": (Claim(1.0, 1.0, 1), 20_000, 800, broken.unclipped("a.weight")),
}


def white_box(name: str, trials: int) -> dict[str, Any]:
    """One row: many runs with a canary and as many without."""
    subject, claim, learning_rate, share, damage = WHITE_BOX[name]
    begin = time.perf_counter()
    case, plan = subject()
    verdict = CanaryAudit(case, plan, claim, damage, learning_rate=learning_rate).run(int(share * trials))
    row = {
        "audit": "white-box canary",
        "subject": name,
        "learning_rate": learning_rate,
        **asdict(claim),
        **asdict(verdict),
    }
    return _told(row, name, begin)


def one_run(name: str) -> dict[str, Any]:
    """One row: one run with many canaries."""
    claim, canaries, guesses, damage = ONE_RUN[name]
    begin = time.perf_counter()
    found = audit_one_run(claim, canaries, guesses, damage)
    return _told({"audit": "one run", "subject": name, **asdict(claim), **asdict(found)}, name, begin)


def _told(row: dict[str, Any], name: str, begin: float) -> dict[str, Any]:
    """The row with its judgement: a sound engine stays below its claim, a broken one is found out."""
    refuted = row["lower"] > row["claimed"]
    expected = name.startswith("broken")
    best = max(row["lower"], 0.0 if expected else row.get("lower_of_family", 0.0))
    share = best / row["claimed"]
    return {
        **row,
        "refuted": refuted,
        "as_expected": refuted == expected and (expected or share <= 1),
        "share_of_claim": share,
        "seconds": time.perf_counter() - begin,
    }


def main(arguments: list[str]) -> int:
    """Audit, print, and write the document; 1 if anything came out otherwise than it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the JSON document")
    parser.add_argument("--trials", type=int, default=2000, help="runs with the canary in the longest audit")
    options = parser.parse_args(arguments)
    check_destination(options.output, force=True)
    rows = []
    found = chain((white_box(name, options.trials) for name in WHITE_BOX), (one_run(name) for name in ONE_RUN))
    for row in found:  # one after the other: each is told as soon as it is there
        rows.append(row)
        print(
            f"{row['audit']:<17} {row['subject']:<46} epsilon {row['claimed']:6.3f}  lower {row['lower']:6.3f}  "
            f"of the family {row.get('lower_of_family', float('nan')):6.3f}  {row['share_of_claim']:4.0%}  "
            f"{row['seconds']:5.1f} s{'' if row['as_expected'] else '  NOT AS EXPECTED'}",
            flush=True,
        )
    document = {
        "schema_version": 1,
        "kind": "audit-benchmark",
        "environment": environment(),
        "settings": {"trials": options.trials, "confidence": CONFIDENCE},
        "rows": rows,
    }
    write_text(options.output, document_text(document) + "\n", force=True)
    return 0 if all(row["as_expected"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
