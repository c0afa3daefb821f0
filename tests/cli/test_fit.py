"""fit on real models: what it writes, how it is interrupted, and how it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from groupsearch.plan.memory import peak_memory
from groupsearch.records import read_document
from groupsearch.units import parse_bytes
from groupsearch.verify import Setup
from tests.cli.running import ROOT, refused, run
from tests.test_fit import FACTORIES


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(FACTORIES)
    return str(path)


@pytest.fixture(scope="module")
def fit(mine, tmp_path_factory):
    """A small fit: what it wrote, and the result of the command."""
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    found = run(
        *("fit", f"{mine}:blocks", "--memory", "256KiB", "--optimizer", "sgd", "--checkpoint", "blocks"),
        *("--dataset-size", 2000, "--sampling-rate", 0.1, "--grouping", "uniform:2", "-o", path, "--json"),
    )
    assert found.exit_code == 0, found.stderr
    return path, found


def test_json_is_the_document_and_nothing_else(fit):
    path, result = fit
    assert json.loads(result.stdout) == read_document(path, kind="profile")


def test_the_document_is_a_profile_that_also_tells_what_fits(fit):
    document = read_document(fit[0])
    part = document["fit"]
    assert part["memory_bytes"] == parse_bytes("256KiB")
    assert part["usable_bytes"] == int(part["memory_bytes"] * 0.995)
    assert part["varies"] == "batch_size"
    assert [row["grouping"] for row in part["rows"]] == ["non-private", "best", "all-layer", "uniform:2"]
    for row in part["rows"]:
        assert row["peak_bytes"] <= part["usable_bytes"] < row["next_peak_bytes"]
        assert "examples_per_second" not in row, "never measured"
    assert {row["size"] for row in part["rows"]} <= set(part["traced"])
    assert document["settings"]["micro_batches"] == 2, "batches that are taken in pieces add up"
    assert "accumulates several" in part["poisson"]["rule"]
    assert part["poisson"]["quantile_batch_size"] > part["poisson"]["expected_batch_size"] == 200
    assert document["model"]["batch_size"] == document["trace"]["batch_size"] == 16


def test_micro_batches_and_autocast_are_those_of_every_trace(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = ("--memory", "256KiB", "--optimizer", "sgd", "--grouping", "all-layer")
    assert run("fit", f"{mine}:blocks", *how, "--micro-batches", 3, "--autocast", "bfloat16").exit_code == 0
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name.endswith("-cpu-micro-batches-3-autocast-bfloat16-fit.json")
    document = read_document(path)
    assert document["trace"]["settings"]["autocast"] == "bfloat16"
    row = next(row for row in document["fit"]["rows"] if row["grouping"] == "all-layer")
    settings = {"batch_size": row["size"]}
    whole = Setup(f"{mine}:blocks", settings, optimizer="sgd", micro_batches=3, autocast="bfloat16").trace()
    assert row["peak_bytes"] == peak_memory(whole, ()).peak_bytes
    plain = Setup(f"{mine}:blocks", settings, optimizer="sgd").trace()
    assert row["peak_bytes"] != peak_memory(plain, ()).peak_bytes


def test_the_table_and_the_sentence_are_said(fit):
    path, result = fit
    part = read_document(path)["fit"]
    assert part["summary"] in result.stderr
    assert part["poisson"]["rule"] in result.stderr
    for row in part["rows"]:
        assert re.search(rf"^{row['grouping']} .* {row['size']} ", result.stderr, re.MULTILINE)


def test_the_document_can_be_drawn(fit, tmp_path):
    page = tmp_path / "fit.html"
    assert run("report", fit[0], "-o", page).exit_code == 0
    assert "uniform:2" in page.read_text()


def test_measured_rates_are_marked(mine):
    result = run(
        "fit", f"{mine}:linear", "--memory", "128KiB", "--limit", 1, "--grouping", "all-layer", "--measure", "--json"
    )
    assert result.exit_code == 0, result.stderr
    for row in json.loads(result.stdout)["fit"]["rows"]:
        (timing,) = row["timings"]
        assert timing["batch_size"] == row["batch_size"] == 1
        rate = row["examples_per_second"]
        assert (rate["source"], rate["value"]) == ("measured", pytest.approx(1 / timing["step_seconds"]))
    assert result.stderr.count(" measured") == 3


def test_the_longest_sequence_at_a_batch(tmp_path):
    model = ("stdlib-gpt", "--setting", "blocks=1", "--setting", "width=8", "--batch-size", 2)
    how = ("--find", "sequence-length", "--sequence-length", 32, "--limit", 64, "--grouping", "all-layer")
    result = run("fit", *model, *how, "--memory", "1GiB", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["fit"]["varies"] == "context"
    assert document["model"]["context"] == 32
    assert [(row["size"], row["batch_size"], row["limited_by"]) for row in document["fit"]["rows"]] == [
        (64, 2, "limit")
    ] * 3
    assert "sequences of at least 64" in result.stderr


def test_without_a_name_it_goes_beside_the_profiles_and_is_not_overwritten(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("fit", f"{mine}:blocks", "--memory", "96KiB", "--optimizer", "sgd", "--grouping", "all-layer")
    assert run(*command).exit_code == 0
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name.endswith("-cpu-fit.json")
    assert "--force" in refused(*command)
    assert run(*command, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MINE:blocks", "--memory", "8KiB"], ["memory of at least", "weights"]),
        (["MINE:blocks", "--memory", "lots"], ["12GiB", "lots"]),
        (["MINE:blocks"], ["--memory"]),
        (["MINE:blocks", "--memory", "1MiB", "--limit", "4"], ["--limit"]),
        (["MINE:blocks", "--memory", "1MiB", "--margin", "100%"], ["margin"]),
        (["MINE:blocks", "--memory", "1MiB", "--sampling-rate", "0.1"], ["number of examples"]),
        (["MINE:blocks", "--memory", "1MiB", "--find", "sequence-length"], ["--sequence-length"]),
        (["MINE:blocks", "--memory", "1MiB", "--sequence-length", "8"], ["sequence_length"]),
        (["MINE:blocks", "--memory", "1MiB", "--grouping", "worst:4"], ["worst:4"]),
        (["MINE:blocks", "--memory", "1MiB", "--grouping", "best:99"], ["99"]),
        (["MINE:fixed_triple", "--memory", "1MiB", "--batch-size", "6"], ["any size"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[3:]) if len(value) > 1 and value[0].startswith("MINE") else None,
)
def test_bad_requests_are_refused_with_the_remedy(mine, tmp_path, arguments, words):
    arguments = [argument.replace("MINE", mine) for argument in arguments]
    message = refused("fit", *arguments, "-o", tmp_path / "a.json")
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_the_rows_that_are_done(mine, tmp_path):
    path = tmp_path / "a.json"
    command = [sys.executable, "-m", "groupsearch", "fit", f"{mine}:blocks", "--memory", "256KiB", "--measure"]
    process = subprocess.Popen([*command, "-o", str(path)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while "Looking for" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    document = read_document(path, kind="profile")
    assert len(document["estimates"]) > 2
    assert f"{len(document['fit']['rows'])} rows" in errors
    assert document["fit"]["traced"]
