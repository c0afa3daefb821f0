"""A clip plan in the words of other engines, or the reason why they cannot say it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan

_FASTDP_KINDS = ("linear", "conv", "embedding", "norm")


def to_fastdp(plan: ClipPlan) -> list[str]:
    """The grouping as fastDP's ``clipping_style``: the layer that closes each group, input side first.

    fastDP (arXiv 2210.00038 and 2310.19215; read at version 2.0.0) closes a group at each layer of
    the list as backward reaches it, and clips every group to R / sqrt(M). The first layer of the model
    must be in the list, or what backward reaches after the last name is not trained; it is in this one.
    The rest of the plan goes with ``clipping_fn="Abadi", max_grad_norm=plan.max_grad_norm``, or with
    ``clipping_fn="automatic"``, which is ``auto-s`` with R = 1.

    What cannot be seen from a plan: fastDP computes wrong gradients for grouped convolutions, and leaves
    three-dimensional ones and subclasses of the layers it knows untrained.

    Raises:
        GroupSearchError: for what fastDP cannot do, or does wrong without a word: thresholds that are
            not R / sqrt(M), ``auto-v``, ``auto-s`` with another R than 1, noise per group, layers that
            are used twice or do not have the batch first, tied weights, bare parameters, norms without bias
            (RMSNorm).
    """
    _refuse_unsaid(plan, "fastDP")
    thresholds = plan.thresholds
    equal = plan.max_grad_norm / math.sqrt(plan.grouping.groups)
    if not all(math.isclose(r, equal, rel_tol=1e-9) for r in thresholds):
        raise _refusal("fastDP", f"thresholds {thresholds}", f"clips every group to R / sqrt(M) = {equal:g}")
    if plan.rule == "auto-v" or (plan.rule == "auto-s" and plan.max_grad_norm != 1):
        found = f"the rule {plan.rule} with max_grad_norm {plan.max_grad_norm:g}"
        raise _refusal("fastDP", found, "has abadi with any R, and auto-s with R = 1")
    sites = plan.grouping.sites
    uses = Counter(site.layer for site in sites)
    owners = Counter(name for site in sites for name in site.parameters)
    for site in sites:
        bare = site.kind == "norm" and not any(name.rpartition(".")[2] == "bias" for name in site.parameters)
        if site.kind not in _FASTDP_KINDS or bare:
            raise _refusal("fastDP", f"{site.name!r} of kind {site.kind}", "would leave it untrained")
        if site.layout != "first":
            raise _refusal("fastDP", f"{site.name!r}, whose examples are {site.layout}", "wants the batch first")
        if uses[site.layer] > 1:
            raise _refusal("fastDP", f"layer {site.layer!r}, which is used {uses[site.layer]} times", "keeps one use")
        if tied := [name for name in site.parameters if owners[name] > 1]:
            raise _refusal("fastDP", f"the tied parameter {tied[0]!r}", "leaves one use out of its norm")
    return [sites[low].layer for low, _ in plan.grouping.spans]


def to_jax_privacy(plan: ClipPlan) -> dict[str, Any]:
    """The plan as a prefix tree of thresholds, the form of jax_privacy's ``l2_clip_norm``.

    jax_privacy (from version 2.2 on) clips the subtree under each leaf of the prefix as one group. Groups
    of layers are no subtrees of a model's parameters, so the parameters are arranged by group first. The
    result has ``l2_clip_norm``, a mapping of group to threshold, and ``parameters``, a mapping of group to
    the qualified names in it: differentiate with respect to ``{group: {name: array}}``.

    Raises:
        GroupSearchError: for another rule than ``abadi``, thresholds that change, noise per group, or a
            parameter that several groups use: it would be in two subtrees.
    """
    _refuse_unsaid(plan, "jax_privacy")
    if plan.rule != "abadi":
        raise _refusal("jax_privacy", f"the rule {plan.rule}", "clips with min(1, R / norm), which is abadi")
    parameters: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for group, (low, high) in enumerate(plan.grouping.spans):
        key = f"group_{group}"
        names = dict.fromkeys(name for site in plan.grouping.sites[low:high] for name in site.parameters)
        for name in names:
            if owner.setdefault(name, key) != key:
                raise _refusal("jax_privacy", f"{name!r} in {owner[name]} and {key}", "has each parameter in one group")
        parameters[key] = list(names)
    return {"l2_clip_norm": dict(zip(parameters, plan.thresholds, strict=True)), "parameters": parameters}


def _refuse_unsaid(plan: ClipPlan, engine: str) -> None:
    if plan.adaptive is not None:
        raise _refusal(engine, "thresholds that change from step to step", "takes fixed ones")
    if plan.noise_allocation != "global":
        raise _refusal(engine, f"the noise allocation {plan.noise_allocation!r}", "adds the same noise everywhere")


def _refusal(engine: str, found: str, why: str) -> GroupSearchError:
    return GroupSearchError(
        f"Expected a plan that {engine} can carry out, found {found}: {engine} {why}. Choose another plan, or train "
        "with groupsearch's own engine."
    )
