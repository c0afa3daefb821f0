"""Searches by real training, in an address space with room for some groupings and not for others.

Run as ``python starved.py JOURNAL``. Prints as JSON what failed and why, what was trained, and how many
evaluations were begun more than once.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, Outcome, SearchSettings, run_search
from groupsearch.training import TrainSettings, train
from groupsearch.verify import Setup

SETTINGS = {"blocks": 6, "width": 48, "batch_size": 1000}


def address_space_bytes() -> int:
    """The largest that this process has used."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmPeak:") + 1])


def main(storage: str) -> None:
    torch.set_num_threads(1)
    setup = Setup("digits-vit", SETTINGS, checkpoint="blocks")
    trace, begun = setup.trace(), []
    training = TrainSettings(steps=1, learning_rate=0.01, noise_multiplier=1.0, sampling_rate=0.7, checkpoint="blocks")

    def evaluate(choice: Choice, seed: int) -> Outcome:
        begun.append((choice, seed))
        result = train(setup.loaded, Grouping.from_boundaries(trace, choice.boundaries), training)
        return Outcome(result.metric, result.step_seconds, result.steps)

    layer_wise = tuple(range(1, trace.length))
    evaluate(Choice(layer_wise), 0)  # what a frugal grouping needs, all else included
    begun.clear()
    most, least = (int(peak) for peak in peaks(trace, [(), layer_wise]))
    room = address_space_bytes() + (most - least) // 2
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    result = run_search(trace, evaluate, SearchSettings(trials=6, seeds=1, storage=storage))
    answer = {
        "failed": {str(e.boundaries): e.error for e in result.evaluations if e.error},
        "trained": [str(e.boundaries) for e in result.evaluations if not e.error],
        "twice": len(begun) - len(set(begun)),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
