"""A search in rungs on a problem that is known exactly: what is believed, what it costs, and that it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, Outcome, Proxy, SearchSettings, Short, hypervolume, run_search, search_in_rungs
from groupsearch.search.candidates import worthiest
from tests.search.problem import Problem

FULL_STEPS, FRACTION = 100, 0.125


class Ladder:
    """Short and full runs of one problem, and a proxy of it, all of which remember what was asked."""

    def __init__(self, problem: Problem, short_noise: float = 0.004) -> None:
        self.problem, self.noisy = problem, replace(problem, noise=short_noise)
        self.made: list[tuple[str, Choice, int]] = []

    def full(self, choice: Choice, seed: int) -> Outcome:
        self.made.append(("full", choice, seed))
        return self.problem.evaluate(choice, seed)

    def short(self, choice: Choice, seed: int) -> Outcome:
        self.made.append(("short", choice, seed))
        found = self.noisy.evaluate(choice, seed + 1000)  # other noise than that of full runs
        return replace(found, value=found.value - 0.3, steps=round(FRACTION * FULL_STEPS))

    def good(self, choice: Choice) -> float:
        return 2 * self.problem.mean(choice.boundaries)

    def bad(self, choice: Choice) -> float:
        return -self.problem.mean(choice.boundaries)

    def random(self, choice: Choice) -> float:
        return float(np.random.default_rng([9, *choice.boundaries]).normal())

    def search(self, settings: SearchSettings, predict: Callable[[Choice], float | None] | None = None, **more):
        proxy = None if predict is None else Proxy(predict, seconds=0.5, steps=25, passes=6)
        short = Short(self.short, FRACTION, trials=24)
        return search_in_rungs(self.problem.trace, self.full, settings, proxy=proxy, short=short, **more)

    def asked(self, rung: str) -> list[Choice]:
        return list(dict.fromkeys(choice for name, choice, _ in self.made if name == rung))


SETTINGS = SearchSettings(trials=8, seeds=3)


@pytest.fixture
def ladder() -> Ladder:
    return Ladder(Problem(16, noise=0.002, shape="mixed"))


def test_what_is_run_in_full_are_the_references_and_the_best_of_the_short_runs(ladder: Ladder) -> None:
    result = ladder.search(SETTINGS)
    full = ladder.asked("full")
    assert len(ladder.asked("short")) == 24
    assert len(full) == 8
    assert set(full) < set(ladder.asked("short"))
    assert {"all-layer", "layer-wise", "uniform:4"} <= {c.source for c in result.candidates}
    assert {c.choice for c in result.candidates} == set(full)
    assert all(len(c.values) == 3 for c in result.front)
    assert result.rung == "full"
    assert [e.rung for e in result.evidence] == ["short", "full"]
    assert len(result.evidence[0].values) == 24


def test_costs_are_counted_in_full_trainings_and_add_up(ladder: Ladder) -> None:
    result = ladder.search(SETTINGS, ladder.good)
    rungs = {rung.name: rung for rung in result.cost.rungs}
    assert list(rungs) == ["proxy", "short", "full", "replication"]
    assert (rungs["proxy"].runs, rungs["proxy"].steps, rungs["proxy"].passes) == (0, 25, 6)
    assert rungs["proxy"].seconds > 0.5, "the time of asking it"
    assert (rungs["short"].runs, rungs["short"].steps) == (24, 24 * 12)
    assert rungs["short"].full_trainings == pytest.approx(24 * 12 / 100)
    assert (rungs["full"].runs, rungs["full"].full_trainings) == (8, 8)
    again = sum(len(c.values) - 1 for c in result.candidates)
    assert again >= 2 * len(result.front)
    assert rungs["replication"].runs == rungs["replication"].full_trainings == again
    made = Counter(rung for rung, _, _ in ladder.made)
    assert result.cost.trained == made["short"] + made["full"] == 24 + 8 + rungs["replication"].runs
    for part in ("seconds", "steps", "full_trainings"):
        assert getattr(result.cost, part) == pytest.approx(sum(getattr(rung, part) for rung in result.cost.rungs))


def test_a_proxy_that_predicts_chooses_and_is_reported(ladder: Ladder) -> None:
    ladder.search(SETTINGS)
    with_proxy = Ladder(ladder.problem)
    result = with_proxy.search(SETTINGS, with_proxy.good)
    chosen = set(with_proxy.asked("short")) - set(ladder.asked("short"))
    assert chosen, "nothing was chosen by the proxy"
    first = result.agreements[0]
    assert (first.lower, first.upper, first.used) == ("proxy", "short", True)
    assert first.correlation.predicts
    assert first.correlation.count == 14, "measured before anything was chosen by it, over three in five"
    assert chosen.isdisjoint(with_proxy.asked("short")[:14])
    assert [(a.lower, a.upper) for a in result.agreements] == [
        ("proxy", "short"),
        ("proxy", "short"),
        ("proxy", "full"),
        ("short", "full"),
    ]
    assert [a.correlation.count for a in result.agreements[1:]] == [24, 8, 8]
    assert "further ones were chosen by it" in first.statement


def test_a_proxy_that_knows_the_truth_makes_searches_better() -> None:
    gained = 0.0
    for seed in range(6):
        problem = Problem(16, noise=0.002, shape="mixed", trace_seed=seed)
        ladder, with_proxy = Ladder(problem), Ladder(problem)
        ladder.search(SETTINGS)
        with_proxy.search(SETTINGS, with_proxy.good)
        reference = (0.0, float(peaks(problem.trace, [()])[0]) + 1)
        volumes = []
        for searched in (with_proxy, ladder):
            found = [choice.boundaries for choice in searched.asked("short")]
            points = zip(map(problem.mean, found), map(float, peaks(problem.trace, found)), strict=True)
            volumes.append(hypervolume(list(points), reference))
        gained += volumes[0] / volumes[1] - 1
    assert gained > 0


@pytest.mark.parametrize("kind", ["bad", "random"])
def test_a_proxy_that_does_not_predict_is_dropped_and_that_is_said(ladder: Ladder, kind: str) -> None:
    ladder.search(SETTINGS)
    misled = Ladder(ladder.problem)
    result = misled.search(SETTINGS, getattr(misled, kind))
    assert misled.made == ladder.made, "what it said had a part in what was run"
    first = result.agreements[0]
    assert (first.correlation.predicts, first.used) == (False, False)
    assert "it was not used, and further groupings came from short runs alone" in first.statement
    assert result.to_json()["correlations"][0]["statement"] == first.statement
    if kind == "bad":
        assert first.correlation.value < -0.9


def test_a_proxy_above_full_runs_is_judged_by_them(ladder: Ladder) -> None:
    for predict, used in ((ladder.good, True), (ladder.bad, False)):
        result = search_in_rungs(ladder.problem.trace, ladder.full, replace(SETTINGS, trials=24), proxy=Proxy(predict))
        assert (result.agreements[0].upper, result.agreements[0].used) == ("full", used)
        assert [rung.name for rung in result.cost.rungs] == ["proxy", "full", "replication"]


def test_full_runs_alone_are_a_search_as_it_was(ladder: Ladder) -> None:
    plain = run_search(ladder.problem.trace, ladder.problem.evaluate, SETTINGS)
    result = search_in_rungs(ladder.problem.trace, ladder.full, SETTINGS)
    assert result.candidates == plain.candidates
    assert not result.agreements
    assert (result.cost.trained, result.cost.full_trainings) == (plain.cost.trained, plain.cost.full_trainings)


def test_choices_that_the_proxy_cannot_tell_are_left_to_the_runs(ladder: Ladder) -> None:
    settings = replace(SETTINGS, allocations=("uniform", "adaptive"))
    result = ladder.search(settings, lambda choice: None if choice.allocation == "adaptive" else ladder.good(choice))
    assert result.agreements[0].correlation.predicts
    assert all(choice.allocation == "uniform" for choice in result.evidence[0].values)
    assert any(choice.allocation == "adaptive" for choice in result.evidence[1].values)


def test_the_same_seed_asks_for_the_same_runs_in_the_same_order(ladder: Ladder) -> None:
    other = Ladder(ladder.problem)
    ladder.search(SETTINGS, ladder.good)
    other.search(SETTINGS, other.good)
    assert ladder.made == other.made


def test_events_name_the_rung(ladder: Ladder) -> None:
    events = []
    ladder.search(SETTINGS, ladder.good, on_event=events.append)
    trained = Counter(event.phase for event in events if event.kind == "trained")
    assert trained == Counter("replication" if s else r for r, _, s in ladder.made)
    assert list(dict.fromkeys(event.phase for event in events)) == ["short", "full", "replication"]


def test_a_short_run_that_fails_is_not_run_in_full(ladder: Ladder) -> None:
    broken = next(c.choice for c in ladder.search(SETTINGS).candidates if c.source in ("search", "exact front"))
    again = Ladder(ladder.problem)
    made = again.short

    def short(choice: Choice, seed: int) -> Outcome:
        return replace(made(choice, seed), value=float("nan")) if choice == broken else made(choice, seed)

    again.short = short
    result = again.search(SETTINGS)
    assert broken not in again.asked("full")
    assert result.cost.failed == 1
    assert len(again.asked("full")) == 8


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.0}, {"trials": 0}])
def test_short_runs_out_of_range_are_refused(ladder: Ladder, wrong: dict[str, float]) -> None:
    with pytest.raises(GroupSearchError):
        Short(**{"evaluate": ladder.short, "fraction": 0.1, "trials": 3, **wrong})


def test_the_worthiest_are_the_front_then_what_is_behind_it() -> None:
    front, behind = [(0.9, 9.0), (0.8, 7.0), (0.7, 5.0), (0.6, 3.0)], [(0.85, 9.5), (0.55, 4.0)]
    points = [*behind, *front]
    assert worthiest(points, 4) == [5, 4, 3, 2]
    assert set(worthiest(points, 6)) == set(range(6))
    assert worthiest(points, 2) == [5, 2], "both ends"
    assert len(worthiest(points, 5)) == 5
    assert len(worthiest(points, 3)) == 3
    assert worthiest(points, 0) == worthiest([], 3) == []


def test_more_full_runs_than_allowed_are_refused_before_any_run(ladder: Ladder) -> None:
    with pytest.raises(GroupSearchError, match="max_runs"):
        ladder.search(replace(SETTINGS, trials=2, max_runs=3))
    assert not ladder.made
    result = ladder.search(replace(SETTINGS, trials=2, max_runs=5))
    assert len([1 for rung, _, _ in ladder.made if rung == "full"]) == 5
    assert len(result.candidates) == 4, "the references, and one that was found"


# -- going on


def test_an_interrupt_among_short_runs_leaves_what_they_found(ladder: Ladder, tmp_path: Path) -> None:
    settings = replace(SETTINGS, storage=tmp_path / "study.journal")
    whole = Ladder(ladder.problem)
    expected = whole.search(replace(SETTINGS, storage=tmp_path / "other.journal"), whole.good)
    for stop, rung in ((15, "short"), (28, "full"), (36, "full")):
        stopping = Ladder(ladder.problem)
        stopping.made = ladder.made  # counted on, over all three
        stopping.short, stopping.full = (
            until(stop, stopping.short, ladder.made),
            until(stop, stopping.full, ladder.made),
        )
        result = stopping.search(settings, ladder.good)
        assert result.interrupted
        assert result.rung == rung
        assert result.recommended in result.candidates
        assert ("By short runs alone" in result.reason) == (rung == "short")
        assert result.cost.trained == stop
        assert result.to_json()["rung"] == rung
        settings = replace(settings, resume=True)
    result = ladder.search(settings, ladder.good)
    assert Counter(ladder.made) == Counter(whole.made), "a run made twice, or another one"
    assert [c.to_json("m") for c in result.candidates] == [c.to_json("m") for c in expected.candidates]
    assert [a.to_json() for a in result.agreements] == [a.to_json() for a in expected.agreements]


def until(stop: int, make: Callable[[Choice, int], Outcome], made: list) -> Callable[[Choice, int], Outcome]:
    """The same runs, and Ctrl-C in place of the one after the first ``stop``."""

    def call(choice: Choice, seed: int) -> Outcome:
        if len(made) == stop:
            raise KeyboardInterrupt
        return make(choice, seed)

    return call


def test_resuming_when_all_is_done_runs_nothing(ladder: Ladder, tmp_path: Path) -> None:
    settings = replace(SETTINGS, storage=tmp_path / "study.journal")
    first = ladder.search(settings, ladder.good)
    made = len(ladder.made)
    again = ladder.search(replace(settings, resume=True), ladder.good)
    assert len(ladder.made) == made
    assert again.candidates == first.candidates
    assert [a.to_json() for a in again.agreements] == [a.to_json() for a in first.agreements]


def test_a_study_that_is_there_is_refused_before_any_run(ladder: Ladder, tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    run_search(ladder.problem.trace, ladder.problem.evaluate, replace(SETTINGS, storage=storage))
    with pytest.raises(GroupSearchError, match="--resume"):
        ladder.search(replace(SETTINGS, storage=storage))
    with pytest.raises(GroupSearchError, match="metric_name"):
        ladder.search(replace(SETTINGS, storage=storage, metric_name="other", resume=True))
    assert not ladder.made
    ladder.search(replace(SETTINGS, storage=storage, force=True))
    assert len(ladder.asked("full")) == 8


def test_going_on_with_another_fraction_is_refused(ladder: Ladder, tmp_path: Path) -> None:
    settings = replace(SETTINGS, storage=tmp_path / "study.journal")
    ladder.search(settings)
    made = len(ladder.made)
    with pytest.raises(GroupSearchError, match="short_fraction"):
        search_in_rungs(
            ladder.problem.trace,
            ladder.full,
            replace(settings, resume=True),
            short=Short(ladder.short, 0.25, 24),
        )
    assert len(ladder.made) == made


KILLED = """
import os, signal, sys
from pathlib import Path
from groupsearch.plan.memory import peaks
from groupsearch.search import SearchSettings
from tests.search.problem import Problem
from tests.search.test_run_rungs import Ladder, SETTINGS
from dataclasses import replace

log, storage, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ladder = Ladder(Problem(16, noise=0.002, shape="mixed"))

def logged(rung, make):
    def call(choice, seed):
        if log.exists() and len(log.read_text().splitlines()) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = make(choice, seed)
        with log.open("a") as file:
            file.write(f"{rung} {choice.boundaries} {seed}\\n")
        return outcome
    return call

ladder.short, ladder.full = logged("short", ladder.short), logged("full", ladder.full)
ladder.search(replace(SETTINGS, storage=storage, resume=True), ladder.good)
"""


def test_kill_9_in_every_rung_loses_no_run_and_repeats_none(ladder: Ladder, tmp_path: Path) -> None:
    ladder.search(replace(SETTINGS, storage=tmp_path / "whole.journal"), ladder.good)
    log, storage = tmp_path / "log", str(tmp_path / "study.journal")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    ends = []
    for stop in (10, 22, 27, 38, -1):  # in the warm start, by the proxy's choice, in full runs, in further seeds
        command = [sys.executable, "-c", KILLED, str(log), storage, str(stop)]
        ends.append(subprocess.run(command, env=environment, timeout=60, check=False).returncode)
    assert ends == [-signal.SIGKILL] * 4 + [0]
    expected = Counter(f"{rung} {choice.boundaries} {seed}" for rung, choice, seed in ladder.made)
    assert Counter(log.read_text().splitlines()) == expected


def test_workers_share_the_rungs(ladder: Ladder, tmp_path: Path) -> None:
    """Two at once, through the run that waits for others: every run is made once, and both end with the same."""
    log, storage = tmp_path / "log", str(tmp_path / "study.journal")
    code = KILLED.replace("import os, signal, sys", "import os, signal, sys, time")
    code = code.replace("outcome =", "time.sleep(0.02); outcome =").replace(
        ", ladder.good)", ", ladder.good, run=run_together)"
    )
    code = f"from groupsearch.search.run import run_together\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", code, str(log), storage, "-1"]
    begin = time.monotonic()
    crew = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in crew] == [0, 0], time.monotonic() - begin
    runs = Counter(log.read_text().splitlines())
    assert max(runs.values()) == 1
    assert sum(line.startswith("short") for line in runs) in (24, 25)  # two may begin the last at once


def test_short_runs_may_be_judged_by_something_else(ladder: Ladder) -> None:
    def search(evaluate: Callable[[Choice, int], Outcome]):
        named = Short(evaluate, FRACTION, 24, "negative loss")
        settings = replace(SETTINGS, metric_name="accuracy")
        return search_in_rungs(ladder.problem.trace, ladder.full, settings, short=named)

    interrupted = search(until(10, ladder.short, ladder.made))
    assert (interrupted.rung, interrupted.metric_name) == ("short", "negative loss")
    assert "negative loss" in interrupted.reason
    assert interrupted.to_json()["candidates"][0]["metric"]["name"] == "negative loss"
    assert search(ladder.short).to_json()["recommended"]["metric"]["name"] == "accuracy"
