"""docs/architectures.md: what the engine makes of architectures that docs/models.md does not list, found by running them.

``python -m tests.support.architecture_table`` runs all and writes the page; with names (or parts of names, or ``0/4`` for one
part of four) it runs those and keeps the other rows.
"""

# ruff: noqa: E501
from __future__ import annotations

import copy
import math
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.plan.trace import Site
from groupsearch.tracer.sites import observe_sites
from tests.support.alike import alike
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.reference import one_example, trainable

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
FLOOR = {torch.float32: 1e-3, torch.float64: 1e-3}
HEADER = ("architecture", "kind", "outcome", "sites", "error", "in")
INTRODUCTION = """\
# Architectures of transformers

{} classes beyond those of [models.md](models.md), each small, from its configuration with random weights and trained as
its class builds it: in training mode, with the dropout, experts and attention that it comes with. One step of the engine
is compared with one-example-at-a-time autograd, over one group and over as many groups as no parameter spans; random
draws are made alike for all examples meanwhile. Where that holds, the model is traced and takes a step with its draws
left free, too. {}.

- *outcome*: `right`; or what the engine says where it refuses. Parameters that a class holds and its loss never uses are
  refused by name; such a row says which, that autograd agrees, and what comes of the rest when they are frozen.
- *sites*: uses of layers that own trainable parameters, by kind, as in models.md.
- *error*: the largest of any clipped sum, relative to the largest number that an example adds to the parameter (or a
  thousandth of the largest in the model), rounded up to a power of ten, *in* this type of numbers.

The page is written by `python -m tests.support.architecture_table`, in parts if names, or parts of names, are given; a sample is
run again by the tests and all of it by `pytest -m slow`.

"""
_NUMBERS = re.compile(r" \(.*?\)")
UNUSED = re.compile(r"no use of these trainable parameters: (.*?)\. ")
Gradients = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """What came of one architecture.

    Attributes:
        outcome: ``right``, ``refused``, ``WRONG`` or ``CRASH``.
        error: the largest, relative to the largest number an example adds to the parameter; None if nothing ran.
        dtype: that it was found in.
        sites: kinds of sites and how many.
        frozen: parameters that the class does not use, and that had to be frozen first.
        says: of a refusal or a crash.
    """

    outcome: str
    error: float | None = None
    dtype: torch.dtype = torch.float64
    sites: str = ""
    frozen: tuple[str, ...] = ()
    says: str = ""


def judge(architecture: Architecture, freely: bool = True) -> Verdict:
    """Compare the engine with one example at a time, in training mode, dropout as configured; drawn alike, and freely."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dtype, model, batch, truth = _truth(architecture)
        except ValueError:  # batch normalisation, which refuses a single example
            dtype = torch.float32
            model, batch = architecture.model(dtype), architecture.batch(dtype)
            return _attempt(lambda: _compare(model, batch, architecture.loss, [], dtype))
        with alike():
            frozen: tuple[str, ...] = ()
            verdict = _attempt(lambda: _compare(model, batch, architecture.loss, truth, dtype))
            named = UNUSED.search(verdict.says)
            if verdict.outcome == "refused" and named:
                frozen = tuple(named.group(1).split(", "))
                used = [n for n in frozen if any(bool(g[n].any()) for g in truth)]
                if used:
                    return Verdict("FALSE", None, dtype, says=f"called unused, and are used: {used}")
                for name in frozen:
                    model.get_parameter(name).requires_grad_(False)
                rest = [{n: x for n, x in g.items() if n not in frozen} for g in truth]
                verdict = _attempt(lambda: _compare(model, batch, architecture.loss, rest, dtype), frozen)
        if verdict.outcome != "right" or not freely:
            return verdict
        free = _attempt(lambda: _step_freely(model, batch, architecture.loss, verdict))
        return free


def _attempt(work: Callable[[], Verdict], frozen: tuple[str, ...] = ()) -> Verdict:
    try:
        verdict = work()
        return Verdict(
            verdict.outcome, verdict.error, verdict.dtype, verdict.sites, frozen or verdict.frozen, verdict.says
        )
    except GroupSearchError as error:
        return Verdict("refused", frozen=frozen, says=" ".join(str(error).split()))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Verdict(
            "CRASH", frozen=frozen, says=f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"
        )


def _truth(architecture: Architecture) -> tuple[torch.dtype, nn.Module, Any, Gradients]:
    for dtype in (torch.float32,) if architecture.single else (torch.float64, torch.float32):
        model, batch = architecture.model(dtype), architecture.batch(dtype)
        try:
            with alike():
                return dtype, model, batch, per_example(copy.deepcopy(model), batch, architecture.loss)
        except (RuntimeError, TypeError, NotImplementedError):
            if dtype == torch.float32:
                raise
    raise AssertionError


def per_example(model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> Gradients:
    """Every example's gradient, from that example alone."""
    parameters = trainable(model)
    found = []
    for i in range(len(next(iter(batch.values())))):
        model.zero_grad()
        loss(model, one_example(batch, i)).sum().backward()  # a layer's own backward may add to .grad by itself
        grads = {n: p.grad for n, p in parameters.items()}
        found.append({n: torch.zeros_like(parameters[n]) if g is None else g for n, g in grads.items()})
    return found


def groupings(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """No boundary; and all boundaries that no parameter spans."""
    spans: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        for name in site.parameters:
            spans.setdefault(name, []).append(index)
    inside = {b for span in spans.values() for b in range(span[0] + 1, span[-1] + 1)}
    every = tuple(b for b in range(1, len(sites)) if b not in inside)
    return [(), every] if every else [()]


def clipped(
    truth: Gradients, groups: Sequence[set[str]], threshold: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The clipped sums, and the largest number in any example's part of each."""
    total = {n: torch.zeros_like(x) for n, x in truth[0].items()}
    largest = dict.fromkeys(total, 0.0)
    for gradient in truth:
        for names in groups:
            norm = sum(float(gradient[n].double().abs().square().sum()) for n in names) ** 0.5
            factor = min(1.0, threshold / norm) if norm else 1.0
            for n in names:
                total[n] += factor * gradient[n]
                if gradient[n].numel():
                    largest[n] = max(largest[n], float((factor * gradient[n]).abs().max()))
    return total, largest


def _compare(
    model: nn.Module, batch: Any, loss: Callable[..., Tensor], truth: Gradients, dtype: torch.dtype
) -> Verdict:
    sites = observe_sites(copy.deepcopy(model), batch, loss)
    norms = sorted(sum(float(x.double().abs().square().sum()) for x in g.values()) ** 0.5 for g in truth)
    limit, worst = norms[len(norms) // 2], 0.0
    for boundaries in groupings(sites):
        plan = gs.ClipPlan(gs.Grouping(boundaries, sites), max_grad_norm=limit)
        groups: list[set[str]] = [set() for _ in range(plan.grouping.groups)]
        for index, site in enumerate(sites):
            groups[plan.grouping.group_of(index)] |= set(site.parameters)
        sums = _sums(copy.deepcopy(model), batch, loss, plan)
        expected, largest = clipped(truth, groups, limit / len(groups) ** 0.5)
        floor = FLOOR[dtype] * max(largest.values())
        for name, want in expected.items():
            if not want.numel():
                continue
            error = float((sums[name] - want).abs().max()) / max(largest[name], floor)
            worst = max(worst, error) if error == error else float("inf")
    kinds = Counter(site.kind for site in sites)
    described = f"{len(sites)}: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
    return Verdict("right" if worst <= TOLERANCE[dtype] else "WRONG", worst, dtype, described)


def _sums(model: nn.Module, batch: Any, loss: Callable[..., Tensor], plan: Any) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    gs.make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
    loss(model, batch).mean().backward()
    optimizer.step()
    return {n: p.grad for n, p in trainable(model).items() if p.grad is not None}


def _step_freely(model: nn.Module, batch: Any, loss: Callable[..., Tensor], found: Verdict) -> Verdict:
    """The same with whatever dropout draws: it must be taken, and give finite sums no longer than the sensitivity."""
    trace = gs.trace_model(copy.deepcopy(model), batch, loss)
    plan = gs.ClipPlan(gs.Grouping((), trace.sites), max_grad_norm=1.0)
    sums = _sums(copy.deepcopy(model), batch, loss, plan)
    length = sum(float(x.double().square().sum()) for x in sums.values()) ** 0.5
    size = len(next(iter(batch.values())))
    if not length <= size * plan.sensitivity * 1.001:
        return Verdict("WRONG", length, found.dtype, found.sites, found.frozen, "longer than the sensitivity allows")
    return found


def row(architecture: Architecture, verdict: Verdict) -> tuple[str, ...]:
    """What the page says of an architecture."""
    name = f"`{architecture.name}`" + (f", {architecture.note}" if architecture.note else "")
    frozen = f"; never used, to be frozen: {_named(verdict.frozen)}" if verdict.frozen else ""
    if verdict.outcome == "right":
        assert verdict.error is not None
        reached = f"1e{max(-16, math.ceil(math.log10(max(verdict.error, 1e-16)))):03d}"
        return name, architecture.kind, f"right{frozen}", verdict.sites, reached, str(verdict.dtype)[6:]
    says = _NUMBERS.sub("", verdict.says.split(". ")[0]).replace("|", "/")
    return name, architecture.kind, f"{verdict.outcome}: {says}{frozen}", "-", "-", "-"


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def page(rows: Sequence[Sequence[str]]) -> str:
    """The whole page."""
    counts = Counter(cells[2].split(":")[0].split(";")[0] for cells in rows)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = (HEADER, ("---",) * len(HEADER), *rows)
    return INTRODUCTION.format(len(rows), told) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written() -> dict[str, tuple[str, ...]]:
    """The rows of the page as it is, each as its cells, by the first."""
    if not PAGE.exists():
        return {}
    found = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {cells[0]: cells for cells in (tuple(line.split(" | ")) for line in found[2:])}


def main(wanted: Sequence[str]) -> None:
    """Judge the architectures whose names contain one of these, or all, and write their rows."""
    rows, every = written(), ARCHITECTURES
    for part in [text for text in wanted if "/" in text]:
        index, parts = map(int, part.split("/"))
        every, wanted = every[index::parts], [text for text in wanted if text != part]
    for architecture in every:
        if not wanted or any(part in architecture.name for part in wanted):
            began = time.perf_counter()
            verdict = judge(architecture)
            cells = row(architecture, verdict)
            print(*cells[:1], *cells[2:], f"{time.perf_counter() - began:.1f} s", sep=" | ", flush=True)
            rows = {**written(), cells[0]: cells}
            order = [row(each, Verdict("refused"))[0] for each in ARCHITECTURES]
            PAGE.write_text(page([rows[name] for name in order if name in rows]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
