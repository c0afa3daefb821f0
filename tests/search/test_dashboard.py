"""A study opens in optuna-dashboard: the real program, on loopback, asked through its own interface."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from groupsearch.search import SearchSettings, run_search
from tests.search.postgres import Server, free_port
from tests.search.problem import Problem

pytest.importorskip("optuna_dashboard")


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_the_dashboard_shows_the_search_and_its_evaluations(  # noqa: PLR0915 - one server is asked everything
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    problem, storage = Problem(8), str(tmp_path / "study.journal")
    if kind == "postgresql":
        server: Server = request.getfixturevalue("server")
        storage = server.create(tmp_path.name)
    result = run_search(problem.trace, problem.evaluate, SearchSettings(trials=8, seeds=2, storage=storage))
    port = free_port()
    program = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    dashboard = subprocess.Popen(
        [*program, storage, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                studies = fetch(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
                break
            except OSError:
                assert dashboard.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
        by_name = {study["study_name"]: study for study in studies}
        assert set(by_name) == {"groupsearch", "groupsearch/evaluations"}
        assert by_name["groupsearch"]["directions"] == ["maximize", "minimize"]
        shown = {}
        for name, study in by_name.items():
            trials = fetch(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}?after=0")["trials"]
            shown[name] = [trial for trial in trials if trial["state"] == "Complete"]
        assert len(shown["groupsearch"]) == 8
        for trial in shown["groupsearch"]:  # every cut that is made is a parameter, and the grouping is an attribute
            attributes = {each["key"]: each["value"] for each in trial["user_attrs"]}
            made = [f"cut{boundary:05d}" for boundary in json.loads(attributes["boundaries"])]
            assert sorted(each["name"] for each in trial["params"]) == made
        assert len(shown["groupsearch/evaluations"]) == len(result.evaluations)
    finally:
        dashboard.terminate()
        dashboard.wait(30)
