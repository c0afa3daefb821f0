"""optimize on a very small digits-vit: the document, the page, and going on after an end at any time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupsearch.cli.optimize import CHECKED, GRANULARITIES, SAMPLERS
from groupsearch.cli.parameters import OPTIMIZERS
from groupsearch.engine.optimizers import OPTIMIZERS as ENGINE_OPTIMIZERS
from groupsearch.jobs import search as jobs_search
from groupsearch.records import read_document
from groupsearch.search import settings as search_settings
from tests.cli.running import ROOT, refused, run

SMALL = ("--setting", "blocks=1", "--setting", "width=8", "--seeds", "2", "--verify", "none")
FULL = ("--rungs", "full")


def test_choices_are_those_of_the_stages():
    assert GRANULARITIES == search_settings.GRANULARITIES
    assert SAMPLERS == search_settings.SAMPLERS
    assert CHECKED == jobs_search.CHECKED
    assert OPTIMIZERS == ENGINE_OPTIMIZERS


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "a.json"
    result = run("optimize", *SMALL, *FULL, "--steps", 3, "--trials", 3, "-o", path, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == read_document(path)
    return path


def test_the_document_has_what_others_rely_on(searched):
    document = read_document(searched, "search")
    for row in document["candidates"]:
        assert row["groups"] == len(row["boundaries"]) + 1
        assert row["metric"]["name"] == "accuracy"
        assert 0 <= row["metric"]["mean"] <= 1
        assert row["metric"]["seeds"] == (2 if row["on_front"] else len(row["metric"]["values"]))
    assert {"all-layer", "layer-wise"} <= {row["source"] for row in document["candidates"]}
    assert document["recommended"] in document["candidates"]
    assert {"seconds", "trials", "steps", "epsilon"} <= set(document["cost"])
    assert document["cost"]["epsilon"] == pytest.approx(8, rel=0.02)
    assert document["cost"]["steps"] == 3 * document["cost"]["trained"]
    runs = sum(row["metric"]["seeds"] for row in document["candidates"])
    assert len(document["training"]["curves"]) == runs == document["cost"]["trained"]
    assert document["training"]["noise_multiplier"] > 0


def test_the_page_and_the_study_lie_beside_the_document(searched):
    assert "recommend" in searched.with_suffix(".html").read_text(encoding="utf-8")
    assert searched.with_suffix(".journal").stat().st_size > 0


def test_a_second_search_is_refused_or_goes_on(searched):
    before = read_document(searched)
    again = ("optimize", *SMALL, *FULL, "--steps", 3, "--trials", 3, "-o", searched)
    assert "--resume" in refused(*again)
    assert run(*again, "--resume").exit_code == 0
    after = read_document(searched)
    assert after["candidates"] == before["candidates"]
    assert after["cost"] == before["cost"]


def test_going_on_with_another_problem_is_refused(searched):
    before = searched.read_bytes()
    message = refused("optimize", *SMALL, *FULL, "--steps", 4, "--trials", 3, "-o", searched, "--resume")
    assert "steps" in message
    assert searched.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--budget", "1KiB"], "the least"),
        (["--budget", "big"], "12GiB"),
        (["hf:gpt2"], "data"),
        (["--resume", "--force"], "Choose one"),
        (["--trials", "0"], "--trials"),
        (["--rungs", "proxy,short"], "full"),
        (["--rungs", "fast,full"], "full"),
        (["--short-fraction", "1"], "--short-fraction"),
        (["--steps", "1"], "--rungs full"),
        (["--max-runs", "3"], "max_runs"),
        (["--confidence", "1"], "--confidence"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_requests_leave_nothing_behind(tmp_path, arguments, word):
    model = [argument for argument in arguments if argument.startswith("hf:")]
    small = () if model else SMALL
    assert word in refused("optimize", *arguments, *small, "-o", tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_checkpointing_is_part_of_the_trace_the_training_and_the_problem(tmp_path):
    path = tmp_path / "a.json"
    arguments = ("optimize", *SMALL, *FULL, "--setting", "blocks=2", "--steps", 2, "--trials", 2, "-o", path)
    result = run(*arguments, "--checkpoint", "blocks")
    assert result.exit_code == 0, result.stderr
    document = read_document(path, "search")
    assert document["settings"]["checkpoint"] == "blocks"
    assert document["trace"]["settings"]["checkpoint"] == "blocks"
    assert document["cost"]["failed"] == 0
    assert "checkpoint" in refused(*arguments, "--resume")


LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells of a process' children")


@pytest.mark.parametrize("stage", ["Tracing", pytest.param("Measuring", marks=LINUX)])
def test_an_end_before_the_search_says_so_and_leaves_nothing(tmp_path, stage):
    """A real Ctrl-C while the step is traced, or, later, in the processes that measure it."""
    path = tmp_path / "a.json"
    arguments = ["optimize", *SMALL[:-1], "measure", "--steps", "2", "--trials", "2", "-o", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "groupsearch", *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr.readline().startswith("Tracing")
    if stage == "Measuring":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "nothing was searched yet" in errors
    assert "starts over" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=lambda ending: ending.name)
def test_an_ended_search_goes_on_where_it_was(tmp_path, ending):
    path = tmp_path / "a.json"
    arguments = ["optimize", *SMALL, *FULL, "--steps", "12", "--trials", "5", "-o", str(path)]
    command = [sys.executable, "-m", "groupsearch", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    told = []
    while not any(line.startswith("2/5") for line in told):
        line = process.stderr.readline()
        assert line, "".join(told)
        told.append(line)
    process.send_signal(ending)
    errors = process.communicate(timeout=60)[1]
    first = next(line for line in told if line.startswith("1/5")).partition(" ")[2]
    if ending == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "--resume" in errors
        assert len(read_document(path)["candidates"]) >= 2
    else:
        assert process.returncode == -signal.SIGKILL
        assert not path.exists()
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert first not in result.stderr
    document = read_document(path)
    assert {"all-layer", "layer-wise"} <= {row["source"] for row in document["candidates"]}
    assert path.with_suffix(".html").exists()
