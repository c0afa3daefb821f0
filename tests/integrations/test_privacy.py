"""What the integrations have in common: logical batches as micro-batches, and the engine as it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from groupsearch import GroupSearchError, noise_multiplier_for
from groupsearch.integrations import MicroBatches, Privacy
from groupsearch.workloads.batches import count_examples

DATA = {"x": torch.arange(60.0)[:, None], "number": torch.arange(60)}
SIZES = {"expected_batch_size": 6.0, "steps": 30, "physical_batch": 2}


@pytest.mark.parametrize("accumulation", [1, 3, 7])
def test_a_logical_batch_is_as_many_micro_batches_as_the_loop_has(accumulation: int) -> None:
    drawn = Privacy(seed=0).batches(DATA, **SIZES)
    expected = [[piece["number"].tolist() for piece in logical] for logical in drawn]
    assert {len(pieces) for pieces in expected} >= {1, 2, 3, 4, 5}, "fewer, as many and more than micro-batches"
    micro = MicroBatches(Privacy(seed=0).batches(DATA, **SIZES), accumulation)
    found = [[piece["number"].tolist() for piece in pieces] for pieces in micro]
    assert len(found) == len(micro) == 30 * accumulation
    for step, pieces in enumerate(expected):
        parts = found[step * accumulation : (step + 1) * accumulation]
        assert [piece for part in parts for piece in part] == pieces, "every physical batch once, and in order"
        assert all(len(part) <= 1 for part in parts[:-1])


def test_an_empty_logical_batch_is_empty_micro_batches() -> None:
    drawn = Privacy(seed=0).batches(DATA, expected_batch_size=0.01, steps=5)
    assert list(MicroBatches(drawn, 2)) == [[]] * 10
    assert drawn.taken == 5


def test_no_loop_has_less_than_one_micro_batch() -> None:
    with pytest.raises(GroupSearchError, match="at least one micro-batch"):
        MicroBatches(Privacy(seed=0).batches(DATA, **SIZES), 0)


def test_seeded_batches_go_on_bit_for_bit_and_secret_ones_with_fresh_ones() -> None:
    for seed, same in ((0, True), (None, False)):
        micro = MicroBatches(Privacy(seed=seed).batches(DATA, **SIZES), 3)
        assert micro.batches.seeded == same
        it = iter(micro)
        for _ in range(12):
            next(it)
        state = micro.state_dict()
        assert ("generator" in state) == same, "what is saved of a secret run tells nothing of its batches"
        again = MicroBatches(Privacy(seed=seed).batches(DATA, **SIZES), 3)
        again.load_state_dict(state)
        rest = [sum(map(count_examples, pieces)) for pieces in again]
        assert len(rest) == (30 - 4) * 3
        assert ([sum(map(count_examples, pieces)) for pieces in it] == rest) == same


def attached(privacy: Privacy, steps: int = 100) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drawn = privacy.batches(DATA, **SIZES)
    return privacy.attach(model, optimizer, drawn, lambda m, batch: m(batch["x"]).square().flatten(), steps=steps)


def test_the_noise_is_that_of_epsilon_the_rate_and_all_steps() -> None:
    engine = attached(Privacy("layer-wise", epsilon=2.0, delta=1e-4, max_grad_norm=0.5, rule="abadi"))
    assert engine.noise_multiplier == noise_multiplier_for(2.0, 1e-4, 0.1, 100)
    assert (engine.plan.grouping.groups, engine.plan.rule, engine.plan.max_grad_norm) == (2, "abadi", 0.5)
    assert engine.settings.sampling_rate == 0.1
    assert engine.expected_batch_size == 6.0
    assert not engine.settings.seeded
    assert engine.report().checked is not None


@pytest.mark.parametrize("given", [{}, {"epsilon": 1.0, "noise_multiplier": 1.0}])
def test_either_epsilon_or_the_noise_is_given(given: dict[str, float]) -> None:
    with pytest.raises(GroupSearchError, match="either epsilon or noise_multiplier"):
        attached(Privacy(**given))  # type: ignore[arg-type]
