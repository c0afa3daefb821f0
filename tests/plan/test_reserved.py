"""A step's births and deaths, put in the order of any grouping and replayed: against the closed form and the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.plan.reserved import MIB, NoRoomError, Rules, replay_memory
from groupsearch.plan.trace import Close, StepEvents, Trace
from groupsearch.tracer.record import step_events
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import StepSettings, fake_stage, made_private

WORKLOADS = {
    "digits-vit, blocks checkpointed": ("digits-vit", {"blocks": 2}, {"checkpoint": "blocks"}),
    "stdlib-gpt, foreach, two micro-batches": (
        "stdlib-gpt",
        {"blocks": 2},
        {"optimizer": "adam:foreach", "micro_batches": 2},
    ),
}


@pytest.fixture(scope="module", params=WORKLOADS.values(), ids=WORKLOADS)
def traced(request):
    """(workload, its step's settings, its trace)."""
    name, settings, how = request.param
    workload = gs.load_workload(name, **settings)
    batch = workload.make_batch(workload.batch_size)
    with torch.device("meta"):
        model = workload.build()
    return workload, how, gs.trace_model(model, batch, workload.loss, **how)


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


def groupings(trace: Trace) -> list[tuple[int, ...]]:
    """All-layer, layer-wise, block-wise and three at random."""
    random, inner = Random(0), range(1, trace.length)
    some = [tuple(sorted(random.sample(inner, k))) for k in (1, 3, trace.length // 2)]
    return [(), trace.layer_boundaries, trace.block_boundaries, *some]


def reordered(trace: Trace, boundaries: Sequence[int] | None) -> int:
    """The peak of what tensors take, from the events alone."""
    events = trace.events
    assert events is not None
    terms = [(c.early, c.late, len(events.sizes) + n) for n, c in enumerate(trace.cross_terms)]
    sizes = (*events.sizes, *(c.transient_bytes for c in trace.cross_terms))
    sequence = events.ungrouped() if boundaries is None else events.grouped(boundaries, terms)
    return live_peak(sizes, sequence, sum(events.kept))


def test_the_events_of_any_grouping_peak_where_the_closed_form_says(traced):
    _, _, trace = traced

    assert reordered(trace, None) == trace.nonprivate_peak_bytes
    for boundaries in groupings(trace):
        assert reordered(trace, boundaries) == gs.peak_memory(trace, boundaries).peak_bytes


def of_the_engine(workload, how, trace, boundaries) -> Trace:
    """A trace whose non-private step is the engine's own with a grouping."""
    settings, batch = StepSettings(**how), workload.make_batch(workload.batch_size)
    fake, stage = fake_stage(workload.model, batch, workload.loss, settings, cpu_scratch)
    grouping = gs.Grouping.from_boundaries(trace, boundaries)
    with fake, made_private(stage, settings, grouping, workload.batch_size):
        stage.counted_step()
    return replace(trace, events=step_events(stage.live, [], len(stage.live.log)))


def test_a_grouping_is_replayed_as_the_engine_takes_its_step(traced):
    workload, how, trace = traced
    for boundaries in groupings(trace)[::4]:
        engine = of_the_engine(workload, how, trace, boundaries)
        for rules in (Rules(), Rules(expandable=True)):
            found, truth = replay_memory(trace, boundaries, rules), replay_memory(engine, None, rules)

            assert found.allocated_bytes == pytest.approx(truth.allocated_bytes, rel=2e-3)
            assert found.reserved_bytes == pytest.approx(truth.reserved_bytes, rel=0.05)


def test_what_is_allocated_is_what_tensors_take_and_what_blocks_leave_unused(traced):
    _, _, trace = traced
    for boundaries in (None, *groupings(trace)):
        asked = reordered(trace, boundaries)
        plain, expandable = (replay_memory(trace, boundaries, Rules(expandable=e)) for e in (False, True))
        if boundaries is not None:
            assert gs.replay_memory(trace, gs.Grouping.from_boundaries(trace, boundaries), Rules()) == plain

        for found in (plain, expandable):
            assert asked <= found.allocated_bytes <= found.reserved_bytes
        # what expandable segments round up is less than 512 bytes of every storage, here of many small ones
        assert expandable.allocated_bytes <= 1.005 * asked
        assert plain.allocated_bytes <= 1.1 * asked


def step(private: Sequence[int], *closes: Close, heirs=None, sizes=(MIB,) * 9) -> StepEvents:
    """A step by hand."""
    return StepEvents((), tuple(sizes), tuple(private), (), closes, heirs or {})


# Sites 1 and 0. 0: input of site 1; 1: of site 0; 2: a norm; 3: sums of site 1; 4: a norm; 5: sums of site 0.
TWO = step(
    [0, 1, 2, 3, ~2, ~0, 4, 5, ~4, ~1, ~3, ~5],
    Close(1, 3, 6, (0,)),
    Close(0, 7, 10, (1,)),
)


def test_closes_are_put_off_until_the_group_ends_and_the_book_lives_until_then():
    assert list(TWO.grouped((1,))) == list(TWO.private)
    # In one group: site 1's norm is given up at once, its sums are formed and its input dropped after site 0's norm.
    assert list(TWO.grouped(())) == [0, 1, 2, ~2, 4, 3, ~0, 5, ~4, ~1, ~3, ~5]


def test_what_autograd_lets_go_of_lives_as_long_as_the_book_holds_it():
    # 0 is booked by site 1 and freed by autograd after its close: in one group the close of site 0 comes first.
    events = step([0, 1, 2, ~0, 3, ~1, ~2, ~3], Close(1, 2, 3, (0,)), Close(0, 4, 6, (1,)))

    assert list(events.grouped((1,))) == list(events.private)
    assert list(events.grouped(())) == [0, 1, 2, ~0, 3, ~1, ~2, ~3]


def test_a_storage_that_two_sites_book_lives_until_both_are_consumed():
    events = step([0, 1, 2, 3, ~0, ~1, ~2, ~3], Close(1, 2, 3, (0,)), Close(0, 3, 6, (0, 1)))

    assert list(events.grouped(())) == [0, 1, 2, 3, ~0, ~1, ~2, ~3]


def test_memory_that_the_book_holds_is_not_added_to_in_place():
    # 4 is 0 with something added: in place where site 1 has been closed, in memory of its own while its book holds 0.
    events = step([0, 1, 2, 4, ~0, 3, ~1, ~4, ~2, ~3], Close(1, 2, 3, (0,)), Close(0, 5, 7, (1,)), heirs={4: 0})

    assert list(events.grouped((1,))) == [0, 1, 2, 3, ~1, ~0, ~2, ~3]
    assert list(events.grouped(())) == [0, 1, 4, 2, ~0, 3, ~1, ~4, ~2, ~3]


def test_two_sites_of_one_parameter_need_an_inner_product_where_they_share_a_group():
    assert 8 not in list(TWO.grouped((1,), [(1, 0, 8)]))
    told = list(TWO.grouped((), [(1, 0, 8)]))
    assert told[told.index(4) :][:3] == [4, 8, ~8]


def test_a_card_without_room_is_refused_and_one_with_just_enough_gives_back_what_is_cached(traced):
    _, _, trace = traced
    found = replay_memory(trace, (), Rules())
    tight = Rules(capacity_bytes=found.reserved_bytes - MIB)

    with pytest.raises(NoRoomError):
        replay_memory(trace, (), Rules(capacity_bytes=found.allocated_bytes // 2))
    try:
        assert replay_memory(trace, (), tight).reserved_bytes <= tight.capacity_bytes
    except NoRoomError:
        assert found.retries == 0


def test_a_document_does_not_hold_what_a_replay_needs(traced):
    _, _, trace = traced

    with pytest.raises(GroupSearchError, match="Trace the model again"):
        replay_memory(Trace.from_json(trace.to_json()), ())
