"""One study, many processes: every evaluation once, whoever makes it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.search import Choice, Outcome, SearchSettings, run_search
from groupsearch.search import shared as workers
from groupsearch.search.evaluations import EvaluationLog
from groupsearch.search.run import await_study, run_together
from groupsearch.search.sampler import make_sampler
from groupsearch.search.space import Space
from groupsearch.search.study import SharedStudy, open_study
from tests.search.crew import Crew, Sleeper, result_of
from tests.search.postgres import Server
from tests.search.problem import Problem


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return str(tmp_path / "study.journal")
    server: Server = request.getfixturevalue("server")
    return server.create(tmp_path.name)


def crew_of(tmp_path: Path, storage: str, *, seconds: float = 0.05, trials: int = 24, length: int = 16) -> Crew:
    settings = SearchSettings(trials=trials, seeds=2, storage=storage, resume=True)
    return Crew(Sleeper(Problem(length, noise=0.01), tmp_path / "log", seconds), settings)


def test_three_workers_share_a_study_and_evaluate_nothing_twice(tmp_path: Path, storage: str) -> None:
    crew = crew_of(tmp_path, storage, seconds=0.15)
    for _ in range(3):
        crew.hire()
    crew.finish()
    result = result_of(crew)
    crew.check(result)
    assert crew.killed == []
    assert len({pid for _, pid, _, _ in crew.notes()}) >= 2  # a late one may find nothing left to do
    first = [e for e in result.evaluations if e.seed == 0]
    assert 24 <= len(first) <= 24 + 2 + 3  # each of the others may be at one more; the references come on top
    assert result.cost.failed == 0
    for candidate in result.front:
        assert len(candidate.values) >= 2


def test_a_worker_waits_for_the_study_to_be_begun(tmp_path: Path) -> None:
    crew = crew_of(tmp_path, str(tmp_path / "study.journal"), trials=8)
    crew.hire(wait=True)
    time.sleep(0.5)
    assert crew.notes() == []
    assert not (tmp_path / "study.journal").exists()  # else who begins the search would find one there
    crew.hire()
    crew.finish()
    crew.check(result_of(crew))
    with pytest.raises(GroupSearchError, match=r"without --worker"):
        await_study(replace(crew.settings, study_name="another"), 0.1)


def test_a_worker_with_another_problem_is_refused_and_leaves_no_mark(tmp_path: Path, storage: str) -> None:
    problem = Problem(8)
    fingerprint = {"epsilon": 8.0, "packages": {"torch": "2.13", "numpy": "2.4"}}
    settings = SearchSettings(trials=5, seeds=1, storage=storage, fingerprint=fingerprint)
    run_search(problem.trace, problem.evaluate, settings)
    records = optuna.load_study(study_name="groupsearch/evaluations", storage=Ledgers(settings).storage)
    before = len(records.trials)
    other = {"epsilon": 3.0, "packages": {"torch": "2.14", "numpy": "2.4"}}
    with pytest.raises(GroupSearchError) as refused:
        run_search(problem.trace, problem.evaluate, replace(settings, resume=True, fingerprint=other))
    assert '(epsilon: 8.0 -> 3.0; packages.torch: "2.13" -> "2.14")' in str(refused.value)
    assert len(records.trials) == before


def test_of_two_that_begin_a_study_at_once_with_other_problems_one_is_refused(tmp_path: Path) -> None:
    problem = Problem(6)
    for attempt in range(5):
        storage, barrier, outcomes = tmp_path / f"{attempt}.journal", threading.Barrier(2), []

        def begin(epsilon: float, storage=storage, barrier=barrier, outcomes=outcomes) -> None:
            settings = SearchSettings(trials=3, storage=storage, resume=True, fingerprint={"epsilon": epsilon})
            barrier.wait()
            try:
                open_study(Space.of(problem.trace, settings), settings)
                outcomes.append("begun")
            except GroupSearchError as error:
                outcomes.append("epsilon: " in str(error))

        threads = [threading.Thread(target=begin, args=(epsilon,)) for epsilon in (1.0, 8.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(str, outcomes)) == ["True", "begun"]


class Ledgers:
    """Ledgers of one study as several workers, some of them on another machine, would have them."""

    def __init__(self, settings: SearchSettings, length: int = 8) -> None:
        self.problem = Problem(length)
        self.settings = settings
        self.study = self.open()
        self.storage = self.study.shared

    def open(self, host: str | None = None) -> SharedStudy:
        study = open_study(Space.of(self.problem.trace, self.settings), replace(self.settings, resume=True))
        if host is not None:
            study.shared.worker = study.shared.worker.replace(study.shared.worker.split("/")[0], host, 1)
        return study


def test_a_claim_of_a_silent_worker_is_taken_and_of_a_living_one_is_not(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.6)
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.1)
    ledgers = Ledgers(SearchSettings(storage=storage))
    begun, end = threading.Event(), threading.Event()

    def slow(choice: Choice, seed: int) -> Outcome:
        begun.set()
        end.wait(30)
        return ledgers.problem.evaluate(choice, seed)

    far = EvaluationLog(ledgers.open("far"), slow)
    thread = threading.Thread(target=far.obtain, args=(Choice((2,)), 0))
    thread.start()
    begun.wait(10)
    calls: list[Choice] = []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        calls.append(choice)
        return ledgers.problem.evaluate(choice, seed)

    near = EvaluationLog(ledgers.open(), evaluate)
    for _ in range(12):  # far longer than the grace: it says that it lives
        time.sleep(0.1)
        assert near.obtain(Choice((2,)), 0).under_way
    assert near.under_way == ((Choice((2,)), 0),)
    monkeypatch.setattr(workers, "BEAT_SECONDS", 1000.0)  # it falls silent, as if its machine were gone
    assert near.wait_for_others()
    assert near.obtain(Choice((2,)), 0).value is not None
    assert calls == [Choice((2,))]
    end.set()  # what was thought dead comes back: its evaluation was made twice, and counts once
    thread.join()
    assert len(EvaluationLog(ledgers.open(), evaluate).evaluations) == 1


def test_two_that_claim_at_the_same_time_evaluate_once(tmp_path: Path, storage: str) -> None:
    ledgers = Ledgers(SearchSettings(storage=storage))
    calls: list[tuple[Choice, int]] = []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        calls.append((choice, seed))
        time.sleep(0.05)
        return ledgers.problem.evaluate(choice, seed)

    barrier = threading.Barrier(4)
    both = [EvaluationLog(ledgers.open(f"host{i}"), evaluate) for i in range(4)]

    def race(ledger: EvaluationLog) -> None:
        for seed in range(8):
            barrier.wait(60)
            ledger.obtain(Choice((1, 3)), seed)

    threads = [threading.Thread(target=race, args=(ledger,)) for ledger in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [(Choice((1, 3)), seed) for seed in range(8)]
    assert {len(ledger.evaluations) for ledger in both} == {8}


def test_workers_draw_differently(tmp_path: Path) -> None:
    ledgers = Ledgers(SearchSettings(storage=tmp_path / "study.journal", sampler="random"), length=40)
    drawn = []
    for _ in range(3):
        study, space = ledgers.open(), Space.of(ledgers.problem.trace, ledgers.settings)
        study.sampler = make_sampler(space, ledgers.settings, study.place)
        drawn.append(space.suggest(study.ask()))
    assert len(set(drawn)) == 3


def test_an_interrupted_worker_gives_its_trial_back_at_once(tmp_path: Path) -> None:
    problem = Problem(12)
    settings = SearchSettings(trials=12, seeds=1, storage=tmp_path / "study.journal", resume=True)
    asked: list[Choice] = []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        asked.append(choice)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return problem.evaluate(choice, seed)

    assert run_together(problem.trace, evaluate, settings).interrupted
    study = Ledgers(settings, 12).study
    assert study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) == []
    assert EvaluationLog(study, evaluate).under_way == ()
    assert not run_together(problem.trace, evaluate, settings).interrupted
    assert asked.count(asked[4]) == 2
