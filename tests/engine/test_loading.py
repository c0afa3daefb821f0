from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from groupsearch.engine import make_private
from groupsearch.engine.loading import LogicalBatch, PoissonBatches, PoissonSampler
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites

SIZE = 40
TABLE = {"x": torch.arange(SIZE * 3.0).reshape(SIZE, 3), "number": torch.arange(SIZE)}


class Rows(Dataset[dict[str, Tensor]]):
    """The table as a map-style data set."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in TABLE.items()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches_of(dataset: Any = TABLE, seed: int = 0, **settings: Any) -> PoissonBatches:
    settings = {"expected_batch_size": 6, "steps": 12, "physical_batch": 4, "generator": seeded(seed), **settings}
    return PoissonBatches(dataset, **settings)


def numbers(batches: PoissonBatches, count: int | None = None) -> list[list[list[int]]]:
    """The examples' numbers, by logical and physical batch, of the next logical batches."""
    return [[batch["number"].tolist() for batch in logical] for logical in islice(batches, count)]


def joined(pieces: list[list[int]]) -> list[int]:
    return [number for piece in pieces for number in piece]


@pytest.mark.parametrize("dataset", [TABLE, Rows()], ids=["mapping", "map-style"])
@pytest.mark.parametrize("workers", [0, 2])
def test_physical_batches_are_together_the_poisson_sample(dataset: Any, workers: int) -> None:
    drawn = list(PoissonSampler(SIZE, 2 / SIZE, 20, seeded()))
    assert {0, 1} < {-(-len(indices) // 2) for indices in drawn}, "the seed should give empty and cut batches"
    batches = batches_of(dataset, expected_batch_size=2, steps=20, physical_batch=2, num_workers=workers)
    found = numbers(batches)
    assert [joined(pieces) for pieces in found] == [indices.tolist() for indices in drawn]
    assert all(len(piece) <= 2 for pieces in found for piece in pieces)


def test_a_physical_batch_has_the_rows_of_its_examples() -> None:
    for dataset in (TABLE, Rows()):
        for logical in batches_of(dataset):
            for batch in logical:
                assert batch.keys() == TABLE.keys()
                assert torch.equal(batch["x"], TABLE["x"][batch["number"]])


def test_elements_of_a_tensor_data_set_are_collated() -> None:
    data = TensorDataset(*TABLE.values())
    found = [[row.tolist() for _, row in logical] for logical in batches_of(data)]
    assert found == numbers(batches_of())


def test_collate_fn_makes_the_physical_batches() -> None:
    found = [list(logical) for logical in batches_of(Rows(), collate_fn=lambda rows: [int(r["number"]) for r in rows])]
    assert found == numbers(batches_of())


def test_without_a_limit_a_logical_batch_comes_in_one_piece() -> None:
    found = numbers(batches_of(physical_batch=None))
    assert all(len(pieces) <= 1 for pieces in found)
    assert [joined(pieces) for pieces in found] == [joined(pieces) for pieces in numbers(batches_of())]


def test_lengths_and_rate_are_stated() -> None:
    batches = batches_of()
    assert (len(batches), batches.sampling_rate, batches.expected_batch_size) == (12, 6 / SIZE, 6.0)
    for logical in batches:
        pieces = list(logical)
        assert len(pieces) == len(logical)
        assert sum(len(piece["number"]) for piece in pieces) == logical.examples


def test_iterating_again_goes_on_with_fresh_batches() -> None:
    whole = numbers(batches_of(steps=24))
    batches = batches_of(steps=12)
    assert [*numbers(batches), *numbers(batches)] == whole
    assert batches.taken == 24


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [0, 5, 12, 17])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(done: int, workers: int) -> None:
    whole = numbers(batches_of(steps=24))
    first = batches_of(num_workers=workers)
    seen = []
    while len(seen) < done:  # workers have loaded ahead of this
        for logical in first:
            seen.append([batch["number"].tolist() for batch in logical])
            if len(seen) == done:
                break
    state = first.state_dict(exact=True)
    second = batches_of(seed=99, num_workers=workers)
    second.load_state_dict(state, exact=True)
    rest = numbers(second)
    assert seen + rest == whole[: done + len(rest)]
    assert len(rest) == 12 - done % 12, "the iteration ends where it would have"


def test_a_state_is_a_snapshot() -> None:
    batches = batches_of()
    numbers(batches, 3)
    state = batches.state_dict(exact=True)
    rest = numbers(batches)
    again = batches_of()
    again.load_state_dict(state, exact=True)
    assert numbers(again) == rest


def test_after_a_break_iteration_goes_on_with_the_first_unfinished_batch() -> None:
    whole = numbers(batches_of())
    batches = batches_of()
    for step, logical in enumerate(batches):
        pieces = iter(logical)
        next(pieces, None)
        if step == 4:
            break
        list(pieces)
    assert batches.taken == 4
    assert numbers(batches) == whole[4:]


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(1, 9) | st.none(), st.integers(0, 10**6))
def test_no_example_is_lost_or_doubled(size: int, rate: float, limit: int | None, seed: int) -> None:
    table = {"number": torch.arange(size)}
    expected = rate * size
    batches = PoissonBatches(table, expected_batch_size=expected, steps=5, physical_batch=limit, generator=seeded(seed))
    drawn = PoissonSampler(size, expected / size, 5, seeded(seed))
    assert [joined(pieces) for pieces in numbers(batches)] == [indices.tolist() for indices in drawn]


def test_saving_in_the_middle_of_a_logical_batch_is_refused() -> None:
    batches = batches_of()
    for logical in batches:
        for _ in logical:
            with pytest.raises(GroupSearchError, match="handed out in part"):
                batches.state_dict()
        batches.state_dict()


def test_asking_for_the_next_batch_too_soon_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="one per optimizer step"):
        list(batches_of())
    unfinished = ([next(iter(logical), None)] for logical in batches_of())
    with pytest.raises(GroupSearchError, match="not finished"):
        list(unfinished)


def test_an_empty_batch_may_be_passed_over() -> None:
    batches = batches_of(expected_batch_size=1, steps=20)
    sizes = []
    for logical in batches:
        sizes.append(logical.examples)
        if logical.examples:
            list(logical)
    assert 0 in sizes
    assert batches.taken == 20


def test_a_logical_batch_is_iterated_once_and_contains_nothing() -> None:
    logical = next(logical for logical in batches_of() if "labels" not in logical and len(list(logical)) > 1)
    with pytest.raises(GroupSearchError, match="second time"):
        list(logical)


def test_two_iterations_at_once_are_refused() -> None:
    batches = batches_of()
    one = iter(batches)
    list(next(one))
    list(next(iter(batches)))
    with pytest.raises(GroupSearchError, match="at once"):
        next(one)


def test_a_generator_that_is_used_elsewhere_is_refused() -> None:
    generator = seeded()
    noisy = ((list(logical), torch.randn(3, generator=generator)) for logical in batches_of(generator=generator))
    with pytest.raises(GroupSearchError, match="generator of its own"):
        list(noisy)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    numbers(batches_of(num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_by_default_batches_are_random() -> None:
    assert numbers(batches_of(generator=None)) != numbers(batches_of(generator=None))


def test_a_step_takes_one_whole_logical_batch_once() -> None:
    batches = batches_of()
    with pytest.raises(GroupSearchError, match="none yet"):
        batches.check_step(0)
    for logical in batches:
        for _ in logical:
            with pytest.raises(GroupSearchError, match="that is begun"):
                batches.check_step(logical.examples)
        with pytest.raises(GroupSearchError, match="that is finished"):
            batches.check_step(logical.examples + 1)
        batches.check_step(logical.examples)
        with pytest.raises(GroupSearchError, match="that is stepped"):
            batches.check_step(logical.examples)


def test_a_state_of_other_data_is_refused() -> None:
    state = batches_of().state_dict()
    for other in (batches_of(expected_batch_size=7), batches_of({"number": torch.arange(50)})):
        with pytest.raises(GroupSearchError, match="same data"):
            other.load_state_dict(state)
    with pytest.raises(GroupSearchError, match="state_dict"):
        batches_of().load_state_dict({"size": SIZE})


class Run:
    """A model, its optimizer, its engine and its batches, in training."""

    def __init__(self, physical_batch: int | None = 4, workers: int = 0, batches: PoissonBatches | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.batches = batches or batches_of(FLOATS, physical_batch=physical_batch, num_workers=workers)
        sites = observe_sites(self.model, {"x": FLOATS["x"][:4]}, loss_of)
        self.engine = make_private(
            self.model,
            self.optimizer,
            ClipPlan(Grouping((1,), sites), max_grad_norm=0.1),
            noise_multiplier=1.0,
            batches=self.batches,
            generator=seeded(1),
        )

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.engine, self.batches

    def save(self, path: Path) -> None:
        model, optimizer, *ours = self.parts
        states = [model.state_dict(), optimizer.state_dict(), *(part.state_dict(exact=True) for part in ours)]
        torch.save(states, path)

    def load(self, path: Path, exact: bool) -> None:
        (model, optimizer, *ours), (weights, moments, *states) = self.parts, torch.load(path)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        for part, state in zip(ours, states, strict=True):
            part.load_state_dict(state, exact=exact)

    def train(self, steps: int) -> None:
        for logical in islice(self.batches, steps):
            self.step_on(logical)

    def step_on(self, logical: LogicalBatch) -> None:
        for batch in logical:
            loss_of(self.model, batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def give_up(self, logical: LogicalBatch) -> None:
        for batch in logical:
            loss_of(self.model, batch).mean().backward()
        self.optimizer.zero_grad()

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


FLOATS = {"x": torch.randn(SIZE, 3, dtype=torch.float64, generator=seeded(5))}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).flatten().square()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_private_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit(workers: int, tmp_path: Path) -> None:
    whole, first, second = Run(), Run(workers=workers), Run(workers=workers)
    whole.train(12)
    first.train(7)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt", exact=True)
    second.train(12)
    assert torch.equal(second.weights, whole.weights)
    assert (second.engine.steps, second.batches.taken) == (12, 12)
    assert second.engine.epsilon(1e-3) == whole.engine.epsilon(1e-3)


def test_the_physical_limit_does_not_change_what_is_trained() -> None:
    runs = [Run(limit) for limit in (None, 1, 4)]
    for run in runs:
        run.train(12)
    assert not torch.equal(runs[0].weights, Run().weights)
    for run in runs[1:]:
        torch.testing.assert_close(run.weights, runs[0].weights, rtol=1e-12, atol=1e-12)


def test_the_engine_refuses_a_step_that_is_not_on_one_whole_logical_batch() -> None:
    run = Run(physical_batch=1)
    with pytest.raises(GroupSearchError, match="none yet"):
        run.optimizer.step()
    pieces = iter(next(iter(run.batches)))
    loss_of(run.model, next(pieces)).mean().backward()
    with pytest.raises(GroupSearchError, match="that is begun"):
        run.optimizer.step()
    for batch in pieces:
        loss_of(run.model, batch).mean().backward()
    with pytest.raises(GroupSearchError, match="more examples than were handed out"):
        loss_of(run.model, {"x": FLOATS["x"][:1]}).mean().backward()
    with pytest.raises(GroupSearchError, match="that is finished"):
        run.optimizer.step()
    assert run.engine.steps == 0


def test_the_engine_refuses_a_second_step_on_one_logical_batch() -> None:
    run = Run()
    run.train(3)
    with pytest.raises(GroupSearchError, match="that is stepped"):
        run.optimizer.step()
    assert run.engine.steps == 3


def test_a_batch_given_up_is_not_stepped_on() -> None:
    run = Run()
    for batch in next(iter(run.batches)):
        loss_of(run.model, batch).mean().backward()
    run.optimizer.zero_grad()
    with pytest.raises(GroupSearchError, match="other examples than those"):
        run.optimizer.step()


def test_a_batch_given_up_may_be_taken_again_from_its_physical_batches() -> None:
    run, straight = Run(), Run()
    straight.train(1)
    pieces = list(next(iter(run.batches)))
    for batch in pieces:
        loss_of(run.model, batch).mean().backward()
    run.optimizer.zero_grad()
    for batch in pieces:
        loss_of(run.model, batch).mean().backward()
    run.optimizer.step()
    assert torch.equal(run.weights, straight.weights)


def test_no_logical_batch_is_left_out_by_a_look_at_its_losses() -> None:
    """``zero_grad(); continue`` on chosen batches went unseen: 6 batches, 3 steps counted."""
    run = Run()
    left_out = (run.give_up(logical) for logical in run.batches)
    with pytest.raises(GroupSearchError, match="drawn and finished but not stepped on") as refusal:
        list(left_out)
    assert run.engine.steps == 0
    assert not re.search(r"\d", str(refusal.value)), "a number of it may be private"
    assert "not finite adds nothing" in str(refusal.value), "no reason to leave one out"


@pytest.mark.parametrize("way", ["after a break", "by a checkpoint", "at the end"])
def test_a_logical_batch_is_not_left_out_in_another_way(way: str) -> None:
    run = Run()
    run.train(11 if way == "at the end" else 2)
    left_out = iter(run.batches)
    run.give_up(next(left_out))
    ways = {
        "after a break": lambda: next(iter(run.batches)),
        "by a checkpoint": run.batches.state_dict,
        "at the end": lambda: next(left_out),
    }
    with pytest.raises(GroupSearchError, match="not stepped on"):
        ways[way]()


def test_without_an_engine_batches_may_be_left_out() -> None:
    run = Run()
    run.engine.detach()
    assert len(numbers(batches_of())) == 12
    for logical in run.batches:
        list(logical)
    assert run.batches.taken == 12


def test_an_empty_batch_takes_a_step_of_noise_alone_and_is_not_left_out() -> None:
    empty = batches_of(FLOATS, expected_batch_size=0.3)
    run = Run(batches=empty)
    before = run.weights
    first = next(logical for logical in empty if not logical.examples)  # not even iterated
    assert first.examples == 0
    run.optimizer.step()
    assert run.engine.steps == 1
    assert not torch.equal(run.weights, before), "noise"
    passed_over = (run.step_on(logical) for logical in empty if logical.examples)
    with pytest.raises(GroupSearchError, match="not stepped on"):
        list(passed_over)


def test_a_batch_of_which_nothing_is_finite_takes_a_step_of_noise_alone() -> None:
    """It steps as an empty one does, and the run goes on."""
    ends = []
    for factor in (float("nan"), float("inf"), 0.0):
        run = Run()
        for logical in islice(run.batches, 3):
            for batch in logical:
                (loss_of(run.model, batch) * factor).mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert run.engine.steps == 3
        ends.append(run.weights)
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[2])
    assert ends[0].isfinite().all()


@pytest.mark.parametrize("order", [(0, 0), (0, 0, 1), (0, 1, 0)])
def test_an_example_is_not_in_two_passes_of_a_logical_batch(order: tuple[int, ...]) -> None:
    run = Run(physical_batch=2)
    logical = next(logical for logical in run.batches if len(logical) > 2 or run.step_on(logical))
    pieces = iter(logical)
    seen: list[dict[str, Tensor]] = []

    def take(index: int) -> None:
        while len(seen) <= index:
            seen.append(next(pieces))
        loss_of(run.model, seen[index]).mean().backward()

    with pytest.raises(GroupSearchError, match="more examples than were handed out"):
        list(map(take, order))


@pytest.mark.parametrize("call", ["check_step", "check_handed_out", "next", "again"])
def test_no_refusal_tells_a_private_number(call: str) -> None:
    batches = batches_of({"x": torch.zeros(4000, 1)}, expected_batch_size=2000, physical_batch=999)
    stream = iter(batches)
    logical = next(stream)
    pieces = iter(logical)
    next(pieces)
    calls = {
        "check_step": lambda: batches.check_step(1234),
        "check_handed_out": lambda: batches.check_handed_out(logical.examples + 1),
        "next": lambda: next(stream),
        "again": lambda: (list(pieces), list(logical)),
    }
    with pytest.raises(GroupSearchError) as refusal:
        calls[call]()
    assert not set(re.findall(r"\d+", str(refusal.value))) - {"1"}


@pytest.mark.parametrize("twice", [{"expected_batch_size": 6.0}, {"sampling_rate": 0.15}])
def test_what_the_batches_say_is_not_said_again(twice: dict[str, float]) -> None:
    run = Run()
    run.engine.detach()
    with pytest.raises(GroupSearchError, match="batches' own"):
        make_private(run.model, run.optimizer, run.engine.plan, noise_multiplier=1.0, batches=run.batches, **twice)


class Stream(IterableDataset[int]):
    """Has no elements by number."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, {}),
        ({"x": torch.tensor(1.0)}, {}),
        ({}, {}),
        (tuple(TABLE.values()), {}),
        (Stream(), {}),
        (TABLE, {"expected_batch_size": SIZE + 1}),
        (TABLE, {"expected_batch_size": 0}),
        (TABLE, {"expected_batch_size": float("nan")}),
        (TABLE, {"steps": 0}),
        (TABLE, {"physical_batch": 0}),
    ],
)
def test_what_cannot_be_sampled_is_refused(dataset: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(GroupSearchError, match="Expected"):
        batches_of(dataset, **settings)


def branches(tmp_path: Path, exact: bool) -> list[Tensor]:
    """How far one step goes in two continuations of one state, from the same generators in both processes."""
    first = Run()
    first.train(3)
    first.save(tmp_path / "state.pt")
    ends = []
    for _ in range(2):
        run = Run()
        run.load(tmp_path / "state.pt", exact=exact)
        start = run.weights
        run.train(1)
        assert (run.engine.steps, run.batches.taken) == (4, 4)
        ends.append(run.weights - start)
    return ends


def test_branches_of_one_state_share_no_noise_unless_it_is_asked_for(tmp_path: Path) -> None:
    """With the same noise the difference of two branches would be that of their clean sums."""
    one, other = branches(tmp_path, exact=False)
    assert (one != other).all()
    one, other = branches(tmp_path, exact=True)
    assert torch.equal(one, other)


def test_a_state_holds_no_generator_unless_it_is_asked_for() -> None:
    run = Run()
    assert "generator" not in run.engine.state_dict()["mechanism"]
    assert "generator" not in run.batches.state_dict()
    for part in run.parts[2:]:
        with pytest.raises(GroupSearchError, match="exact=True"):
            part.load_state_dict(part.state_dict(), exact=True)


def test_a_loaders_seed_foretells_no_batch() -> None:
    """A loader's base seed used to be the first number that decides who is in the first batch."""
    batches = batches_of(seed=3)
    base = torch.empty((), dtype=torch.int64).random_(generator=batches._workers_generator()).item()
    drawn = torch.rand(1000, dtype=torch.float64, generator=seeded(3)).mul(2.0**53).long().tolist()
    assert base % 2**53 not in drawn
    first = torch.empty((), dtype=torch.int64).random_(generator=seeded(3)).item()
    assert first % 2**53 == drawn[0], "the test itself: with the sampler's own seed it was"


@pytest.mark.parametrize("workers", [0, 1])
def test_secure_batches_are_poisson_samples_that_are_kept_until_they_are_finished(workers: int) -> None:
    batches = batches_of(generator=None, secure=True, num_workers=workers)
    first = next(logical for logical in batches if logical.examples)
    began = batches.taken
    pieces = numbers(batches, 1)
    assert sum(map(len, pieces[0])) == first.examples, "the one that was handed out and not finished comes again"
    assert len(numbers(batches)) == 12 - began - 1
    assert numbers(batches_of(generator=None, secure=True)) != numbers(batches_of(generator=None, secure=True))
    with pytest.raises(GroupSearchError, match="secure stream"):
        batches.state_dict(exact=True)
    with pytest.raises(GroupSearchError, match="secure=True"):
        batches_of(secure=True)
