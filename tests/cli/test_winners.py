"""``train --grouping search.json``: what a search found is trained by its document's name, or refused before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import groupsearch as gs
from groupsearch.documents import Search
from groupsearch.errors import BudgetError, DocumentError, GroupSearchError
from groupsearch.jobs.winners import winner, winner_of
from tests.cli.running import ROOT, refused, run

SEARCH = ROOT / "reports" / "digits-vit-checkpointed.json"
SMALL = {"blocks": 2, "width": 8}
SETTINGS = [part for key, value in SMALL.items() for part in ("--setting", f"{key}={value}")]
TRAIN = ("train", "digits-vit", *SETTINGS, "--steps", 1, "--json")


def changed(place: Path, **parts: Any) -> Path:
    place.write_text(json.dumps(json.loads(SEARCH.read_text()) | parts))
    return place


def trained(*args: object) -> dict[str, Any]:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_recommendation_a_number_or_the_best_within_a_peak() -> None:
    found = Search.load(SEARCH)
    assert found.recommended is not None
    assert winner(str(SEARCH)).candidate == found.recommended == winner(found).candidate
    assert winner(f"{SEARCH}#3").candidate == found.candidates[2]
    for pick in ("16MiB", "20MiB", "40MiB", 10**9):
        best = winner(str(SEARCH), pick).candidate
        within = [c for c in found.candidates if c.peak_bytes <= gs.units.parse_bytes(str(pick))]
        assert best.metric.mean == max(c.metric.mean for c in within)
        assert best in within


def test_the_name_of_a_file_may_have_the_mark_of_a_number(tmp_path: Path) -> None:
    (tmp_path / "of #2").mkdir()
    place = changed(tmp_path / "of #2" / "run#7.json")
    found = Search.load(place)
    assert winner(str(place)).candidate == found.recommended
    assert winner(f"{place}#3").candidate == found.candidates[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search, as if it had been of a smaller model, with a candidate that has everything that is searched."""
    profile = gs.profile("digits-vit", setting=SMALL, grouping=["best:2", "best:3"])
    body, estimates = json.loads(SEARCH.read_text()), profile.estimates
    candidates = [
        body["recommended"] | {key: value for key, value in each.to_json().items() if key in body["recommended"]}
        for each in estimates
    ]
    candidates[1] |= {"rule": "auto-s", "allocation": "dimension", "variant": "checkpoint blocks"}
    names = ("checkpoint none", "checkpoint blocks")
    ways = [
        {"name": name, "checkpoint": name.split()[1], "micro_batches": 1, "batch_size": 288, "norm_method": "mixed"}
        for name in names
    ]
    parts = {"trace": profile.to_json()["trace"], "candidates": candidates, "variants": ways}
    place = tmp_path_factory.mktemp("search") / "search.json"
    return changed(place, recommended=candidates[0], **parts)


def test_it_is_trained_and_what_choosing_cost_is_told_beside_the_weights(small: Path, tmp_path: Path) -> None:
    found, place = Search.load(small), tmp_path / "weights"
    document = trained(*TRAIN, "--grouping", small, "--save", place)
    assert found.recommended is not None
    assert document["boundaries"] == list(found.recommended.boundaries)
    assert document["grouping"] == str(small)
    assert document["rule"] == "abadi"
    assert found.cost.selection is not None
    card = json.loads((place / "privacy.json").read_text())
    assert card["search"]["statement"] == found.cost.selection.statement
    assert found.cost.selection.statement in (place / "README.md").read_text()


def test_rule_and_thresholds_and_the_way_of_a_step_come_with_it(small: Path) -> None:
    document = trained(*TRAIN, "--grouping", f"{small}#2")
    assert document["boundaries"] == list(Search.load(small).candidates[1].boundaries)
    assert document["rule"] == "auto-s"
    assert document["allocation"] == "dimension"
    assert document["settings"]["checkpoint"] == "blocks"
    asked = ("--rule", "abadi", "--thresholds", "uniform")
    document = trained(*TRAIN, "--grouping", f"{small}#2", *asked)
    assert (document["rule"], document["allocation"]) == ("abadi", "uniform")


def test_from_python_a_document_will_do(small: Path) -> None:
    found = Search.load(small)
    assert found.recommended is not None
    made = gs.train("digits-vit", setting=SMALL, steps=1, grouping=found)
    assert made.boundaries == found.recommended.boundaries


@pytest.mark.parametrize(
    ("grouping", "pick", "error", "message"),
    [
        ("{search}#8", None, DocumentError, r"from 1 to 7 after #, found '8'.*7 candidates, by falling peak"),
        ("{search}#best", None, DocumentError, "found 'best'"),
        ("{search}#0", None, DocumentError, "found '0'"),
        ("{search}", "1MiB", BudgetError, r"at most 1\.00 MiB.*has none below 15\.3 MiB.*--budget"),
        ("{search}#2", "1GiB", GroupSearchError, "name a candidate each"),
        ("best:4", "1GiB", GroupSearchError, "without the document of a search.*within:12GiB"),
        ("{none}", None, DocumentError, r"does not in .*optimize --resume.*best:4"),
        ("{none}", "1GiB", BudgetError, "no candidate that was trained"),
        ("{none}#1", None, DocumentError, "no candidates"),
        ("{missing}", None, DocumentError, "Expected a groupsearch document at .*missing.json"),
        ("{train}", None, DocumentError, "kind profile or search, found one of kind train"),
    ],
)
def test_what_a_search_does_not_have_is_refused(
    grouping: str, pick: str | None, error: type[GroupSearchError], message: str, tmp_path: Path
) -> None:
    places = {"search": SEARCH, "missing": tmp_path / "missing.json"}
    places["none"] = changed(tmp_path / "none.json", recommended=None, candidates=[])
    places["train"] = changed(tmp_path / "train.json", kind="train")
    with pytest.raises(error, match=message):
        winner_of(grouping.format(**places), pick)


def test_it_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    place = changed(tmp_path / "none.json", recommended=None)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    command = "import sys; from groupsearch.cli import main; main(sys.argv[1:])"
    for more in (["--grouping", place], ["--grouping", f"{SEARCH}#99"], ["--grouping", "best:2", "--save", tmp_path]):
        args = [sys.executable, "-c", command, "train", "digits-vit", *map(str, more)]
        env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        found = subprocess.run(args, capture_output=True, text=True, env=env, timeout=120, check=False, cwd=ROOT)
        assert found.returncode == 2, found.stderr
        assert found.stderr.startswith("Error: "), found.stderr


def test_a_search_of_another_model_or_with_other_settings_is_refused() -> None:
    assert "Expected a search of digits-cnn, found one of digits-vit" in refused(
        "train", "digits-cnn", "--grouping", SEARCH, "--json"
    )
    message = refused("train", "digits-vit", "--setting", "blocks=1", "--grouping", SEARCH, "--json")
    assert "sites of the search in" in message
    assert "Train with the settings that were searched: --checkpoint blocks" in message
