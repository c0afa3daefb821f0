"""profile, train and verify on real models: what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from groupsearch.documents import Profile
from groupsearch.records import read_document, write_document
from tests.cli.running import ROOT, refused, run, spawn

SMALL = ("digits-vit", "--batch-size", "16", "--setting", "blocks=1", "--setting", "width=8")
FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F

def batch():
    return {"x": torch.randn(6, 4), "y": torch.tensor([0, 1, 2, 0, 1, 2])}

def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def good(width: int = 5):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)), batch(), loss

def batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), batch(), loss

def mean_loss():
    return good()[0], batch(), lambda model, batch: loss(model, batch).mean()
"""


@pytest.fixture(scope="module")
def factories(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(textwrap.dedent(FACTORIES))
    return path


@pytest.fixture(scope="module")
def profile():
    """A small profile as a process of its own writes it to standard output."""
    result = spawn("profile", *SMALL, "--verify", "simulate", "--random", 2, "--seed", 7, "--json")
    assert result.returncode == 0, result.stderr
    return result


def test_json_is_the_document_and_nothing_else(profile):
    document = json.loads(profile.stdout)
    assert (document["schema_version"], document["kind"]) == (1, "profile")
    assert document["model"]["name"] == "digits-vit"
    assert document["model"]["batch_size"] == 16
    assert document["model"]["blocks"] == 1
    assert "all-layer" in profile.stderr


def test_a_profile_has_what_others_rely_on(profile):
    document = json.loads(profile.stdout)
    sites = document["trace"]["sites"]
    assert {"name", "kind", "positions", "inputs", "outputs", "parameters"} <= set(sites[0])
    names = [row["grouping"] for row in document["estimates"]]
    assert {"all-layer", "layer-wise", "best:2", "random:1", "random:2"} <= set(names)
    cuts = [tuple(row["boundaries"]) for row in document["estimates"]]
    assert len(set(cuts)) == len(cuts)
    assert all(row["groups"] == len(row["boundaries"]) + 1 for row in document["estimates"])
    assert all(sum(row["breakdown"].values()) == row["peak_bytes"] for row in document["estimates"])
    assert document["floor_bytes"] <= min(row["peak_bytes"] for row in document["estimates"])
    assert [row["groups"] for row in document["front"]] == list(range(1, len(document["front"]) + 1))
    assert document["summary"] in profile.stderr


def test_every_estimate_is_simulated_and_close(profile):
    document = json.loads(profile.stdout)
    estimates = {row["grouping"]: row["peak_bytes"] for row in document["estimates"]}
    assert [row["grouping"] for row in document["simulations"]] == list(estimates)
    for row in document["simulations"]:
        assert row["relative_error"] == pytest.approx(estimates[row["grouping"]] / row["peak_bytes"] - 1)
        assert abs(row["relative_error"]) < 0.005


def test_the_seed_decides_the_random_groupings(profile):
    def randoms(text):
        rows = json.loads(text)["estimates"]
        return [row["boundaries"] for row in rows if row["grouping"].startswith("random:")]

    again = run("profile", *SMALL, "--random", 2, "--seed", 7, "--json").stdout
    other = run("profile", *SMALL, "--random", 2, "--seed", 8, "--json").stdout
    assert randoms(again) == randoms(profile.stdout)
    assert randoms(other) != randoms(again)


def test_default_file_and_no_overwriting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("profile", *SMALL).exit_code == 0
    path = tmp_path / "profiles" / "digits-vit-b16-cpu.json"
    written = path.read_bytes()
    assert read_document(path, "profile")["model"]["batch_size"] == 16
    assert "--force" in refused("profile", *SMALL)
    assert path.read_bytes() == written
    assert run("profile", *SMALL, "--grouping", "best:2", "--force").exit_code == 0
    assert [row["grouping"] for row in read_document(path)["estimates"]] == ["best:2"]


def test_a_factory_of_the_users_own(factories):
    result = run("profile", f"{factories}:good", "--setting", "width=7", "--json")
    assert result.exit_code == 0
    assert [site["outputs"] for site in json.loads(result.stdout)["trace"]["sites"]] == [7, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits-vti"], ["digits-vit", "groupsearch models"]),
        (["nowhere.py:factory"], ["nowhere.py", "path"]),
        (["MINE:nothing"], ["nothing", "good"]),
        (["MINE:batch_norm"], ["BatchNorm", "GroupNorm"]),
        (["MINE:mean_loss"], ["per example", "reduction='none'"]),
        (["MINE:good", "--setting", "hight=3"], ["hight", "width"]),
        (["MINE:good", "--grouping", "99"], ["99", "between 1 and 1"]),
        (["MINE:good", "--grouping", "worst:4"], ["worst:4", "layer-wise"]),
        (["MINE:good", "--grouping", "best:99"], ["99", "2 sites"]),
        (["MINE:good", "--grouping", "within:1KiB"], ["the least that any grouping", "80.8 KiB"]),
        (["MINE:good", "--setting", "width"], ["key=value"]),
        (["MINE:good", "--device", "gpu"], ["cuda"]),
        (["MINE:good", "--device", "cuda:99"], ["--device cpu"]),
        (["MINE:good", "-o", "/proc/version"], ["--force"]),
        (["MINE:good", "-o", "/proc/new.json"], ["/proc"]),
        (["MINE:good", "-o", "no/such/folder/a.json"], ["mkdir -p"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].isascii() else None,
)
def test_bad_requests_are_refused_with_the_remedy(factories, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("MINE", str(factories)) for argument in arguments]
    output = [] if "-o" in arguments else ["-o", tmp_path / "a.json"]
    message = refused("profile", *arguments, *output)
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


def seconds_of(pid: int) -> float:
    """What a process has had of the processor."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_an_interrupt_keeps_the_estimates(tmp_path):
    path = tmp_path / "a.json"
    command = [sys.executable, "-m", "groupsearch", "profile", "digits-vit", "--random", "200", "--verify", "simulate"]
    process = subprocess.Popen([*command, "-o", str(path)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "Tracing" in process.stderr.readline()
    while seconds_of(process.pid) < 15:  # of the processor: on a busy machine as far as on a quiet one
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    document = read_document(path)
    assert len(document["estimates"]) > 100
    assert 0 < len(document["simulations"]) < len(document["estimates"])
    assert f"{len(document['simulations'])} checks" in errors


def test_train_writes_curve_metric_and_cost():
    result = run("train", "digits-vit", "--grouping", "best:2", "--steps", 3, "--evaluate-every", 1, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [point[0] for point in document["curve"]] == [1, 2, 3]
    assert document["metric"]["mean"] == document["curve"][-1][2]
    assert document["groups"] == 2
    assert document["steps"] == 3
    assert document["epsilon"] == pytest.approx(8, rel=0.02)
    assert 0 < document["delta"] < 1 / 1437


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["hf:gpt2", "--grouping", "best:2"], "data"),
        (["digits-vit", "--grouping", "400"], "between 1 and"),
        (["digits-vit", "--grouping", "best:2", "--epsilon", "0"], "above zero"),
        (["digits-vit", "--grouping", "best:2", "--sampling-rate", "2"], "sampling_rate"),
        (["digits-vit"], "--grouping"),
    ],
)
def test_training_that_cannot_be_is_refused(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert word in refused("train", *arguments)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1)])
def test_verify_measures_again(profile, tmp_path, factor, code):
    document = json.loads(profile.stdout)
    document["estimates"] = [row for row in document["estimates"] if row["grouping"] == "all-layer"]
    document["estimates"][0]["peak_bytes"] = round(document["estimates"][0]["peak_bytes"] * factor)
    path = write_document(tmp_path / "a.json", document)
    result = run("verify", path, "--tolerance", "2%", "--json")
    assert result.exit_code == code, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["within"] == (code == 0)
    assert row["relative_error"] == pytest.approx(row["estimate_bytes"] / row["peak_bytes"] - 1)
    assert row["tolerance"] == 0.02
    assert row["step_seconds"] > 0
    assert ("all-layer" in result.stderr.split("Error:")[-1]) == (code == 1) or code == 0


def test_what_several_processes_cost_is_predicted_from_a_measured_step(factories, tmp_path):
    place = tmp_path / "profile.json"
    asked = ("profile", f"{factories}:good", "--world-size", 4, "--bandwidth", "1Mbit", "--latency", "1us", "-o", place)
    result = run(*asked, "--grouping", "all-layer", "--grouping", "layer-wise")
    assert result.exit_code == 0, result.output
    found = Profile.load(place).communication
    numbers = 4 * 5 + 5 + 5 * 3 + 3
    assert found.size_bytes == 4 * numbers
    assert found.sent_bytes == 1.5 * 4 * numbers
    whole, each = found.rows
    assert whole.step_seconds == pytest.approx(found.alone_seconds + whole.link_seconds)
    assert whole.hidden == pytest.approx(0, abs=1e-9)
    assert found.alone_seconds < each.step_seconds < whole.step_seconds + 6e-6
    assert 0 < each.starts_seconds[1] <= each.starts_seconds[0] < found.alone_seconds
    assert "4 processes, 258 B sent by each per step" in result.stderr
    assert "of which backward hides" in result.stderr


def test_communication_without_a_link_or_a_device_is_refused():
    assert "Give --world-size 4 --bandwidth 10Gbit" in refused("profile", "digits-cnn", "--world-size", 4)
    told = ("profile", "digits-cnn", "--world-size", 4, "--bandwidth")
    assert "10Gbit or 400Mbit" in refused(*told, "10GB")
    assert "cuda:h100" in refused(*told, "10Gbit", "--device", "cuda:h100")
