"""What goes wrong on real machines: dead workers, storages out of reach, full disks, trials that cannot be had.

After each of them: nothing that was finished is lost, nothing is evaluated twice, the study ends.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.search import Choice, Outcome, SearchSettings, run_search
from groupsearch.search.shared import open_storage, share
from tests.search.crew import Crew, Sleeper, result_of
from tests.search.postgres import Server
from tests.search.problem import Problem

NOBODY = 65534


def crew_of(folder: Path, storage: str, *, seconds: float = 0.05, trials: int = 24, length: int = 16) -> Crew:
    settings = SearchSettings(trials=trials, seeds=2, storage=storage, resume=True)
    return Crew(Sleeper(Problem(length, noise=0.01), folder / "log", seconds), settings)


def recorded(storage: str) -> set[tuple[int, tuple[int, ...]]]:
    """What is in the storage, read as anybody would who knows Optuna and nothing of this package's ledger."""
    try:
        study = optuna.load_study(study_name="groupsearch/evaluations", storage=open_storage(storage))
    except KeyError:
        return set()
    found = (trial.user_attrs.get("evaluation") for trial in study.get_trials(deepcopy=False))
    return {(each["seed"], tuple(each["boundaries"])) for each in found if each is not None}


def test_kill_9_at_twenty_storage_operations_of_one_worker_after_the_other(tmp_path: Path) -> None:
    """The same operations in every run: beginning and joining the study, the queue, claims, records, answers."""
    storage, chance = str(tmp_path / "study.journal"), random.Random(20)
    crew = crew_of(tmp_path, storage, seconds=0.0, trials=24)
    before: set[tuple[int, tuple[int, ...]]] = set()
    for fatal in [1, 2, 3, 4, *(chance.randint(5, 60) for _ in range(16))]:
        crew.bury(crew.hire(fatal=fatal))
        now = recorded(storage)
        assert before <= now
        before = now
    crew.hire()
    crew.finish()
    result = result_of(crew)
    crew.check(result)
    assert len(crew.killed) == 20
    assert before <= {(e.seed, e.boundaries) for e in result.evaluations}
    assert 24 <= len([e for e in result.evaluations if e.seed == 0]) <= 24 + 3  # and the references
    study = optuna.load_study(study_name="groupsearch", storage=open_storage(storage))
    assert study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_kill_9_at_twenty_random_instants_of_two_workers(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "journal":
        storage = str(tmp_path / "study.journal")
    else:
        storage = request.getfixturevalue("server").create(tmp_path.name)
    crew, chance = crew_of(tmp_path, storage, seconds=0.3, trials=10_000), random.Random(20)
    before: set[tuple[int, tuple[int, ...]]] = set()
    while len(crew.killed) < 20 or crew.members:
        while len(crew.members) < 2 and len(crew.killed) < 19:
            crew.hire()
        time.sleep(chance.uniform(0.02, 0.5))
        crew.kill(chance.choice(crew.members))
        now = recorded(storage)
        assert before <= now
        before = now
    crew.settings = replace(crew.settings, trials=len({cuts for seed, cuts in before if seed == 0}) + 4)
    crew.hire()
    crew.finish()
    result = result_of(crew)
    crew.check(result)
    assert before <= {(e.seed, e.boundaries) for e in result.evaluations}
    assert len(crew.killed) == 20
    assert crew.settings.trials <= len([e for e in result.evaluations if e.seed == 0]) <= crew.settings.trials + 3
    study = optuna.load_study(study_name="groupsearch", storage=open_storage(storage))
    assert study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_postgresql_is_stopped_and_started_again(tmp_path: Path, server: Server, how: signal.Signals) -> None:
    storage = server.create(tmp_path.name)
    crew = crew_of(tmp_path, storage, seconds=0.2, trials=40)
    for _ in range(2):
        crew.hire()
    crew.wait_for("end", 5)
    crew.wait_for_all()
    server.stop(how)
    try:
        time.sleep(1.0)
        assert all(member.exitcode is None for member in crew.members)
    finally:
        server.start()
    crew.finish()
    crew.check(result_of(crew))
    assert max(crew.ended().values()) == 1


def test_a_journal_whose_folder_is_gone_and_back(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    crew = crew_of(tmp_path, str(tmp_path / "share" / "study.journal"), trials=20)
    for _ in range(2):
        crew.hire()
    crew.wait_for("end", 5)
    (tmp_path / "share").rename(tmp_path / "away")
    time.sleep(0.5)
    assert all(member.exitcode is None for member in crew.members)
    (tmp_path / "away").rename(tmp_path / "share")
    crew.finish()
    crew.check(result_of(crew))
    assert max(crew.ended().values()) == 1


@pytest.fixture
def anybody() -> Iterator[Path]:
    """A folder that another user may enter: pytest's own lie in one that is closed to all others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a worker that is somebody else")
def test_a_journal_that_may_not_be_written_for_a_while(anybody: Path) -> None:
    (anybody / "share").mkdir()
    os.chown(anybody / "share", NOBODY, NOBODY)
    (anybody / "log").touch()
    (anybody / "log").chmod(0o666)
    journal = anybody / "share" / "study.journal"
    crew = crew_of(anybody, str(journal), trials=16)
    for _ in range(2):
        crew.hire(user=NOBODY)
    crew.wait_for("end", 4)
    (anybody / "share").chmod(0o500)  # no lock can be made: nothing can be written
    time.sleep(0.5)
    size = journal.stat().st_size
    time.sleep(0.3)
    assert journal.stat().st_size == size
    assert all(member.exitcode is None for member in crew.members)
    (anybody / "share").chmod(0o700)
    crew.finish()
    crew.check(result_of(crew))
    assert max(crew.ended().values()) == 1


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """The kernel itself cuts a write short and refuses the next, as it does on a full disk."""
    journal = tmp_path / "study.journal"
    crew = crew_of(tmp_path, str(journal), trials=20)
    for _ in range(2):
        crew.hire()
    crew.wait_for("end", 4)
    full = journal.stat().st_size + 150
    _, most = resource.prlimit(crew.members[0].pid, resource.RLIMIT_FSIZE)
    for member in crew.members:
        resource.prlimit(member.pid, resource.RLIMIT_FSIZE, (full, most))
    time.sleep(0.8)
    assert journal.stat().st_size <= full
    assert all(member.exitcode is None for member in crew.members)
    before = recorded(str(journal))
    for member in crew.members:
        resource.prlimit(member.pid, resource.RLIMIT_FSIZE, (most, most))
    crew.finish()
    result = result_of(crew)
    crew.check(result)
    assert before <= {(e.seed, e.boundaries) for e in result.evaluations}
    assert max(crew.ended().values()) == 1


def test_an_outage_that_lasts_too_long_ends_in_one_paragraph(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study.journal")
    storage.patience_seconds = 0.3
    study = optuna.create_study(storage=storage, study_name="x")
    (tmp_path / "study.journal").unlink()
    with pytest.raises(GroupSearchError, match=r"Expected the storage .*study.journal within .*--resume") as refused:
        study.ask()
    assert "\n" not in str(refused.value)
    assert storage.outages > 1
    assert not (tmp_path / "study.journal").exists()


def test_what_is_wrong_and_no_outage_is_not_waited_for(tmp_path: Path) -> None:
    storage = share(optuna.storages.InMemoryStorage())
    with pytest.raises(KeyError):
        storage.get_trial(17)
    assert storage.outages == 0


@pytest.mark.parametrize("kind", ["journal", "memory"])
def test_a_trial_whose_loss_is_not_a_number_is_a_failure_and_not_tried_again(tmp_path: Path, kind: str) -> None:
    problem, bad, asked = Problem(8), [], []

    def evaluate(choice: Choice, seed: int) -> Outcome:
        asked.append((choice, seed))
        outcome = problem.evaluate(choice, seed)
        if choice.groups in (3, 4):
            bad.append(choice.boundaries)
            with np.errstate(invalid="ignore"):
                loss = np.float32(np.inf) - np.float32(np.inf)  # what a diverged training gives
            return replace(outcome, value=float(loss))
        return outcome

    storage = tmp_path / "study.journal" if kind == "journal" else None
    result = run_search(problem.trace, evaluate, SearchSettings(trials=12, seeds=2, storage=storage))
    assert bad
    assert len(asked) == len(set(asked))
    assert result.cost.failed == len(bad)
    assert not {c.boundaries for c in result.candidates} & set(bad)
    assert {e.error for e in result.evaluations if e.boundaries in bad} == {"the metric is nan"}
    assert len([e for e in result.evaluations if e.seed == 0]) == 12


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_is_a_failure_and_the_study_goes_on(tmp_path: Path) -> None:
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back to the kernel
    environment = {**os.environ, **allocator, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("starved.py")), str(tmp_path / "study.journal")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert "memory" in answer["failed"]["()"]
    assert len(answer["trained"]) >= 1
    assert len(answer["failed"]) + len(answer["trained"]) == 6
    assert answer["twice"] == 0
