"""The command that writes a grouping for another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from groupsearch.cli.export import command
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.export import to_fastdp, to_jax_privacy
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Trace
from groupsearch.records import read_document

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ROOT / "reports" / "digits-vit-checkpointed.json"
PROFILE = ROOT / "profiles" / "hf-roberta-base-b40-cpu-checkpoint-blocks.json"


def export(*args: object) -> str:
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def plan_of(path: Path, boundaries: list[int] | str) -> ClipPlan:
    trace = Trace.from_json(read_document(path)["trace"])
    make: Any = Grouping.parse if isinstance(boundaries, str) else Grouping.from_boundaries
    return ClipPlan(make(trace, boundaries))


def test_a_grouping_of_a_profile_is_a_clipping_style() -> None:
    plan = plan_of(PROFILE, "best:4")
    assert export(PROFILE, "--grouping", "best:4", "--format", "fastdp").splitlines() == to_fastdp(plan)
    written = json.loads(export(PROFILE, "--grouping", "best:4", "--format", "fastdp", "--json"))
    assert written == {
        "format": "fastdp",
        "boundaries": list(plan.grouping.boundaries),
        "clipping_style": to_fastdp(plan),
    }


def test_the_recommended_grouping_is_the_default() -> None:
    plan = plan_of(SEARCH, read_document(SEARCH)["recommended"]["boundaries"])
    written = json.loads(export(SEARCH, "--format", "jax-privacy", "--json"))
    assert written == {"format": "jax-privacy", "boundaries": list(plan.grouping.boundaries), **to_jax_privacy(plan)}
    assert json.loads(export(SEARCH, "--format", "jax-privacy")) == to_jax_privacy(plan)


def test_thresholds_follow_max_grad_norm() -> None:
    written = json.loads(export(PROFILE, "--grouping", "uniform:4", "--format", "jax-privacy", "--max-grad-norm", "3"))
    assert list(written["l2_clip_norm"].values()) == [1.5] * 4


def test_a_profile_without_a_grouping_and_a_model_fastdp_cannot_train_are_refused() -> None:
    with pytest.raises(GroupSearchError, match="--grouping"):
        export(PROFILE, "--format", "fastdp")
    with pytest.raises(GroupSearchError, match="kind parameter"):
        export(SEARCH, "--format", "fastdp")
