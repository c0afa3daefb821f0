"""One search by several real commands that meet in a storage, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from groupsearch.search.shared import open_storage
from tests.search.postgres import Server, missing, running_server

COMMAND = [sys.executable, "-m", "groupsearch", "optimize", "digits-vit"]
WHAT = [
    "--steps",
    "3",
    "--trials",
    "8",
    "--seeds",
    "1",
    "--verify",
    "none",
    "--granularity",
    "block",
    "--rungs",
    "full",
]

pytestmark = pytest.mark.slow  # every command traces the model for itself


def start(storage: str, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return subprocess.Popen(
        [*COMMAND, *WHAT, "--storage", storage, *options], env=environment, text=True, stderr=subprocess.PIPE
    )


def taken_by(storage: str, process: subprocess.Popen[str]) -> bool:
    """Whether a process runs a training run or has ended one."""
    if "://" not in storage and not Path(storage).exists():
        return False  # to look would make the file
    try:
        study = optuna.load_study(study_name="groupsearch/evaluations", storage=open_storage(storage))
    except (KeyError, ValueError):
        return False
    trials = [trial for trial in study.get_trials(deepcopy=False) if "claim" in trial.user_attrs]
    return any(trial.user_attrs["worker"].split("/")[2] == str(process.pid) for trial in trials)


def share_a_search(storage: str, document: Path) -> None:
    owner, helper, victim = start(storage, "-o", str(document)), start(storage, "--worker"), start(storage, "--worker")
    try:
        end = time.monotonic() + 300
        while not taken_by(storage, victim) and victim.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        for process in (owner, helper):
            _, said = process.communicate(timeout=max(1.0, end - time.monotonic()))
            assert process.returncode == 0, said
    finally:
        for process in (owner, helper, victim):
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    cost = json.loads(document.read_text())["cost"]
    study = optuna.load_study(study_name="groupsearch/evaluations", storage=open_storage(storage))
    made = [t.user_attrs["evaluation"] for t in study.get_trials(deepcopy=False) if "evaluation" in t.user_attrs]
    runs = [(tuple(each["boundaries"]), each["seed"]) for each in made]
    assert len(runs) == len(set(runs)) == cost["trained"] >= 5  # of blocks, as many as there are groupings
    assert cost["failed"] == 0
    assert study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) == []


def test_two_workers_help_on_a_journal_and_one_is_killed(tmp_path: Path) -> None:
    share_a_search(str(tmp_path / "search.journal"), tmp_path / "search.json")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if reason := missing():
        pytest.skip(reason)
    with running_server() as running:
        yield running


def test_two_workers_help_on_postgresql_and_one_is_killed(tmp_path: Path, server: Server) -> None:
    share_a_search(server.create("search"), tmp_path / "search.json")
