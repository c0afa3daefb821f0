"""What fits: the search alone, the search on real traces, and the answer measured on real tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fit import CONFIGURATIONS, MODELS, check_row, setup_of
from groupsearch.documents.rows import FitRow, Timing
from groupsearch.engine.loading import batch_quantile
from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.fit import (
    BATCH,
    Room,
    Sizes,
    fit_rows,
    largest_expected,
    largest_within,
    measured_batches,
    rate,
    summarise,
    with_rate,
)
from groupsearch.plan.grouping import Grouping, fewest_groups
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import floor_bytes
from groupsearch.plan.trace import Trace
from groupsearch.tracer import trace_model
from groupsearch.units import parse_bytes
from groupsearch.verify import Setup
from groupsearch.workloads import load_workload

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F
from groupsearch.workloads import Workload

def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def batch(size=6):
    return {"x": torch.randn(size, 4), "y": torch.zeros(size, dtype=torch.int64)}

def blocks(batch_size=16):
    def block():
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU())

    layers = [nn.Linear(4, 32), *(block() for _ in range(4)), nn.Linear(32, 3)]
    return nn.Sequential(*layers), batch(batch_size), loss

def linear(batch_size=1):
    return nn.Linear(4, 3), batch(batch_size), loss

def fixed_triple(batch_size=16):
    return nn.Linear(4, 3), batch(), loss

class Fixed(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(6, 4))

def fixed_model():
    return Fixed(4, 3), batch(), loss

def fixed_batch():
    return Workload("", lambda seed=0: nn.Linear(4, 3), lambda size: batch(), loss, batch_size=6)
"""
MEMORY = parse_bytes("256KiB")
LINES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5000)), min_size=1, max_size=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 10 linear layers, 8 of them in blocks, quick to trace, whose groupings differ much."""
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(FACTORIES)
    return f"{path}:blocks"


@pytest.fixture(scope="module")
def sizes(model: str) -> Sizes:
    return Sizes(Setup(model, {BATCH: 16}, optimizer="sgd", checkpoint="blocks"))


@pytest.fixture(scope="module")
def rows(sizes: Sizes) -> list[dict[str, Any]]:
    return list(fit_rows(sizes, Room(MEMORY, margin=0)))


@pytest.fixture(scope="module")
def fresh_trace(model: str) -> Callable[[int], Trace]:
    """What :class:`Sizes` does not see: traces from the library's own functions."""
    workload = load_workload(model)

    @cache
    def trace(batch_size: int) -> Trace:
        batch = workload.make_batch(batch_size)
        return trace_model(workload.build(), batch, workload.loss, optimizer="sgd", checkpoint="blocks")

    return trace


# The search alone


@given(lines=LINES, jumps=st.dictionaries(st.integers(1, 900), st.integers(0, 10**5), max_size=3))
def test_the_largest_size_of_any_rising_peak_is_found(lines: list[tuple[int, int]], jumps: dict[int, int]) -> None:
    def peak(size: int) -> float:
        return max(a + b * size for a, b in lines) + sum(by for at, by in jumps.items() if size >= at)

    for budget in (0, 1000, 300_000, 2_000_000):
        expected = max((size for size in range(1, 1001) if peak(size) <= budget), default=0)
        assert largest_within(peak, budget, 1000, known=(16,)) == expected


@given(values=st.lists(st.integers(0, 20) | st.just(math.inf), min_size=1, max_size=60), start=st.integers(1, 80))
def test_what_is_named_fits_and_one_more_does_not_whatever_the_peaks(values: list[float], start: int) -> None:
    asked = []

    def peak(size: int) -> float:
        asked.append(size)
        return values[size - 1]

    found = largest_within(peak, 10, len(values), known=(start,))
    assert found == 0 or (values[found - 1] <= 10 and found in asked)
    assert found == len(values) or (values[found] > 10 and found + 1 in asked)
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("peak", "budget", "most"),
    [
        pytest.param(lambda size: 5e8 + 3e6 * size, 5.9e9, 5, id="line"),
        pytest.param(lambda size: max(5e8 + 3e6 * size, 1e8 + 4e6 * size), 5.9e9, 8, id="two moments"),
        pytest.param(lambda size: 5e8 + 1e3 * size * size, 5.9e9, 16, id="square"),
        pytest.param(lambda size: 5e8 + 3e8 * math.sqrt(size), 5.9e9, 16, id="root"),
        pytest.param(lambda size: 5e8 + 1e8 * (size > 777), 5.5e8, 20, id="cliff"),
    ],
)
def test_few_questions_are_asked(peak: Any, budget: float, most: int) -> None:
    asked: list[int] = []
    found = largest_within(lambda size: asked.append(size) or peak(size), budget, 65536, (16,))
    assert peak(found) <= budget < peak(found + 1)
    assert len(asked) <= most, asked


@pytest.mark.parametrize("population", [None, 60, 2000, 50_000])
@pytest.mark.parametrize("batch_size", [1, 5, 21, 50, 1098])
def test_an_expected_batch_is_the_largest_whose_quantile_fits(batch_size: int, population: int | None) -> None:
    size = population or 10**9
    expected = largest_expected(batch_size, population)
    assert expected <= size
    assert expected == 0 or batch_quantile(size, expected / size, 0.999) <= batch_size
    assert expected == size or batch_quantile(size, (expected + 1) / size, 0.999) > batch_size


# On traces


def test_every_row_fits_and_one_more_does_not(rows: list[dict[str, Any]], fresh_trace: Callable[[int], Trace]) -> None:
    assert [row.grouping for row in rows][:4] == ["non-private", "best", "all-layer", "layer-wise"]
    assert len({row.size for row in rows}) > 3, "groupings make no difference here"
    for row in rows:
        for batch_size, told_bytes in ((row.size, row.peak_bytes), (row.size + 1, row.next_peak_bytes)):
            trace = fresh_trace(batch_size)
            peak = trace.nonprivate_peak_bytes
            if row.grouping == "best":
                peak = floor_bytes(trace) if batch_size > row.size else peak_memory(trace, row.boundaries).peak_bytes
            elif row.grouping != "non-private":
                peak = peak_memory(trace, Grouping.parse(trace, row.grouping)).peak_bytes
            assert told_bytes == peak
        assert row.peak_bytes <= MEMORY < row.next_peak_bytes
        assert row.limited_by == "memory"


def test_the_best_row_is_the_largest_batch_of_any_grouping_with_the_fewest_groups(
    rows: list[dict[str, Any]], fresh_trace: Callable[[int], Trace]
) -> None:
    best = rows[1]
    assert best.size == max(row.size for row in rows[1:])
    assert best.boundaries == fewest_groups(fresh_trace(best.size), MEMORY).boundaries
    assert rows[-1].grouping == f"best:{best.groups}"
    assert rows[-1].size == best.size


def test_groupings_are_those_of_the_batch_that_is_named(
    rows: list[dict[str, Any]], fresh_trace: Callable[[int], Trace]
) -> None:
    for row in rows[2:]:
        assert row.boundaries == Grouping.parse(fresh_trace(row.size), row.grouping).boundaries


def test_a_margin_is_held_back(sizes: Sizes, rows: list[dict[str, Any]]) -> None:
    held = next(fit_rows(sizes, Room(MEMORY, margin=0.1)))
    assert held.size < rows[0].size
    assert held.peak_bytes <= 0.9 * MEMORY < held.next_peak_bytes


def test_only_the_groupings_asked_for_are_added(sizes: Sizes) -> None:
    found = [row.grouping for row in fit_rows(sizes, Room(MEMORY), ["uniform:2", "all-layer"])]
    assert found == ["non-private", "best", "all-layer", "uniform:2"]


def test_every_size_is_traced_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, trace = [], Setup.trace
    monkeypatch.setattr(Setup, "trace", lambda setup: taken.append(setup.loaded.batch_size) or trace(setup))
    sizes = Sizes(Setup(model, {BATCH: 16}, optimizer="sgd"))
    assert list(fit_rows(sizes, Room(MEMORY), ["uniform:2", "3"]))
    assert sorted(taken) == list(sizes.traced)
    assert len(taken) <= 16


def test_a_memory_below_the_weights_is_refused_with_what_is_needed(
    sizes: Sizes, fresh_trace: Callable[[int], Trace]
) -> None:
    with pytest.raises(BudgetError, match=r"at least .*KiB.*weights.*found 8\.00 KiB"):
        list(fit_rows(sizes, Room(8 * 1024)))
    needed = floor_bytes(fresh_trace(1))
    assert list(fit_rows(sizes, Room(needed, margin=0)))[1].size == 1


def test_what_fits_nothing_has_a_row_that_says_so(sizes: Sizes, fresh_trace: Callable[[int], Trace]) -> None:
    trace = fresh_trace(1)
    least, most = sorted((trace.nonprivate_peak_bytes, floor_bytes(trace)))
    assert least < most
    rows = list(fit_rows(sizes, Room(least, margin=0), ["all-layer"]))
    nothing = rows[1:] if least == trace.nonprivate_peak_bytes else rows[:1]
    assert {row.size for row in rows if row not in nothing} == {1}
    for row in nothing:
        assert (row.size, row.peak_bytes, row.boundaries) == (0, None, None)
        assert row.next_peak_bytes > least


def test_the_limit_of_the_search_is_reached_and_said(sizes: Sizes) -> None:
    rows = list(fit_rows(sizes, Room(2**40, limit=64), ["layer-wise"]))
    assert {(row.size, row.limited_by, row.next_peak_bytes) for row in rows} == {(64, "limit", None)}
    assert "at least 64" in summarise(rows)
    with pytest.raises(GroupSearchError, match="no more than 4"):
        list(fit_rows(sizes, Room(2**40, limit=4)))


def test_the_longest_sequence_is_found_and_so_is_the_end_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATIONS["gpt2"] | {"n_layer": 1}))
    sizes = Sizes(Setup(f"hf:{tmp_path}", {BATCH: 2, "sequence_length": 16}), "sequence_length")
    most = CONFIGURATIONS["gpt2"]["n_positions"]
    assert next(fit_rows(sizes, Room(2**34))).size == most
    memory = Room(int(sizes.peak("all-layer", 40)), margin=0)
    plain, best, whole = list(fit_rows(sizes, memory, ["all-layer"]))
    assert 40 == whole.size <= best.size < most
    assert plain.batch_size == 2
    assert plain.limited_by == "memory"
    row = next(fit_rows(sizes, Room(2**34)))
    assert row.limited_by == "model"
    assert str(most) in sizes.refused[most + 1]


@pytest.mark.parametrize("name", ["fixed_model", "fixed_batch", "fixed_triple"])
def test_a_model_without_batches_of_any_size_is_refused(name: str, model: str) -> None:
    with pytest.raises(GroupSearchError, match="any size"):
        list(fit_rows(Sizes(Setup(model.replace("blocks", name), {BATCH: 6})), Room(2**20)))


# Poisson sampling and sentences


def test_a_sampling_rate_says_in_how_many_pieces_batches_are_taken(sizes: Sizes) -> None:
    room = Room(MEMORY, population=1437, sampling_rate=0.2)
    assert room.quantile_batch_size == batch_quantile(1437, 0.2, 0.999)
    for row in fit_rows(sizes, room, ["layer-wise"]):
        if row.grouping == "non-private":
            assert row.pieces is None
            continue
        assert row.pieces == (math.ceil(287.4 / row.size), math.ceil(room.quantile_batch_size / row.size))


@pytest.mark.parametrize(
    "wrong", [{"margin": 1.0}, {"sampling_rate": 0.1}, {"population": 10, "sampling_rate": 1.5}], ids=str
)
def test_a_room_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GroupSearchError, match=r"[Ee]xpected"):
        Room(2**20, **wrong)


def told(*found: tuple[str, int | None, int]) -> str:
    return summarise([fit_row(grouping, groups, size) for grouping, groups, size in found])


def fit_row(grouping: str, groups: int | None, size: int) -> FitRow:
    return FitRow(
        grouping=grouping,
        boundaries=() if groups == 1 else None,
        groups=groups,
        size=size,
        batch_size=size,
        expected_batch_size=None,
        pieces=None,
        peak_bytes=None,
        next_peak_bytes=None,
        limited_by="memory",
    )


def test_a_sentence_says_what_privacy_costs_and_what_grouping_buys_back() -> None:
    start = (("non-private", None, 400), ("best", 8, 400), ("all-layer", 1, 100))
    assert told(*start) == (
        "Non-private training fits a batch of 400, private training with one group 100 (0.25x); "
        "8 groups 400 (1.00x), the most that any grouping fits."
    )
    assert "; 3 well-placed groups fit 370 (0.93x), 8 groups" in told(*start, ("best:2", 2, 300), ("best:3", 3, 370))
    assert told(start[0], ("best", 1, 100), start[2]).endswith("100 (0.25x); no grouping fits more.")
    assert "a batch of 0, private training with one group 0;" in told(("", None, 0), ("best", 2, 1), ("", 1, 0))


# Measured


@pytest.mark.parametrize("batch_size", [2, 9])
def test_rates_come_from_two_measured_batches(batch_size: int, model: str) -> None:
    sizes = Sizes(Setup(model, {BATCH: batch_size}, optimizer="sgd"))
    trace = sizes.first
    row = with_rate(fit_row("all-layer", 1, batch_size), sizes)
    (one, first), (two, second) = [(timing.batch_size, timing.step_seconds) for timing in row.timings]
    assert (one, two) == measured_batches(batch_size)
    seconds = batch_size / row.examples_per_second.value
    assert row.examples_per_second.source == ("measured" if batch_size == 2 else "predicted")
    line = first + (batch_size - one) * (second - first) / (two - one)
    assert seconds == pytest.approx(max(line, first, second) if batch_size > 2 else second)
    if batch_size == 2:
        assert row.timings[1].peak_bytes == pytest.approx(peak_memory(trace, ()).peak_bytes, rel=0.01)


def test_a_step_is_of_all_its_micro_batches() -> None:
    timings = [Timing(batch_size=2 * k, peak_bytes=1, step_seconds=float(k), metric="allocated") for k in (1, 2)]
    assert rate(timings, 8).value == 8 / 4
    assert rate(timings, 8, micro_batches=3).value == 3 * 8 / 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpoint"), [("digits-vit", "blocks"), ("gpt2", "none")])
def test_what_fits_is_measured_to_fit_and_five_percent_more_is_not(name: str, checkpoint: str, tmp_path: Path) -> None:
    sizes, room = Sizes(setup_of(name, checkpoint, tmp_path)), Room(parse_bytes(MODELS[name]))
    rows = {row.grouping: row for row in fit_rows(sizes, room, ["all-layer"])}
    for grouping in ("best", "all-layer") if name == "digits-vit" else ("non-private",):
        checked = check_row(sizes, room, rows[grouping])
        assert checked["within"], checked
        assert not checked["larger_within"], checked
