"""``groupsearch train`` with thresholds and noise of its own, on the smallest built-in workload."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.cli.running import refused, run

BASE = ("train", "digits-cnn", "--grouping", "uniform:3", "--steps", "2", "--json")


def trained(*args: object) -> dict[str, Any]:
    result = run(*BASE, *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_adaptive_thresholds_are_in_the_document_step_by_step():
    args = ("--thresholds", "adaptive:0.6", "--count-noise", "20", "--noise-allocation", "equal")
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
