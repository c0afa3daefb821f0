"""``groupsearch train`` with thresholds and noise of its own, on the smallest built-in workload."""

from __future__ import annotations

import json
import math
from html import unescape
from typing import Any

import pytest

from groupsearch.records import read_document
from groupsearch.report import render_page
from tests.cli.running import refused, run

BASE = ("train", "digits-cnn", "--grouping", "uniform:3", "--steps", "2", "--json")


def trained(*args: object) -> dict[str, Any]:
    result = run(*BASE, *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_adaptive_thresholds_are_in_the_document_step_by_step():
    args = ("--thresholds", "adaptive:0.6", "--count-noise", "20", "--noise-allocation", "equal", "--seed", "0")
    first, same = trained(*args), trained(*args)
    assert [row[0] for row in first["thresholds"]] == [1, 2] == [row[0] for row in first["curve"]]
    assert all(len(row) == 4 and min(row) > 0 for row in first["thresholds"])
    assert first["allocation"]["adaptive"]["quantile"] == 0.6
    assert first["allocation"]["adaptive"]["count_noise"] == 20
    assert first["settings"]["noise_allocation"] == "equal"
    assert (first["thresholds"], first["curve"]) == (same["thresholds"], same["curve"])
    start = 1 / math.sqrt(3)
    assert all(start * math.exp(-0.3) < r < start * math.exp(0.3) for r in first["thresholds"][0][1:])


def test_fixed_thresholds_are_stated_once():
    document = trained("--thresholds", "0.5,1,0.8", "--noise-allocation", "1,2,1")
    assert (document["allocation"], document["noise_allocation"]) == ([0.5, 1.0, 0.8], [1.0, 2.0, 1.0])
    assert document["thresholds"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--thresholds", "adaptive:2"), "adaptive, adaptive:0.7 or a number for each group"),
        (("--thresholds", "0.5,1"), "3 positive thresholds"),
        (("--noise-allocation", "adaptive"), "Expected global, equal or a number for each group"),
        (("--count-noise", "5"), "without --thresholds adaptive"),
        (("--thresholds", "dimension", "--count-noise", "5"), "without --thresholds adaptive"),
    ],
)
def test_what_cannot_be_allotted_is_refused(args: tuple[str, ...], message: str):
    assert message in refused(*BASE, *args)


def test_without_a_seed_nobody_can_draw_the_noise_again():
    """Two runs share nothing that is random, and the document holds nothing that it could be had from."""
    first, other = trained(), trained()
    assert first["curve"] != other["curve"]
    assert first["randomness"] == {"secret": True, "secure": False, "seed": None}
    assert "seed" not in first["settings"]
    assert first["added_delta"] < 1e-15
    different = {key for key in first if first[key] != other[key]}
    assert different <= {"curve", "metric", "checked", "watched", "step_seconds"}, (
        "all else is the same for every noise"
    )


def test_with_a_seed_runs_agree_bit_for_bit_and_text_document_and_page_say_what_that_means(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    told = [run(*BASE[:-1], "--seed", 2**32, "-o", path) for path in paths]
    first, same = (read_document(path, "train") for path in paths)
    assert [first[key] for key in ("curve", "metric")] == [same[key] for key in ("curve", "metric")]
    assert first["randomness"] == {"secret": False, "secure": False, "seed": 2**32}
    assert trained("--seed", 0)["curve"] != first["curve"], "2^32 and 0 are two seeds"
    page = unescape(render_page(first))
    for text in (" ".join(told[0].stderr.split()), page):
        assert "Experiment: noise and batches come from seed 4294967296" in text
        assert "Epsilon holds for nobody who knows the seed" in text


def test_a_training_from_the_systems_entropy_says_so(tmp_path):
    told = run(*BASE[:-1], "-o", tmp_path / "a.json")
    assert "nobody can draw them again" in " ".join(told.stderr.split())
    assert "nobody can draw them again" in unescape(render_page(read_document(tmp_path / "a.json")))


def test_a_secure_training_draws_from_a_cipher_and_takes_no_seed():
    first, other = trained("--secure"), trained("--secure")
    assert first["randomness"] == {"secret": True, "secure": True, "seed": None}
    assert first["curve"] != other["curve"]
    assert "secure=True" in refused(*BASE, "--secure", "--seed", "1")


def test_every_batch_is_watched_where_that_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    small = ("--setting", "blocks=1", "--setting", "width=8", "--steps", 2, "--grouping", "all-layer", "--seed", 1)
    assert run("train", "digits-vit", *small, "--watch", 1, "-o", path).exit_code == 0
    watched = read_document(path)["watched"]
    assert watched["rate"] == 1
    assert watched["runs"] == watched["batches"] >= 2
    assert "0<=x<=1" in refused("train", "digits-vit", *small, "--watch", 2)
