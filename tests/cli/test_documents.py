"""The commands that only read documents: compare and report."""

from __future__ import annotations

import copy
import json

import pytest

from groupsearch.records import write_document
from tests.cli.running import refused, run
from tests.report.synthetic import profile_document, search_document, train_document, verify_document

DOCUMENTS = {
    "profile": profile_document,
    "search": search_document,
    "verify": verify_document,
    "train": train_document,
}


@pytest.fixture
def profile(tmp_path):
    return write_document(tmp_path / "a.json", profile_document())


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_report_draws_every_kind_beside_its_document(tmp_path, kind):
    path = write_document(tmp_path / f"{kind}.json", DOCUMENTS[kind]())
    result = run("report", path, "--json")
    page = tmp_path / f"{kind}.html"
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"page": str(page), "size_bytes": page.stat().st_size}
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_report_overwrites_only_with_force(profile, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert "--force" in refused("report", profile, "-o", page)
    assert page.read_text() == "mine"
    assert run("report", profile, "-o", page, "--force").exit_code == 0
    assert page.read_text(encoding="utf-8") != "mine"


def test_report_opens_the_page_it_wrote(profile, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert run("report", profile, "--open").exit_code == 0
    assert opened == [profile.with_suffix(".html").resolve().as_uri()]


def with_peaks(document, factor):
    changed = copy.deepcopy(document)
    for row in changed["estimates"]:
        row["peak_bytes"] = round(row["peak_bytes"] * factor)
    return changed


def test_compare_shows_every_shared_number(profile, tmp_path):
    other = write_document(tmp_path / "b.json", with_peaks(profile_document(), 1.05))
    rows = json.loads(run("compare", profile, other, "--json").stdout)["rows"]
    estimates = [row for row in rows if row["what"] == "estimate"]
    assert [row["grouping"] for row in estimates] == [row["grouping"] for row in profile_document()["estimates"]]
    assert all(row["change"] == pytest.approx(0.05, abs=1e-5) for row in estimates)
    text = run("compare", profile, other).stdout
    assert text.count("+5.00 %") == len(estimates)


@pytest.mark.parametrize(
    ("factor", "limit", "code"), [(1.05, "2%", 1), (1.05, "6%", 0), (0.9, "2%", 0), (1.01, "0.02", 0)]
)
def test_compare_fails_over_the_limit_and_only_when_worse(profile, tmp_path, factor, limit, code):
    other = write_document(tmp_path / "b.json", with_peaks(profile_document(), factor))
    result = run("compare", profile, other, "--fail-over", limit)
    assert result.exit_code == code
    assert ("+5.00 %" in result.stderr) == (code == 1)


def test_compare_counts_a_lower_metric_as_worse(tmp_path):
    before, after = search_document(), search_document()
    for row in after["candidates"]:
        if row["metric"]:
            row["metric"]["mean"] *= 0.9
    paths = [write_document(tmp_path / name, d) for name, d in (("a.json", before), ("b.json", after))]
    assert run("compare", *paths, "--fail-over", "5%").exit_code == 1
    assert run("compare", *reversed(paths), "--fail-over", "5%").exit_code == 0


def test_compare_of_nothing_in_common(profile, tmp_path):
    alone = {**profile_document(), "estimates": [], "front": [], "measurements": [], "simulations": []}
    del alone["nonprivate_peak_bytes"], alone["floor_bytes"]
    other = write_document(tmp_path / "b.json", alone)
    assert "--grouping" in refused("compare", profile, other)


@pytest.mark.parametrize("command", [["report"], ["verify"], ["compare"]], ids=" ".join)
@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "No such file"),
        ('{"schema_version": 1, "kind": "prof', "cut short"),
        ('{"name": "another tool"}', "other JSON"),
        ("\x00\x01", "no JSON"),
        ('{"schema_version": 99, "kind": "profile"}', "newer"),
    ],
    ids=["missing", "truncated", "foreign", "binary", "newer"],
)
def test_bad_documents_are_refused_and_nothing_is_written(tmp_path, command, text, word):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    before = sorted(tmp_path.iterdir())
    arguments = [*command, path, path] if command == ["compare"] else [*command, path]
    message = refused(*arguments)
    assert word in message
    assert "groupsearch" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_document_of_another_kind_is_refused(tmp_path):
    path = write_document(tmp_path / "train.json", train_document())
    assert "kind train" in refused("verify", path)


@pytest.mark.parametrize("share", ["two", "-1%", "nan"])
def test_a_share_that_is_none_is_refused(profile, share):
    assert "such as 2%" in refused("compare", profile, profile, "--fail-over", share)


def trained_otherwise():
    """A training as :func:`train_document` has it, with another grouping, budget and curve."""
    document = copy.deepcopy(train_document())
    document |= {"grouping": "layer-wise", "boundaries": [1, 2, 3], "groups": 4, "epsilon": 3.0, "learning_rate": 0.5}
    document["curve"] = [[step, loss + 0.1, metric - 0.02] for step, loss, metric in document["curve"][:-1]]
    document["metric"] = {"name": "accuracy", "mean": 0.5 * document["metric"]["mean"]}
    document["model"] = {**document["model"], "name": "another"}
    return document


def test_trainings_with_other_groupings_are_laid_over_each_other_settings_first(tmp_path):
    documents = {"a.json": train_document(), "b.json": trained_otherwise()}
    paths = [write_document(tmp_path / name, document) for name, document in documents.items()]
    told = json.loads(run("compare", *paths, "--json").stdout)
    unlike = {row["setting"]: (row["a"], row["b"]) for row in told["settings"]}
    assert list(unlike)[:2] == ["epsilon", "delta"]
    assert unlike["epsilon"] == (8.0, 3.0)
    assert unlike["grouping"] == ("best:4", "layer-wise")
    assert unlike["model"] == ("synthetic-vit", "another")
    assert unlike["learning_rate"][1] == 0.5
    assert not {"steps", "optimizer", "rule"} & unlike.keys(), "what is alike is not listed, but for epsilon and delta"
    (metric,) = [row for row in told["rows"] if row["what"] == "metric"]
    assert (metric["grouping"], metric["change"]) == ("best:4 / layer-wise", pytest.approx(-0.5))
    assert [row["step"] for row in told["curves"]] == [point[0] for point in train_document()["curve"]]
    assert told["curves"][0]["loss_b"] == pytest.approx(told["curves"][0]["loss_a"] + 0.1)
    assert told["curves"][-1]["metric_b"] is None
    text = run("compare", *paths).stdout
    assert text.index("epsilon") < text.index("metric") < text.index("loss A")
    assert run("compare", *paths, "--fail-over", "20%").exit_code == 1
    assert run("compare", *reversed(paths), "--fail-over", "20%").exit_code == 0


def test_metrics_of_another_name_are_not_compared_and_of_negative_ones_more_is_better(tmp_path):
    first, second = train_document(), trained_otherwise()
    first["metric"], second["metric"] = {"name": "negative loss", "mean": -4.0}, {"name": "negative loss", "mean": -3.0}
    paths = [write_document(tmp_path / name, d) for name, d in (("a.json", first), ("b.json", second))]
    assert run("compare", *paths, "--fail-over", "10%").exit_code == 0
    assert run("compare", *reversed(paths), "--fail-over", "10%").exit_code == 1
    second["metric"]["name"] = "accuracy"
    write_document(paths[1], second, force=True)
    rows = json.loads(run("compare", *paths, "--json").stdout)["rows"]
    assert "metric" not in {row["what"] for row in rows}
