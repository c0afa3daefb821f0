"""A step's births and deaths, put in the order of any grouping and replayed: against the closed form and the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import pytest

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.events import Close, StepEvents
from groupsearch.reserved import Holding, replay_memory
from groupsearch.segments import MIB, NoRoomError, Rules
from groupsearch.trace import Trace
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import StepSettings, fake_stage, made_private

WORKLOADS = {
    "digits-vit, blocks checkpointed": ("digits-vit", {}, {"checkpoint": "blocks"}),
    "stdlib-gpt, foreach": ("stdlib-gpt", {}, {"optimizer": "adam:foreach"}),
    "stdlib-gpt, two micro-batches": ("stdlib-gpt", {}, {"micro_batches": 2}),
    "stdlib-gpt, bfloat16 by autocast": ("stdlib-gpt", {}, {"autocast": "bfloat16"}),
}


@pytest.fixture(scope="module", params=WORKLOADS.values(), ids=WORKLOADS)
def traced(request):
    """(workload, its step's settings, its trace)."""
    name, settings, how = request.param
    workload = gs.load_workload(name, **settings)
    batch = workload.make_batch(workload.batch_size)
    return workload, how, gs.trace_model(workload.build_meta(), batch, workload.loss, **how)


def live_peak(sizes: Sequence[int], sequence: Iterable[int], kept: int) -> int:
    """The most bytes alive in a sequence of births and deaths, without an allocator."""
    live = peak = kept
    alive: set[int] = set()
    for event in sequence:
        if event >= 0:
            assert event not in alive
            alive.add(event)
            live += sizes[event]
        elif ~event in alive:
            alive.discard(~event)
            live -= sizes[~event]
        peak = max(peak, live)
    assert not alive
    return peak
