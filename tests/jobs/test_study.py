"""The study of Clip21: its cells are plain simulations, its numbers are what the document says, and it goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import groupsearch as gs
from groupsearch import GroupSearchError, Study
from groupsearch.distributed.clip21 import simulate
from groupsearch.documents import json_schema
from groupsearch.jobs.events import Advanced, Interrupted
from groupsearch.jobs.study import ENTRIES, Job, Plan, StudyRequest, fitted_rate, noise_for, theory_step_size
from groupsearch.privacy.accounting import epsilon
from groupsearch.report import render_page
from groupsearch.workloads.skewed import skewed
from tests.cli.running import refused, run
from tests.documents.schemas import violations

STEPS = 30


@pytest.fixture(scope="module")
def quick() -> Study:
    return gs.study(quick=True, steps=STEPS, seed=3)


def test_the_document_is_whole_and_as_its_schema_says(quick: Study) -> None:
    raw = quick.to_json()
    schema = json_schema(Study)
    assert list(violations(schema, json.loads(json.dumps(raw)), schema)) == []
    assert Study.from_json(raw).to_json() == raw
    assert {cell.method for cell in quick.cells} == {e.name for e in ENTRIES if e.allocation is None}
    assert {cell.steps for cell in quick.cells} == {"tuned", "theory"}
    assert len(quick.to_dataframe()) == len(quick.cells)
    assert quick.finding in repr(quick)
    assert "clip21-gd" in render_page(raw)


@pytest.mark.parametrize("method", ["clip-gd", "clip21-gd", "alpha-normec"])
def test_a_cell_is_a_plain_simulation(quick: Study, method: str) -> None:
    problem = skewed("breast-cancer", "logistic", 10)
    cell = next(c for c in quick.cells if c.method == method and c.steps == "theory")
    middle = len(quick.thresholds) // 2
    entry = next(e for e in ENTRIES if e.name == method)
    gamma = float(theory_step_size(problem, entry, torch.tensor(quick.thresholds, dtype=torch.float64))[middle])
    found = simulate(
        method,
        [lambda x, i=i: problem.gradients(x[None])[0, i] for i in range(10)],
        problem.start(),
        steps=STEPS,
        step_size=gamma,
        threshold=quick.thresholds[middle],
    )
    assert cell.step_size == pytest.approx(gamma, rel=1e-2)
    assert cell.squared[middle] == pytest.approx(float(found.gradient_norms[-3:].square().mean()), rel=1e-2)
    if method != "alpha-normec":
        assert cell.inactive_from[middle] == found.inactive_from


def test_error_feedback_ends_lower_where_clipping_acts(quick: Study) -> None:
    by = {(c.method, c.steps): c for c in quick.cells}
    assert by["clip21-gd", "tuned"].squared[1] < by["clip-gd", "tuned"].squared[1]
    assert by["clip21-gd", "tuned"].inactive_from[-1] is not None


def test_noise_keeps_the_epsilon_that_is_stated(quick: Study) -> None:
    (told,) = quick.guarantees
    sigma, delta = noise_for(8.0, 10, STEPS)
    assert told.of_weights <= 8.0
    assert told.of_weights == pytest.approx(epsilon(sigma * math.sqrt(10) / 2, 1.0, STEPS, delta), abs=1e-3)
    assert told.of_messages == pytest.approx(epsilon(sigma / 2, 1.0, STEPS, delta), abs=1e-3)


def test_a_rate_and_its_interval_are_recovered() -> None:
    records = sorted({*np.geomspace(1, 1000, 30).astype(int).tolist()})
    rng = np.random.default_rng(0)
    slope, half_width = fitted_rate(records, [k**-1.3 * math.exp(0.05 * rng.normal()) for k in records])
    assert slope == pytest.approx(-1.3, abs=half_width)
    assert half_width < 0.1
    assert fitted_rate(records, [math.nan] * len(records)) == (None, None)


def test_the_whole_covers_what_it_is_to_cover() -> None:
    plan = Plan.of(StudyRequest())
    jobs = list(plan.jobs())
    assert {(job.data, job.model, job.workers) for job in jobs} == {
        (d, m, n) for d in ("breast-cancer", "digits") for m in ("logistic", "network") for n in (10, 20, 100)
    }
    assert {job.epsilon for job in jobs} == {None, 8.0, 18.0}
    assert max(plan.thresholds) / min(plan.thresholds) == pytest.approx(1e4)
    assert sum(job.entry.allocation is not None for job in jobs) == 2 * 2 * 3
    assert len(jobs) == len(set(jobs))
    assert isinstance(jobs[0], Job)


def test_a_study_that_was_stopped_goes_on(tmp_path, quick: Study) -> None:
    journal = tmp_path / "study.jsonl"

    def stop(event: object) -> None:
        if isinstance(event, Advanced) and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"4 of 10 cells are done, and --resume") as stopped:
        gs.study(quick=True, steps=STEPS, seed=3, journal=journal, notify=stop)
    assert len({cell.method for cell in stopped.value.document.cells}) == 4
    lines = journal.read_text().splitlines()
    assert len(lines) == 5
    marked = json.loads(lines[1])
    marked["cells"][0][7] = 123.0  # what is done is not done again
    journal.write_text("\n".join([lines[0], json.dumps(marked), *lines[2:]]) + '\n{"key": "cut sho')
    found = gs.study(quick=True, steps=STEPS, seed=3, journal=journal, resume=True)
    assert found.cells[0].step_size == 123.0
    assert found.cells[1:] == quick.cells[1:]
    assert found.curves == quick.curves


@pytest.mark.parametrize(
    ("text", "said"), [('{"settings": {"steps": 7}}\n', "with one|found one with"), ("[1]\n", "otherwise")]
)
def test_a_journal_of_something_else_is_refused(tmp_path, text: str, said: str) -> None:
    journal = tmp_path / "study.jsonl"
    journal.write_text(text)
    with pytest.raises(GroupSearchError, match=said):
        gs.study(quick=True, journal=journal, resume=True)
    assert journal.read_text() == text


def test_what_is_not_known_is_refused(tmp_path) -> None:
    with pytest.raises(GroupSearchError, match="clip21"):
        gs.study("clip22")
    with pytest.raises(GroupSearchError, match="10 steps"):
        gs.study(quick=True, steps=3)
    assert "clip21" in refused("study", "clip22")


def test_the_command_writes_document_and_page_and_leaves_no_journal(tmp_path) -> None:
    document, page = tmp_path / "a.json", tmp_path / "a.html"
    result = run("study", "clip21", "--quick", "--steps", 10, "-o", document, "--report", page)
    assert result.exit_code == 0, result.output
    assert Study.load(document).settings["steps"] == 10
    assert "clip21-gd" in page.read_text(encoding="utf-8")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.html", "a.json"]
    assert "exists already" in refused("study", "clip21", "--quick", "-o", document)
