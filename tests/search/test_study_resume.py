from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.search import Choice, Outcome, SearchSettings, run_search
from tests.search.problem import Problem

# Evaluates for ever at the evaluation with the number in argv[3], so that it can be killed in the middle of it.
WORKER = """
import sys, time
from pathlib import Path
from groupsearch.search import SearchSettings, run_search
from tests.search.problem import Problem

log, storage, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
problem = Problem(12, noise=0.01)

def evaluate(choice, seed):
    with log.open("a") as file:
        file.write(f"begin {list(choice.boundaries)} {seed}\\n")
    if log.read_text().count("begin") == stop:
        log.with_suffix(".hangs").touch()
        time.sleep(600)
    outcome = problem.evaluate(choice, seed)
    with log.open("a") as file:
        file.write(f"end {list(choice.boundaries)} {seed}\\n")
    return outcome

run_search(problem.trace, evaluate, SearchSettings(trials=20, storage=storage, resume=True))
"""


def kill_in_evaluation(number: int, log: Path, storage: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(log), storage, str(number)], env=environment)
    marker, end = log.with_suffix(".hangs"), time.monotonic() + 60
    while not marker.exists():
        assert worker.poll() is None, "the worker ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    marker.unlink()


def logged(log: Path, word: str) -> list[str]:
    return [line.removeprefix(word) for line in log.read_text().splitlines() if line.startswith(word)]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_kill_9_loses_the_evaluation_in_flight_and_nothing_else(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log"
    storage = str(tmp_path / "study.journal") if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    problem, made = Problem(12, noise=0.01), []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        made.append(f" {list(choice.boundaries)} {seed}")
        return problem.evaluate(choice, seed)

    kill_in_evaluation(15, log, storage)  # in the search
    kill_in_evaluation(28, log, storage)  # in the replication: 20 trials, one begun twice, then more seeds
    lost = sorted(set(logged(log, "begin")) - set(logged(log, "end")))
    finished = logged(log, "end")
    assert len(finished) == len(set(finished)) == 26
    result = run_search(problem.trace, evaluate, SearchSettings(trials=20, storage=storage, resume=True))
    assert not set(made) & set(finished)
    assert len(lost) == 1
    assert lost[0] in made
    assert result.cost.trained == len(made) + len(finished)
    assert len([e for e in result.evaluations if e.seed == 0]) == 20
    assert result.cost.trials == 20 + result.cost.cached


def test_an_interrupted_trial_is_made_again_on_resume(tmp_path: Path) -> None:
    problem = Problem(12)
    settings = SearchSettings(trials=30, seeds=1, storage=tmp_path / "study.journal")
    asked: list[Choice] = []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        asked.append(choice)
        if len(asked) == 20:
            raise KeyboardInterrupt
        return problem.evaluate(choice, seed)

    first = run_search(problem.trace, evaluate, settings)
    assert first.interrupted
    second = run_search(problem.trace, evaluate, replace(settings, resume=True))
    assert asked[19] == asked[20]
    assert len(asked) == 31
    assert len(second.candidates) == 30
    assert not second.interrupted


def test_resume_of_a_finished_search_evaluates_nothing_and_gives_the_same(tmp_path: Path) -> None:
    problem = Problem(24, noise=0.01)
    settings = SearchSettings(trials=20, storage=tmp_path / "study.journal")
    first = run_search(problem.trace, problem.evaluate, settings)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        raise AssertionError("evaluated again")

    again = run_search(problem.trace, evaluate, replace(settings, resume=True))
    assert again.to_json() == first.to_json()
    more = run_search(problem.trace, problem.evaluate, replace(settings, resume=True, trials=25))
    assert len([e for e in more.evaluations if e.seed == 0]) == 25


@pytest.mark.parametrize("bytes_kept", [1, 20, -1])
def test_a_line_torn_by_a_kill_does_not_lose_the_study(tmp_path: Path, bytes_kept: int) -> None:
    problem, path = Problem(10), tmp_path / "study.journal"
    settings = SearchSettings(trials=15, seeds=1, storage=path)
    first = run_search(problem.trace, problem.evaluate, settings)
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with path.open("ab") as file:
        file.write(last[:bytes_kept])
    for trials in (20, 25):
        result = run_search(problem.trace, problem.evaluate, replace(settings, trials=trials, resume=True))
        assert len(result.candidates) == trials
        assert {c.boundaries for c in first.candidates} <= {c.boundaries for c in result.candidates}


def test_a_lock_left_by_a_kill_is_broken(tmp_path: Path) -> None:
    problem, path = Problem(8), tmp_path / "study.journal"
    settings = SearchSettings(trials=5, seeds=1, storage=path)
    run_search(problem.trace, problem.evaluate, settings)
    path.with_name("study.journal.lock").touch()
    start = time.monotonic()
    result = run_search(problem.trace, problem.evaluate, replace(settings, trials=7, resume=True))
    assert len(result.candidates) == 7
    assert time.monotonic() - start < 15


def test_a_trial_answered_after_the_ledger_but_before_optuna_is_told_on_resume(tmp_path: Path) -> None:
    problem, path = Problem(24), tmp_path / "study.journal"
    settings = SearchSettings(trials=12, seeds=1, storage=path)

    def stop(event: object) -> None:
        if getattr(event, "kind", "") == "trained":
            raise KeyboardInterrupt  # the evaluation is in the ledger, the trial is still running

    first = run_search(problem.trace, problem.evaluate, settings, stop)
    assert first.interrupted
    assert first.cost.trained == 1
    second = run_search(problem.trace, problem.evaluate, replace(settings, resume=True))
    assert second.cost.trained == 12
    study = optuna.load_study(study_name="groupsearch", storage=_journal(path))
    told = [t.user_attrs["boundaries"] for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(told) == 12
    assert list(first.evaluations[0].boundaries) in told


def test_an_existing_study_is_neither_used_nor_overwritten_unasked(tmp_path: Path) -> None:
    problem, path = Problem(8), tmp_path / "study.journal"
    settings = SearchSettings(trials=5, seeds=1, storage=path)
    run_search(problem.trace, problem.evaluate, settings)
    before = path.read_bytes()
    with pytest.raises(GroupSearchError, match=r"--resume.*--force"):
        run_search(problem.trace, problem.evaluate, settings)
    assert path.read_bytes() == before
    forced = run_search(problem.trace, problem.evaluate, replace(settings, force=True, trials=3, seed=5))
    assert forced.cost.trained == forced.cost.trials == 3
    assert {e.seed for e in forced.evaluations} == {5}


def test_resume_on_another_problem_is_refused_by_the_names_of_what_differs(tmp_path: Path) -> None:
    problem = Problem(8)
    settings = SearchSettings(
        trials=5,
        seeds=1,
        storage=tmp_path / "study.journal",
        fingerprint={"epsilon": 8.0, "model": "vit", "shape": (8, 8)},
    )
    run_search(problem.trace, problem.evaluate, settings)
    same = replace(settings, resume=True)
    assert run_search(problem.trace, problem.evaluate, same).cost.trained >= 5
    other = replace(same, fingerprint={**settings.fingerprint, "epsilon": 3.0}, max_groups=6)
    with pytest.raises(GroupSearchError) as refused:
        run_search(problem.trace, problem.evaluate, other)
    assert "(epsilon: 8.0 -> 3.0; max_groups: null -> 6)" in str(refused.value)
    with pytest.raises(GroupSearchError, match=r"trace: "):
        run_search(Problem(8, trace_seed=1).trace, problem.evaluate, same)


def test_a_resumed_sampler_does_not_draw_the_same_again(tmp_path: Path) -> None:
    problem = Problem(24)
    settings = SearchSettings(trials=25, seeds=1, sampler="random", storage=tmp_path / "study.journal")
    run_search(problem.trace, problem.evaluate, settings)
    assert run_search(problem.trace, problem.evaluate, replace(settings, trials=35, resume=True)).cost.cached == 0


def test_what_a_rejected_trial_exceeds_is_told_to_the_sampler(tmp_path: Path) -> None:
    problem, path = Problem(12), tmp_path / "study.journal"
    budget_bytes = int(1.02 * min(peak for _, peak in problem.exact_front()))
    settings = SearchSettings(trials=12, seeds=1, storage=path, budget_bytes=budget_bytes, sampler="tpe")
    result = run_search(problem.trace, problem.evaluate, settings)
    trials = optuna.load_study(study_name="groupsearch", storage=_journal(path)).trials
    rejected = [t for t in trials if t.user_attrs.get("answer") == "rejected"]
    assert len(rejected) == result.cost.rejected > 0
    for trial in trials:
        if trial.state.is_finished():
            assert (trial.constraints["memory"] > 0) == (trial in rejected)
    assert {t.state for t in rejected} == {optuna.trial.TrialState.PRUNED}


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kind": "profile"}))
    with pytest.raises(GroupSearchError, match="another kind of file"):
        run_search(Problem(8).trace, Problem(8).evaluate, SearchSettings(storage=path, resume=True))
    assert path.read_text() == '{"kind": "profile"}'
    path.write_bytes(b'{"op_code":0,"worker_id":"x"}\n\x00\x00\n{"op_code":0}\n')
    with pytest.raises(GroupSearchError, match="a line that is none"):
        run_search(Problem(8).trace, Problem(8).evaluate, SearchSettings(storage=path, resume=True))


@pytest.mark.parametrize("storage", ["missing/study.journal", "unknown://user:secret@host/base"])
def test_a_storage_that_cannot_be_opened_is_one_paragraph(tmp_path: Path, storage: str) -> None:
    where = storage if "://" in storage else tmp_path / storage
    with pytest.raises(GroupSearchError) as refused:
        run_search(Problem(8).trace, Problem(8).evaluate, SearchSettings(storage=where))
    assert "--storage" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def _journal(path: Path) -> optuna.storages.BaseStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
