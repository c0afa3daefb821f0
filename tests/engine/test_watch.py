"""The watch in training: a difference that the check could not know refuses the step that would release it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.truth.check import Reading
from groupsearch.engine.truth.watch import Watch
from groupsearch.errors import GroupSearchError, TruthError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import observe_sites, trace_model
from tests.support.cases import EVERY_CASE

SIZE = 40


def data(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(SIZE, 6, generator=generator), "y": torch.arange(SIZE) % 3}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Late(nn.Module):
    """Begins to mix when it is told to."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.drop, self.h = nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)
        self.mixing = False
        self._mix = mix

    def forward(self, x: Tensor) -> Tensor:
        z = self.drop(torch.tanh(self.a(x)))
        return self.h(self._mix(z) if self.mixing else z)


def private(
    model: nn.Module, loss: Any = cross_entropy, watch: float = 1.0, **settings: Any
) -> tuple[torch.optim.Optimizer, PoissonBatches, PrivateEngine]:
    sites = observe_sites(model, data(), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = PoissonBatches(
        data(), expected_batch_size=12, steps=4, physical_batch=5, generator=torch.Generator().manual_seed(1)
    )
    plan = ClipPlan(Grouping((), sites), max_grad_norm=0.5)
    generator = torch.Generator().manual_seed(2)
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=1.0,
        batches=batches,
        loss=loss,
        watch=watch,
        generator=generator,
        **settings,
    )
    return optimizer, batches, engine


def run(model: nn.Module, optimizer: torch.optim.Optimizer, batches: PoissonBatches, at: Any = None) -> int:
    steps = 0
    for number, logical in enumerate(batches):
        if at is not None and number == 1:
            at(model)
        for batch in logical:
            cross_entropy(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def start_mixing(model: Any) -> None:
    model.mixing = True


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z - z.mean(0),
    "roll": lambda z: 0.5 * z + 0.5 * z.roll(1, 0),
    "flip": lambda z: z.flip(0) + z.roll(1, 0),  # of an odd number, the one in the middle stays
    "size": lambda z: z / len(z),
    "from four examples on": lambda z: z - z.mean(0) if len(z) > 3 else z,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_begins_to_mix_in_training_refuses_the_step(name: str) -> None:
    model = Late(MIXING[name])
    optimizer, batches, engine = private(model)
    weights: list[Tensor] = []

    def begin(model: Any) -> None:
        start_mixing(model)
        weights.append(model.h.weight.detach().clone())

    with pytest.raises(TruthError, match=r"watch in training found that.*depends on the other"):
        run(model, optimizer, batches, begin)
    assert engine.steps == 1
    assert torch.equal(model.h.weight, weights[0])
    with pytest.raises(TruthError, match="watch in training"):
        optimizer.step()


def test_mixing_of_large_batches_is_seen_before_the_first_step() -> None:
    model = Late(MIXING["from four examples on"])
    model.mixing = True
    with pytest.raises(TruthError, match=r"'h'|module"):
        private(model)


def test_a_watched_training_is_the_training_unwatched_bit_for_bit() -> None:
    found = []
    for watch in (0.0, 1.0):
        torch.manual_seed(4)
        model = Late(MIXING["mean"])
        torch.manual_seed(5)
        optimizer, batches, engine = private(model, watch=watch)
        torch.manual_seed(6)
        assert run(model, optimizer, batches) == 4
        watched = engine.report().watched
        if watch:
            assert watched is not None
            assert watched.runs == watched.batches > 4
            assert watched.worst < 1e-4
            assert watched.seconds > 0
        else:
            assert watched is None
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


KINDS = (
    *("linear-2d", "conv2d", "embedding-repeated", "positions-broadcast", "positions-without-batch", "class-token"),
    *("parameter-used-twice", "bare-einsum", "bare-linear", "reused-other-length", "tied-embedding-head", "lora"),
    *("checkpoint-tied-reentrant", "folded-positions", "second-positions", "experts-first", "gpt2", "t5", "vit"),
)


@pytest.mark.parametrize("name", KINDS)
def test_no_right_model_alarms_it(name: str) -> None:
    case = EVERY_CASE[name]
    model = case.model(torch.float32)
    example = case.batch(torch.float32)
    plan = ClipPlan(Grouping((), observe_sites(model, example, case.loss)), max_grad_norm=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = PoissonBatches(
        case.batch(torch.float32, 9),
        expected_batch_size=5,
        steps=3,
        physical_batch=4,
        generator=torch.Generator().manual_seed(1),
    )
    how: dict[str, Any] = {"batches": batches, "loss": case.loss, "watch": 1.0}
    engine = make_private(model, optimizer, plan, noise_multiplier=1.0, **how)
    for logical in batches:
        for batch in logical:
            case.loss(model, batch).mean().backward()
        optimizer.step()
    watched = engine.report().watched
    assert watched is not None
    assert watched.runs >= 3
    assert watched.worst < 1e-3


def test_a_mode_that_was_not_checked_is_looked_at_at_once() -> None:
    model = Late(lambda z: z - z.mean(0))
    model.mixing = True
    model.eval()
    mix = model._mix
    model._mix = lambda z: mix(z) if model.training else z
    optimizer, batches, engine = private(model, watch=1e-9)
    assert "evaluation" in str(engine.report())
    model.train()
    with pytest.raises(TruthError, match="watch in training"):
        run(model, optimizer, batches)


def test_a_look_that_takes_long_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("groupsearch.engine.truth.watch.time.perf_counter", lambda: clock[0])
    watch = Watch(None, nullcontext, Reading(), 0.01, "training")  # type: ignore[arg-type]
    monkeypatch.setattr("groupsearch.engine.truth.watch.mode_of", lambda model: "training")
    monkeypatch.setattr(watch, "_subject", SimpleNamespace(model=None))
    monkeypatch.setattr(watch, "_entropy", random.Random(5))

    def look(batch: Any) -> None:
        clock[0] += 12.0  # as long as twelve batches
        watch.watched = replace(watch.watched, runs=watch.watched.runs + 1)

    monkeypatch.setattr(watch, "_look", look)
    for _ in range(150_000):
        watch.see(None)
        clock[0] += 1.0
    assert watch.watched.runs > 20
    assert 0.01 < watch.watched.seconds / clock[0] < 0.0225


def test_detaching_ends_the_watch() -> None:
    model = Late(MIXING["mean"])
    optimizer, batches, engine = private(model)
    engine.detach()
    run(model, optimizer, batches, start_mixing)
    watched = engine.report().watched
    assert watched is not None
    assert watched.batches == 0


def test_a_rate_outside_of_its_range_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="rate between 0 and 1"):
        private(Late(MIXING["mean"]), watch=1.5)


# -- make_private and the report ---------------------------------------------------------------


def test_make_private_checks_the_model_that_it_is_given() -> None:
    model = Late(MIXING["mean"])
    plan = ClipPlan(Grouping((), observe_sites(model, data(), cross_entropy)))
    model.mixing = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TruthError, match="depends on the other"):
        make_private(
            model, optimizer, plan, noise_multiplier=1.0, expected_batch_size=8, loss=cross_entropy, sample=data()
        )
    model.mixing = False
    engine = make_private(
        model, optimizer, plan, noise_multiplier=1.0, expected_batch_size=8, loss=cross_entropy, sample=data()
    )
    report = engine.report()
    assert report.checked is not None
    assert report.checked.mode == "training"
    assert report.watched is None
    assert "compared with plain autograd" in str(report)


def test_a_report_without_a_check_says_so_and_has_that_of_the_trace() -> None:
    model = Late(MIXING["mean"])
    trace = trace_model(model, data(), cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = ClipPlan(Grouping.parse(trace, "layer-wise"))
    report = make_private(model, optimizer, plan, noise_multiplier=1.0, expected_batch_size=8).report()
    assert report.checked is None
    assert report.traced == trace.checked is not None
    assert [(s.name, s.kind, s.group) for s in report.sites] == [("a", "linear", 0), ("h", "linear", 1)]
    assert "Not checked: give make_private the loss" in str(report)
    assert "When the plan was traced" in str(report)


def test_the_record_of_a_trace_survives_its_document() -> None:
    trace = trace_model(Late(MIXING["mean"]), data(), cross_entropy)
    assert type(trace).from_json(trace.to_json()).checked == trace.checked is not None
