"""What is searched besides the grouping, and the ways of taking a step that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from groupsearch.clipping import RULES, AdaptiveQuantile
from groupsearch.errors import GroupSearchError
from groupsearch.options import NORM_METHODS, EngineOptions, checkpoint_interval

if TYPE_CHECKING:
    from groupsearch.grouping import Grouping
    from groupsearch.search import Choice
    from groupsearch.search.space import Variants
    from groupsearch.trace import Trace
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

THRESHOLDS = ("uniform", "dimension", "adaptive")  # of search.settings, without loading Optuna for --help
# What is tried where no values are given. The first two change the mechanism, the others memory and time alone.
DEFAULTS = {
    "rule": RULES,
    "thresholds": THRESHOLDS[:2],
    "checkpoint": ("none", "blocks"),
    "micro-batches": ("1", "2", "4"),
    "norm-method": NORM_METHODS,
}
COSTS = ("checkpoint", "micro-batches", "norm-method")


def values_of(vary: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    """What is searched and among which values; none where the defaults are meant.

    Raises:
        GroupSearchError: for a name or a value that is not known.
    """
    found = dict(vary) if isinstance(vary, Mapping) else dict.fromkeys(vary, ())
    return {name: check_values(name, values) for name, values in found.items()}


def check_values(name: str, values: Sequence[str]) -> list[str]:
    """The values, each once.

    Raises:
        GroupSearchError: for a name or a value that is not known.
    """
    if name not in DEFAULTS:
        raise GroupSearchError(f"Expected {', '.join(DEFAULTS)}, as in rule or rule=auto-s,abadi, found {name!r}.")
    if wrong := [each for each in values if not _is_known(name, each)]:
        known = ", ".join(DEFAULTS[name] if name != "thresholds" else THRESHOLDS)
        raise GroupSearchError(f"Expected values of {name} such as {known}, found {wrong[0]!r}.")
    return list(dict.fromkeys(values))


def searched(
    vary: Mapping[str, Sequence[str]], given_rule: str | None, own_rule: str, objective: str | None
) -> dict[str, Any]:
    """The part of the search's settings that says what is searched; the training's own rule is tried first.

    Raises:
        GroupSearchError: when the clip rule is both searched and given.
    """
    if "rule" in vary and given_rule is not None:
        raise GroupSearchError("Found --rule and --vary rule: the one fixes it, the other searches it. Leave one out.")
    rules = tuple(vary["rule"] or dict.fromkeys((own_rule, *RULES))) if "rule" in vary else ()
    allocations = tuple(vary["thresholds"] or DEFAULTS["thresholds"]) if "thresholds" in vary else ()
    objectives = ("metric", "peak", *(["time"] if objective else []))
    return {"rules": rules, "allocations": allocations, "objectives": objectives}


@dataclass(frozen=True, eq=False)
class Ways:
    """The ways of taking a step that ``--vary`` asks for, the command's own first, each with its trace.

    Attributes:
        setups: how a step is taken, by the name of the way.
        traces: one step of each.
    """

    setups: Mapping[str, Setup]
    traces: Mapping[str, Trace]

    @classmethod
    def of(cls, setup: Setup, trace: Trace, training: TrainSettings, vary: Mapping[str, Sequence[str]]) -> Ways:
        """Trace a step of every combination; of the command's own way there is a trace already."""
        assert setup.loaded.data is not None  # it is being trained
        batch = training.sampling_rate * setup.loaded.data.train_size
        own = {
            "checkpoint": setup.checkpoint,
            "micro-batches": str(setup.micro_batches),
            "norm-method": setup.options.norm_method,
        }
        names = [name for name in own if name in vary]
        tried = [dict.fromkeys((own[name], *(vary[name] or DEFAULTS[name]))) for name in names]
        setups = {}
        for values in product(*tried):
            way = dict(zip(names, values, strict=True))
            setups[_named(way)] = setup if way.items() <= own.items() else _changed(setup, way, batch)
        traces = {name: trace if each is setup else each.trace() for name, each in setups.items()}
        return cls(setups, traces)

    @cached_property
    def variants(self) -> Variants:
        """What says which way needs least for a grouping."""
        from groupsearch.search.space import Variants

        return Variants(self.traces)

    def of_choice(self, choice: Choice, training: TrainSettings) -> tuple[Grouping, TrainSettings]:
        """The grouping of a choice, and how it is trained: in the way that needs least memory, by its mechanism."""
        from groupsearch.grouping import Grouping

        name = self.variants.cheapest(choice.boundaries)
        settings = mechanism_of(choice, training)
        if len(self.setups) > 1:
            setup, own = self.setups[name], next(iter(self.setups.values()))
            if setup.micro_batches != own.micro_batches:
                physical = setup.loaded.batch_size if setup.micro_batches > 1 else None
                settings = replace(settings, physical_batch=physical)
            settings = replace(settings, checkpoint=setup.checkpoint, options=setup.options)
        return Grouping.from_boundaries(self.traces[name], choice.boundaries), settings

    def describe(self) -> list[dict[str, Any]]:
        """How every way takes its step, the command's own first; nothing where there is one alone."""
        if len(self.setups) == 1:
            return []
        return [
            {
                "name": name,
                "checkpoint": setup.checkpoint,
                "micro_batches": setup.micro_batches,
                "batch_size": setup.loaded.batch_size,
                "norm_method": setup.options.norm_method,
            }
            for name, setup in self.setups.items()
        ]


def mechanism_of(choice: Choice, training: TrainSettings) -> TrainSettings:
    """The training with the rule and the thresholds of a choice, where it has any."""
    rule = training.rule if choice.rule is None else choice.rule
    if choice.allocation is None:
        return replace(training, rule=rule)
    allocation = AdaptiveQuantile() if choice.allocation == "adaptive" else choice.allocation
    return replace(training, rule=rule, allocation=allocation)


def _changed(setup: Setup, way: Mapping[str, str], batch: float) -> Setup:
    """The setup in another way; a batch is cut evenly into its micro-batches."""
    changed = setup
    if "checkpoint" in way:
        changed = replace(changed, checkpoint=way["checkpoint"])
    if "norm-method" in way:
        changed = replace(changed, options=EngineOptions(norm_method=way["norm-method"]))
    if "micro-batches" in way:
        pieces = int(way["micro-batches"])
        settings = {**setup.settings, "batch_size": math.ceil(batch / pieces)}
        changed = replace(changed, micro_batches=pieces, settings=settings)
    return changed


def _named(way: Mapping[str, str]) -> str:
    words = {"checkpoint": "checkpoint {}", "micro-batches": "micro-batches {}", "norm-method": "norms {}"}
    return ", ".join(words[name].format(value) for name, value in way.items())


def _is_known(name: str, value: str) -> bool:
    if name == "thresholds":
        return value in THRESHOLDS
    if name == "micro-batches":
        return value.isdecimal() and int(value) > 0
    if name == "checkpoint":
        try:
            checkpoint_interval(value)
        except GroupSearchError:
            return False
        return True
    return value in DEFAULTS[name]
