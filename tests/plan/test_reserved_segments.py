"""The model of torch's caching allocator against sequences worked out by hand from its rules."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.plan.reserved import KIB, MIB, Block, CachingAllocator, NoRoomError, Rules

PLAIN = Rules()
EXPANDABLE = Rules(expandable=True)
UNSPLIT = Rules(max_split_bytes=32 * MIB)


def of_card(mib: int, **settings: object) -> Rules:
    """The rules of a card with so much memory."""
    return Rules(capacity_bytes=mib * MIB, **settings)  # type: ignore[arg-type]


class Run:
    """An allocator that is told to go through a sequence of requests: a size under a name, or a name to free."""

    def __init__(self, rules: Rules, *steps: object) -> None:
        self.allocator, self.blocks = CachingAllocator(rules), {}
        for step in steps:
            self.do(step)

    def do(self, step: object) -> Block | None:
        """Allocate for ``(name, bytes)``, free for ``name``."""
        if isinstance(step, str):
            self.allocator.free(self.blocks.pop(step))
            return None
        name, size = step  # type: ignore[misc]
        self.blocks[name] = self.allocator.allocate(int(size))
        return self.blocks[name]

    @property
    def held(self) -> tuple[int, int]:
        """Allocated and reserved bytes."""
        return self.allocator.allocated_bytes, self.allocator.reserved_bytes


# (reasoning, rules, steps, allocated, reserved): every number follows from the rule named, by hand.
SEQUENCES = [
    ("nothing is handed out for zero bytes", PLAIN, [("a", 0)], 0, 0),
    ("one byte takes 512 of a small segment of 2 MiB", PLAIN, [("a", 1)], 512, 2 * MIB),
    ("513 bytes take 1024", PLAIN, [("a", 513)], 1024, 2 * MIB),
    ("1 MiB is still small: 2 MiB are reserved, the other half is free", PLAIN, [("a", MIB)], MIB, 2 * MIB),
    ("two of 1 MiB share one small segment", PLAIN, [("a", MIB), ("b", MIB)], 2 * MIB, 2 * MIB),
    ("a third needs a second one", PLAIN, [("a", MIB), ("b", MIB), ("c", 1)], 2 * MIB + 512, 4 * MIB),
    ("one byte above 1 MiB is rounded up and large: 20 MiB", PLAIN, [("a", MIB + 1)], MIB + 512, 20 * MIB),
    ("9.5 MiB come from a segment of 20 MiB", PLAIN, [("a", 9.5 * MIB)], int(9.5 * MIB), 20 * MIB),
    ("10 MiB have a segment of their own", PLAIN, [("a", 10 * MIB)], 10 * MIB, 10 * MIB),
    (
        "11 MiB: a segment of 12, 1 MiB left is not more than 1 MiB: unsplit",
        PLAIN,
        [("a", 11 * MIB)],
        12 * MIB,
        12 * MIB,
    ),
    (
        "10.5 MiB: a segment of 12, 1.5 MiB left are split off, and serve a request of 1.25 MiB whole",
        PLAIN,
        [("a", 10.5 * MIB), ("b", 1.25 * MIB)],
        12 * MIB,
        12 * MIB,
    ),
    (
        "two of 9.5 MiB leave 1 MiB in 20: the second block keeps it",
        PLAIN,
        [("a", 9.5 * MIB), ("b", 9.5 * MIB)],
        20 * MIB,
        20 * MIB,
    ),
    ("a freed block stays reserved", PLAIN, [("a", 30 * MIB), "a"], 0, 30 * MIB),
    (
        "and is taken again by a smaller request, split",
        PLAIN,
        [("a", 30 * MIB), "a", ("b", 20 * MIB)],
        20 * MIB,
        30 * MIB,
    ),
    (
        "the smallest block that fits is taken: of 30 and 24 the 24, so that 30 still find room",
        PLAIN,
        [("a", 30 * MIB), ("b", 24 * MIB), "a", "b", ("c", 22 * MIB), ("d", 30 * MIB)],
        52 * MIB,
        54 * MIB,
    ),
    (
        "of two of one size that at the lower address: both free, b of 24 splits a's, so b's neighbour stays whole",
        PLAIN,
        [("a", 24 * MIB), ("b", 24 * MIB), "b", "a", ("c", 12 * MIB), ("d", 24 * MIB)],
        36 * MIB,
        48 * MIB,
    ),
    (
        "free neighbours of one segment merge, after and before: 8 + 6 + 6 MiB freed serve 20",
        PLAIN,
        [("a", 8 * MIB), ("b", 6 * MIB), ("c", 6 * MIB), "a", "c", "b", ("d", 20 * MIB)],
        20 * MIB,
        20 * MIB,
    ),
    (
        "blocks of different segments never merge: two of 10 MiB do not serve 20",
        PLAIN,
        [("a", 10 * MIB), ("b", 10 * MIB), "a", "b", ("c", 20 * MIB)],
        20 * MIB,
        40 * MIB,
    ),
    (
        "a hole between two that live serves nothing larger",
        PLAIN,
        [("a", 6 * MIB), ("b", 6 * MIB), ("c", 8 * MIB), "b", ("d", 7 * MIB)],
        21 * MIB,
        40 * MIB,
    ),
    (
        "the pools do not mix: a free large segment serves no small request",
        PLAIN,
        [("a", 20 * MIB), "a", ("b", 512)],
        512,
        22 * MIB,
    ),
    (
        "in the small pool even 512 bytes are split off",
        PLAIN,
        [("a", MIB), ("b", MIB - 512), ("c", 512)],
        2 * MIB,
        2 * MIB,
    ),
    (
        "no room for a segment of 30 MiB beside one of 24: that one, which nothing uses, is given back first",
        of_card(40),
        [("a", 24 * MIB), "a", ("c", 30 * MIB)],
        30 * MIB,
        30 * MIB,
    ),
    (
        "a segment of which a part lives is not given back, only that of 24: 20 + 28 of 50 MiB",
        of_card(50),
        [("a", 4 * MIB), ("b", 24 * MIB), "b", ("c", 28 * MIB)],
        32 * MIB,
        48 * MIB,
    ),
    (
        "with max_split_size 32 MiB a block of 40 is not given for 20",
        UNSPLIT,
        [("a", 40 * MIB), "a", ("b", 20 * MIB)],
        20 * MIB,
        60 * MIB,
    ),
    (
        "nor split for 36, which may keep up to 20 MiB more than asked for",
        UNSPLIT,
        [("a", 40 * MIB), "a", ("b", 36 * MIB)],
        40 * MIB,
        40 * MIB,
    ),
    (
        "but not 20 MiB more: 60 is not given for 40",
        UNSPLIT,
        [("a", 60 * MIB), "a", ("b", 40 * MIB)],
        40 * MIB,
        100 * MIB,
    ),
    (
        "without room an oversized block that is enough goes first, and no more: 40 of 24, 40 and 64",
        of_card(150, max_split_bytes=32 * MIB),
        [("a", 24 * MIB), ("b", 40 * MIB), ("c", 64 * MIB), "a", "b", "c", ("d", 34 * MIB), ("e", 36 * MIB)],
        76 * MIB,  # d has the whole block of 40; e is not given that of 64, which goes
        100 * MIB,
    ),
    (
        "of none that is enough the largest few: 34 and 36 for 60, while 24 stays",
        of_card(100, max_split_bytes=32 * MIB),
        [("a", 24 * MIB), ("b", 34 * MIB), ("c", 36 * MIB), "a", "b", "c", ("d", 60 * MIB)],
        60 * MIB,
        84 * MIB,
    ),
    ("4 steps between powers of two: 9 MiB become 10", Rules(divisions=4), [("a", 9 * MIB)], 10 * MIB, 10 * MIB),
    ("a power of two stays", Rules(divisions=4), [("a", 8 * MIB)], 8 * MIB, 20 * MIB),
    ("2048 bytes and less are rounded to 512 with 4 steps", Rules(divisions=4), [("a", 1100)], 1536, 2 * MIB),
    ("expandable: the large arena grows by 20 MiB", EXPANDABLE, [("a", 24 * MIB)], 24 * MIB, 40 * MIB),
    ("and 16 MiB left of the last page serve 16", EXPANDABLE, [("a", 24 * MIB), ("b", 16 * MIB)], 40 * MIB, 40 * MIB),
    (
        "even 512 bytes are split off a large block",
        EXPANDABLE,
        [("a", 20 * MIB - 512), ("b", MIB + 512)],
        21 * MIB,
        40 * MIB,
    ),
    (
        "a free end grows by what lacks: 20 MiB freed at the end of 40 and 10 more pages' worth for 30",
        EXPANDABLE,
        [("a", 20 * MIB), ("b", 20 * MIB), "b", ("c", 30 * MIB)],
        50 * MIB,
        60 * MIB,
    ),
    (
        "the block that can grow least is taken: the hole of 20, not the end of 10",
        EXPANDABLE,
        [("a", 20 * MIB), ("b", 10 * MIB), "a", ("c", 8 * MIB), ("d", 12 * MIB), ("e", 10 * MIB)],
        40 * MIB,
        40 * MIB,
    ),
    ("the small arena grows by 2 MiB", EXPANDABLE, [("a", MIB), ("b", MIB), ("c", 1)], 2 * MIB + 512, 4 * MIB),
    (
        "without room free pages are given back from within: of 60 MiB the middle 20",
        of_card(80, expandable=True),
        [("a", 20 * MIB), ("b", 20 * MIB), ("c", 20 * MIB), "b", ("d", 30 * MIB)],
        70 * MIB,
        80 * MIB,
    ),
    (
        "pages that something else lives on stay: of a hole of 30 MiB 20, and the other 10 serve 10",
        of_card(80, expandable=True),
        [("a", 20 * MIB), ("b", 30 * MIB), ("c", 10 * MIB), "b", ("d", 35 * MIB), ("e", 10 * MIB)],
        75 * MIB,
        80 * MIB,
    ),
    (
        "pages given back are mapped again where they lie: 18 of the hole's 20 MiB",
        of_card(80, expandable=True),
        [
            ("a", 20 * MIB),
            ("b", 20 * MIB),
            ("c", 20 * MIB),
            "b",
            ("d", 30 * MIB),
            "d",
            ("e", 38 * MIB),
            "c",
            ("f", 18 * MIB),
        ],
        76 * MIB,
        80 * MIB,
    ),
]


@pytest.mark.parametrize(
    ("reasoning", "rules", "steps", "allocated", "reserved"), SEQUENCES, ids=[s[0] for s in SEQUENCES]
)
def test_a_sequence_holds_what_the_rules_say(reasoning, rules, steps, allocated, reserved):
    assert Run(rules, *steps).held == (allocated, reserved)


def test_peaks_and_retries_are_counted():
    run = Run(of_card(40), ("a", 24 * MIB), "a", ("b", 30 * MIB), "b", ("c", 2 * MIB))

    assert run.held == (2 * MIB, 30 * MIB)
    assert (run.allocator.peak_allocated_bytes, run.allocator.peak_reserved_bytes) == (30 * MIB, 30 * MIB)
    assert run.allocator.retries == 1


@pytest.mark.parametrize("rules", [of_card(40), of_card(40, expandable=True), of_card(40, max_split_bytes=32 * MIB)])
def test_what_a_card_has_no_room_for_is_refused_and_changes_nothing(rules):
    run = Run(rules, ("a", 24 * MIB))

    with pytest.raises(NoRoomError, match="no room for 33554432 bytes beside 25165824"):
        run.do(("b", 32 * MIB))
    assert run.held[0] == 24 * MIB
    run.do("a")
    run.do(("b", 32 * MIB))
    assert run.held[0] == 32 * MIB


def test_settings_are_read_as_torch_reads_them():
    text = "expandable_segments:True, max_split_size_mb:64,roundup_power2_divisions:4,garbage_collection_threshold:0.8"

    assert Rules.of_environment({"PYTORCH_CUDA_ALLOC_CONF": text}) == Rules(True, 64 * MIB, 4)
    assert Rules.of_environment({}) == Rules()
    with pytest.raises(GroupSearchError, match="whole numbers"):
        Rules.of_environment({"PYTORCH_ALLOC_CONF": "max_split_size_mb:many"})


class Naive:
    """The same rules, scanning every segment for every request; neither expandable nor with a limit."""

    def __init__(self, capacity: int) -> None:
        self.segments: list[list[list[object]]] = []  # of [size, name or None], in order of address
        self.capacity = capacity

    @property
    def held(self) -> tuple[int, int]:
        blocks = [block for segment in self.segments for block in segment]
        return sum(size for size, name in blocks if name), sum(size for size, _ in blocks)

    def allocate(self, name: str, request: int) -> bool:
        size = -(-request // 512) * 512
        small = size <= MIB
        whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        free = [
            (block[0], number, place)
            for number, segment in enumerate(self.segments)
            for place, block in enumerate(segment)
            if block[1] is None and block[0] >= size and (sum(b[0] for b in segment) == 2 * MIB) is small
        ]
        if not free:
            if self.held[1] + whole > self.capacity:
                self.segments = [segment for segment in self.segments if len(segment) > 1 or segment[0][1]]
            if self.held[1] + whole > self.capacity:
                return False
            self.segments.append([[whole, None]])
            free = [(whole, len(self.segments) - 1, 0)]
        found, number, place = min(free)
        if found - size >= (512 if small else MIB + 1):
            self.segments[number][place : place + 1] = [[size, name], [found - size, None]]
        else:
            self.segments[number][place][1] = name
        return True

    def free(self, name: str) -> None:
        for segment in self.segments:
            for block in segment:
                if block[1] == name:
                    block[1] = None
            merged: list[list[object]] = []
            for size, owner in segment:
                if merged and owner is None and merged[-1][1] is None:
                    merged[-1][0] += size
                else:
                    merged.append([size, owner])
            segment[:] = merged


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_holds_what_scanning_every_segment_finds(seed):
    random, run, naive = Random(seed), Run(of_card(300)), Naive(300 * MIB)
    kinds = (lambda: random.randint(1, 3 * KIB), lambda: random.randint(1, MIB), lambda: random.randint(MIB, 30 * MIB))
    refused = 0
    for step in range(600):
        if run.blocks and random.random() < 0.48:
            name = random.choice(sorted(run.blocks))
            run.do(name)
            naive.free(name)
        else:
            name, size = f"block {step}", random.choice(kinds)()
            try:
                run.do((name, size))
            except NoRoomError:
                refused += 1
                assert not naive.allocate(name, size)
            else:
                assert naive.allocate(name, size)
        assert run.held == naive.held
    assert run.allocator.retries
    assert refused < 300


@pytest.mark.parametrize("seed", range(3))
def test_an_expandable_arena_holds_the_pages_of_what_lives(seed):
    random, run = Random(seed), Run(EXPANDABLE)
    for step in range(400):
        if run.blocks and random.random() < 0.5:
            run.do(random.choice(sorted(run.blocks)))
        else:
            run.do((f"block {step}", random.randint(1, 30 * MIB)))
        allocated, reserved = run.held
        assert allocated == sum(block.size for block in run.blocks.values())
        assert reserved >= allocated
    spans = sorted((block.address, block.address + block.size) for block in run.blocks.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for name in list(run.blocks):
        run.do(name)
    whole = run.allocator.reserved_bytes
    run.do(("all", whole - 30 * MIB if whole > 60 * MIB else 2 * MIB))
    assert run.allocator.reserved_bytes == whole  # everything merged again
