"""The fewest operations within a budget, and the least peak, of any grouping with any norm methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from groupsearch.errors import BudgetError
from groupsearch.joint.alternatives import Alternatives
from groupsearch.joint.labels import Label, decide
from groupsearch.joint.problem import Form, Problem
from groupsearch.memory import peak_memory
from groupsearch.units import format_bytes

JOINT = "joint"
"""What documents and the command line call norm methods that were chosen together with the grouping."""
WIDTH = 256
Boundaries = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A grouping and a norm method per weight.

    Attributes:
        boundaries: of the groups.
        methods: for :class:`groupsearch.options.EngineOptions`, by weight.
        operations: multiply-accumulates of the norms and clipped sums, see
            :func:`groupsearch.joint.operations`.
        peak_bytes: the estimated peak.
        bound: no choice within the budget takes fewer operations; equal to ``operations`` where the choice is exact.
    """

    boundaries: Boundaries
    methods: Mapping[str, str]
    operations: int
    peak_bytes: int
    bound: int

    @property
    def gap(self) -> float:
        """How far above the bound the choice is, relative to it: 0 where exact, infinite where nothing is known."""
        if self.operations == self.bound:
            return 0.0
        return self.operations / self.bound - 1 if self.bound else math.inf


def fewest_operations(alternatives: Alternatives, budget_bytes: int, width: int = WIDTH) -> Choice:
    """The grouping and the methods with the fewest operations, and of those the fewest groups, within a budget.

    Sites that share a parameter go by one method.

    Args:
        alternatives: the step by every method.
        budget_bytes: largest estimated peak.
        width: how many partial decisions are kept at a site.

    Raises:
        BudgetError: when nothing within the budget was found; the message says whether there is nothing, and
            the least peak that was found.
    """
    problem = Problem(alternatives)
    # one number for both: operations count more than any number of groups
    unit = problem.length + 1
    least = [min(unit * form.operations for form in forms.values()) for forms in problem.forms]
    rest = [sum(least[:site]) for site in range(problem.length)]

    def score(before: int, form: Form, moment: int, closes: bool) -> int | None:
        return before + unit * form.operations + closes if moment <= budget_bytes else None

    best, bound = None, None
    if problem.outside_bytes <= budget_bytes:
        best, bound = decide(problem, 0, score, rest, width)
    if best is None:
        raise _refusal(problem, budget_bytes, width, cut_short=bound is not None)
    return _choice(alternatives, best, (best.score if bound is None else min(bound, best.score)) // unit)


def least_peak_choice(alternatives: Alternatives, width: int = WIDTH) -> tuple[Choice, int]:
    """The grouping and the methods with the least peak, of those the fewest operations; and a bound on the peak.

    Returns:
        The choice, and the bytes that no choice goes below: its peak where it is exact.
    """
    best, bound_bytes = _least(Problem(alternatives), width)
    choice = _choice(alternatives, best, 0)
    with suppress(BudgetError):  # where that is cut short what was found stands
        choice = fewest_operations(alternatives, best.score, width)
    return choice, bound_bytes


def _least(problem: Problem, width: int) -> tuple[Label, int]:
    """The decisions with the least peak, and the bytes that none go below."""

    def score(before: int, form: Form, moment: int, closes: bool) -> int | None:
        return max(before, moment)

    best, bound = decide(problem, problem.outside_bytes, score, [0] * problem.length, width)
    assert best is not None  # nothing is refused
    return best, best.score if bound is None else min(bound, best.score)


def _refusal(problem: Problem, budget_bytes: int, width: int, *, cut_short: bool) -> BudgetError:
    least, bound_bytes = _least(problem, width)
    known = "the search was cut short" if cut_short else "no grouping and choice of norm methods reaches it"
    exact = least.score == bound_bytes
    reach = "which is the least there is" if exact else f"and none goes below {format_bytes(bound_bytes)}"
    return BudgetError(
        f"Expected a budget that a grouping of this model keeps to with some choice of norm methods, found "
        f"{format_bytes(budget_bytes)} ({budget_bytes} bytes): {known}. One with {format_bytes(least.score)} "
        f"({least.score} bytes) was found, {reach}. Raise the budget, lower the batch size or turn activation "
        f"checkpointing on."
    )


def _choice(alternatives: Alternatives, label: Label, bound: int) -> Choice:
    decided = list(label.decisions())
    boundaries = tuple(site for site, decision in enumerate(decided) if decision.closes and site)
    methods = {w: made.method for w, made in zip(alternatives.weights, decided, strict=True) if w is not None}
    trace = alternatives.trace(methods)
    peak_bytes = peak_memory(trace, boundaries).peak_bytes
    return Choice(boundaries, methods, alternatives.operations(methods), peak_bytes, bound)
