"""Architectures of transformers as they come, against one example at a time; docs/architectures.md has the outcome."""

from __future__ import annotations

import pytest

from tests.support.architecture_table import Verdict, judge, row, written
from tests.support.architectures import ARCHITECTURES, Architecture

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLE = {
    "AlbertForSequenceClassification",
    "XLNetForSequenceClassification",
    "GPTNeoXForCausalLM",
    "MambaForCausalLM",
    "Llama4ForCausalLM",
    "Dinov2ForImageClassification",
    "Swinv2ForImageClassification",
    "RegNetForImageClassification",
    "PatchTSTForPrediction",
}


def _named(architecture: Architecture) -> str:
    return row(architecture, Verdict("refused"))[0]


def _check(architecture: Architecture) -> None:
    """The same outcome as written; another processor rounds otherwise, so that an error may be ten times as large."""
    verdict = judge(architecture)
    assert verdict.outcome in ("right", "refused"), verdict
    found, stated = row(architecture, verdict), written()[_named(architecture)]
    assert found[:4] == stated[:4], "run `python -m tests.support.architecture_table`"
    if verdict.outcome == "right":
        assert float(found[4]) <= 10.5 * float(stated[4])


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in SAMPLE], ids=_named)
def test_a_sample_is_right_or_refused_by_name(architecture: Architecture) -> None:
    _check(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name not in SAMPLE], ids=_named)
def test_every_other_one_is_right_or_refused_by_name(architecture: Architecture) -> None:
    _check(architecture)


def test_the_page_lists_every_architecture_once_and_none_is_wrong() -> None:
    assert list(written()) == [_named(architecture) for architecture in ARCHITECTURES]
    outcomes = [cells[2] for cells in written().values()]
    assert all(outcome.startswith(("right", "refused")) for outcome in outcomes)
    assert sum(outcome.startswith("right") for outcome in outcomes) >= 150
