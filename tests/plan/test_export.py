from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.export import to_fastdp, to_jax_privacy
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site

Gradient = Mapping[str, np.ndarray]


def site(layer: str, kind: str = "linear", parameters: Sequence[str] = ("weight", "bias"), use: int = 0) -> Site:
    names = tuple(name if "." in name else f"{layer}.{name}" for name in parameters)
    return Site(f"{layer}#{use}" if use else layer, layer, layer, kind, "ghost", 1, 2, 3, names, 8)


def chain(length: int) -> tuple[Site, ...]:
    kinds = ("embedding", "norm", "linear", "conv")
    return tuple(site(f"blocks.{i // 4}.{i % 4}", kinds[i % 4]) for i in range(length))


def plan_of(sites: Sequence[Site], boundaries: Sequence[int] = (), **settings: Any) -> ClipPlan:
    return ClipPlan(Grouping(tuple(boundaries), tuple(sites)), **settings)


@st.composite
def plans(draw: st.DrawFn) -> ClipPlan:
    sites = chain(draw(st.integers(1, 12)))
    return plan_of(sites, [b for b in range(1, len(sites)) if draw(st.booleans())], max_grad_norm=0.7)


def fastdp_groups(heads: Sequence[str], sites: Sequence[Site]) -> list[list[str]]:
    """The layers that fastDP clips together, read from its list as its backward hooks do; unclosed ones are lost."""
    groups, waiting = [], []
    for reached in reversed(sites):
        waiting.append(reached.layer)
        if reached.layer in heads:
            groups.append(waiting)
            waiting = []
    return groups


@given(plans())
def test_fastdp_derives_the_groups_and_thresholds_of_the_plan(plan: ClipPlan) -> None:
    heads, sites = to_fastdp(plan), plan.grouping.sites
    expected = [[s.layer for s in reversed(sites[low:high])] for low, high in reversed(plan.grouping.spans)]
    assert fastdp_groups(heads, sites) == expected
    assert plan.thresholds == pytest.approx([plan.max_grad_norm / math.sqrt(len(heads))] * len(heads))


def clipped(tree: Any, prefix: Any) -> Any:
    """What jax_privacy does to one example's gradient: the subtree under each leaf of the prefix has one norm."""
    if isinstance(prefix, Mapping):
        assert tree.keys() == prefix.keys()
        return {key: clipped(tree[key], prefix[key]) for key in tree}
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in tree.values()))
    return {key: leaf * min(1.0, prefix / norm) for key, leaf in tree.items()}


@given(plans(), st.integers(0, 1000))
def test_jax_privacy_clips_as_the_plan_does(plan: ClipPlan, seed: int) -> None:
    random = np.random.default_rng(seed)
    gradient = {n: random.normal(size=3) for s in plan.grouping.sites for n in s.parameters}
    exported = to_jax_privacy(plan)
    arranged = {group: {n: gradient[n] for n in names} for group, names in exported["parameters"].items()}
    found = clipped(arranged, exported["l2_clip_norm"])
    for m, (low, high) in enumerate(plan.grouping.spans):
        names = [n for s in plan.grouping.sites[low:high] for n in s.parameters]
        norm = np.linalg.norm(np.concatenate([gradient[n] for n in names]))
        for n in names:
            assert found[f"group_{m}"][n] == pytest.approx(gradient[n] * min(1.0, plan.thresholds[m] / norm))
    assert sorted(n for names in exported["parameters"].values() for n in names) == sorted(gradient)


def test_jax_privacy_has_the_sensitivity_of_the_plan() -> None:
    plan = plan_of(chain(6), (2, 3), allocation=(0.5, 1.0, 0.25))
    bound = math.sqrt(sum(r**2 for r in to_jax_privacy(plan)["l2_clip_norm"].values()))
    assert bound == pytest.approx(plan.sensitivity)


def test_a_parameter_used_twice_in_one_group_is_in_one_subtree() -> None:
    sites = (site("table", "embedding", ("weight",)), site("middle"), site("head", "linear", ("table.weight",)))
    exported = to_jax_privacy(plan_of(sites))
    assert exported["parameters"] == {"group_0": ["table.weight", "middle.weight", "middle.bias"]}


TIED = (site("table", "embedding", ("weight",)), site("middle"), site("head", "linear", ("table.weight",)))
CHAIN = chain(6)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of(CHAIN, (2,), allocation=(0.6, 0.8)), "thresholds"),
        (plan_of(CHAIN, rule="auto-v"), "auto-v"),
        (plan_of(CHAIN, rule="auto-s", max_grad_norm=2.0), "max_grad_norm 2"),
        (plan_of(CHAIN, (2,), noise_allocation=(1.0, 2.0)), "noise allocation"),
        (plan_of(CHAIN, allocation=AdaptiveQuantile()), "from step to step"),
        (plan_of([site("a"), site("b"), site("a", use=1)]), "used 2 times"),
        (plan_of(TIED), "tied"),
        (plan_of([site("a"), replace(site("window"), layout="folded")]), "folded"),
        (plan_of([site("a"), site("", "parameter", ("token",))]), "kind parameter"),
        (plan_of([site("a"), site("rms", "norm", ("weight",))]), "kind norm"),
    ],
)
def test_what_fastdp_would_do_wrong_is_refused(plan: ClipPlan, reason: str) -> None:
    with pytest.raises(GroupSearchError, match=reason):
        to_fastdp(plan)


def test_auto_s_with_r_one_is_fastdp_automatic() -> None:
    assert to_fastdp(plan_of(CHAIN, (3,), rule="auto-s")) == ["blocks.0.0", "blocks.0.3"]


def test_a_norm_with_only_its_bias_trained_is_no_rms_norm() -> None:
    assert to_fastdp(plan_of([site("n", "norm", ("bias",))])) == ["n"]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of(CHAIN, rule="auto-s"), "auto-s"),
        (plan_of(CHAIN, allocation=AdaptiveQuantile()), "from step to step"),
        (plan_of(CHAIN, noise_allocation="equal"), "noise allocation"),
        (plan_of(TIED, (2,)), "group_0 and group_1"),
    ],
)
def test_what_jax_privacy_has_no_words_for_is_refused(plan: ClipPlan, reason: str) -> None:
    with pytest.raises(GroupSearchError, match=reason):
        to_jax_privacy(plan)
