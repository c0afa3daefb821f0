"""What every grouping costs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from groupsearch.documents import Profile
from groupsearch.documents.rows import Communication, Reduced
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Begun, Interrupted, Said
from groupsearch.jobs.request import LEVELS, StepRequest, bytes_of, door, texts_of
from groupsearch.jobs.stages import (
    Asked,
    Known,
    add_checks,
    choose_jointly,
    estimated,
    make_setup,
    part_of,
    start_document,
    tracing,
)
from groupsearch.plan.communication import Link, Pace, bucket_bytes, overlap
from groupsearch.plan.joint import JOINT
from groupsearch.units import parse_bandwidth, parse_latency


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
        world_size: processes of a training whose communication is predicted, from a step measured in one of them.
        bandwidth: between them, as in ``10Gbit``.
        latency: of a message, as in ``50us``.
    """

    _: KW_ONLY
    budget: int | str | None = None
    grouping: str | Sequence[str] = ()
    max_groups: int = 8
    random: int = 0
    verify: str = "none"
    seed: int = 0
    world_size: int | None = None
    bandwidth: str | None = None
    latency: str = "50us"


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
    link = _link(request)
    setup = make_setup(replace(request, norm_method="mixed") if joint else request, cards=True)
    if "measurements" in LEVELS[request.verify] or link is not None:
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
        if link is not None:
            request.notify(Said("Measuring when each site of a step is closed"))
            header["communication"] = communication(known, setup.pace(known.trace), link).to_json()
        add_checks(known, setup, request.verify, request.notify)
    except KeyboardInterrupt as interrupt:
        done = len(known.simulations) + len(known.measurements)
        said = f"Interrupted; the document has every estimate and {done} checks of them."
        raise Interrupted(said, Profile.from_json({**header, **known.to_json()})) from interrupt
    return Profile.from_json({**header, **known.to_json()})


def _link(request: ProfileRequest) -> Link | None:
    if request.world_size is None and request.bandwidth is None:
        return None
    if request.world_size is None or request.bandwidth is None:
        raise GroupSearchError(
            "Expected --world-size and --bandwidth together, found one of them. Give --world-size 4 --bandwidth 10Gbit "
            "to predict the communication of four processes."
        )
    return Link(request.world_size, parse_bandwidth(request.bandwidth), parse_latency(request.latency))


def communication(known: Known, pace: Pace, link: Link) -> Communication:
    """What several processes cost by grouping, for all that were estimated."""
    rows = []
    for row in known.estimates:
        found = overlap(known.trace, row.boundaries, pace, link)
        rows.append(
            Reduced(
                grouping=row.grouping,
                boundaries=row.boundaries,
                groups=row.groups,
                starts_seconds=found.starts_seconds,
                link_seconds=found.link_seconds,
                step_seconds=found.step_seconds,
                hidden=found.hidden,
            )
        )
    size_bytes = sum(bucket_bytes(known.trace, ()))
    return Communication(
        processes=link.processes,
        bytes_per_second=link.bytes_per_second,
        latency_seconds=link.latency_seconds,
        size_bytes=size_bytes,
        sent_bytes=link.sent_bytes(size_bytes),
        alone_seconds=pace.step_seconds,
        rows=tuple(rows),
    )


profile = door(ProfileRequest, run)
