"""What every grouping costs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from groupsearch.documents import Profile
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Begun, Interrupted
from groupsearch.jobs.request import LEVELS, StepRequest, bytes_of, door, texts_of
from groupsearch.jobs.stages import (
    Asked,
    add_checks,
    choose_jointly,
    estimated,
    make_setup,
    part_of,
    start_document,
    tracing,
)
from groupsearch.plan.joint import JOINT


@dataclass(frozen=True)
class ProfileRequest(StepRequest):
    """Of which groupings to estimate the peak.

    Attributes:
        budget: peak that ``norm_method="joint"`` keeps within, as in ``12GiB``; None for the least there is.
        grouping: groupings as text; none for all-layer, layer-wise, block-wise, uniform:4 and best:2..8.
        max_groups: where the exact front of groups ends.
        random: random groupings to add.
        verify: check each estimate: ``none``, ``simulate``, ``measure`` or ``all``.
        seed: of the random groupings.
    """

    _: KW_ONLY
    budget: int | str | None = None
    grouping: str | Sequence[str] = ()
    max_groups: int = 8
    random: int = 0
    verify: str = "none"
    seed: int = 0


def run(request: ProfileRequest) -> Profile:
    """Trace one step, estimate the peaks of groupings, and check them as far as that is asked for.

    Raises:
        BudgetError: when the budget is below the least peak.
        GroupSearchError: for a model, grouping or device that there is not.
        Interrupted: with every estimate, once they are known.
    """
    joint, budget = request.norm_method == JOINT, bytes_of(request.budget)
    if budget is not None and not joint:
        raise GroupSearchError(
            "Found --budget without --norm-method joint: with one rule for all norms there is nothing to choose but "
            "the grouping. Give --norm-method joint too, or --grouping within:12GiB for the fewest groups in a budget."
        )
    setup = make_setup(replace(request, norm_method="mixed") if joint else request, cards=True)
    if "measurements" in LEVELS[request.verify]:
        setup.check_measurable()
    texts = texts_of(request.grouping)
    header = start_document(
        "profile",
        setup,
        request,
        device=setup.device,
        groupings=list(texts),
        max_groups=request.max_groups,
        random=request.random,
        seed=request.seed,
        verify=request.verify,
        **({"norm_method": JOINT, "budget_bytes": budget} if joint else {}),
    )
    request.notify(Begun(header))
    trace = chosen = None
    if joint:
        request.notify(tracing(setup, " by every norm method"))
        setup, trace, chosen = choose_jointly(setup, budget)
        header["settings"] = {**part_of(header, "settings"), "methods": dict(setup.options.methods)}
    asked = Asked(texts, request.max_groups, request.random, request.seed)
    known = estimated(setup, asked, request.notify, trace=trace, joint=chosen)
    try:
        add_checks(known, setup, request.verify, request.notify)
    except KeyboardInterrupt as interrupt:
        done = len(known.simulations) + len(known.measurements)
        said = f"Interrupted; the document has every estimate and {done} checks of them."
        raise Interrupted(said, Profile.from_json({**header, **known.to_json()})) from interrupt
    return Profile.from_json({**header, **known.to_json()})


profile = door(ProfileRequest, run)
