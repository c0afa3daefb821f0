"""Many workers and many trials, small enough for every day; ``benchmarks/scale.py`` measures the large ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scale
from groupsearch.search import SearchSettings, run_search
from tests.search.crew import Crew, Sleeper, result_of
from tests.search.postgres import Server
from tests.search.problem import Problem


@pytest.mark.slow
def test_four_workers_on_postgresql_do_far_more_than_one(tmp_path: Path, server: Server) -> None:
    storage = server.create(tmp_path.name)
    settings = SearchSettings(trials=24, seeds=1, storage=storage, resume=True, sampler="random")
    crew = Crew(Sleeper(Problem(8), tmp_path / "log", 1.0), settings)
    for _ in range(4):
        crew.hire()
    crew.finish()
    crew.check(result_of(crew))
    by_worker = {pid: sum(note[:2] == ["end", pid] for note in crew.notes()) for _, pid, _, _ in crew.notes()}
    assert len(by_worker) == 4
    assert max(by_worker.values()) <= 24 / 2


def test_a_study_filled_as_the_benchmark_fills_it_is_one_that_the_search_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "TRIALS", 30)
    storage = str(tmp_path / "study.journal")
    scale.fill(storage, one_by_one=True)
    problem = Problem(scale.LENGTH, noise=0.01)
    result = run_search(
        problem.trace, problem.evaluate, SearchSettings(trials=32, seeds=1, storage=storage, resume=True)
    )
    first = [e for e in result.evaluations if e.seed == 0]
    assert 32 <= len(first) <= 35
    assert result.cost.trials >= 32
