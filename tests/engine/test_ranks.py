"""Several processes train as one would with all examples, or refuse together."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.ranks import (
    DAMAGES,
    Training,
    after_an_accident,
    audited,
    differing,
    diverged,
    grouping_for,
    killed,
    own_loader,
    refused_step,
    resumed,
    run_all,
    scaled,
    sites_for,
    states,
    traffic,
    wrapped_later,
)
from tests.support.cases import EVERY_CASE
from tests.support.world import World, in_world

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed part")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def three_random(name: str) -> dict[str, tuple[int, ...]]:
    """Groupings of a case."""
    sites = len(sites_for(name))
    draw = random.Random(11)
    return {f"random {n}": tuple(sorted(draw.sample(range(1, sites), n))) for n in (1, 3, 5)}


def trainings() -> dict[str, Training]:
    """What must be the same on any number of ranks."""
    found = {}
    mlp = "residual-mlp-3d"
    for name, cuts in {"all-layer": (), "layer-wise": None, **three_random(mlp)}.items():
        for dtype in TOLERANCE:
            found[f"{name} {dtype}"] = Training(mlp, grouping_for(mlp, cuts), dtype=dtype)
    found["rank without an example"] = Training(mlp, grouping_for(mlp, (2, 5)), expected=0.7, steps=6)
    found["one pass"] = Training(mlp, grouping_for(mlp, (2, 5)), physical=None)
    found["thresholds adapt"] = Training(mlp, grouping_for(mlp, (2, 5)), adaptive=True)
    found["DDP"] = Training(mlp, grouping_for(mlp, (4,)), wrap=True)
    found["tied GPT-2"] = Training("gpt2", grouping_for("gpt2", (3, 9)), dtype=torch.float32)
    found["tied over groups"] = Training("tied-embedding-head", grouping_for("tied-embedding-head", None))
    found["LoRA"] = Training("lora", grouping_for("lora", (2,)), rule="auto-s")
    for kind in ("reentrant", "non-reentrant"):
        name = f"checkpoint-{kind}"
        found[name] = Training(name, grouping_for(name, (3, 6)))
    return found


@pytest.fixture(scope="module")
def every() -> dict[str, Training]:
    return trainings()


def compare(every: dict[str, Training], size: int) -> None:
    """Hold every rank's weights and thresholds to those of one process."""
    alone = dict(zip(every, run_all(list(every.values())), strict=True))
    for rank, found in enumerate(in_world(size, run_all, list(every.values()))):
        for (name, training), there in zip(every.items(), found, strict=True):
            here = alone[name]
            assert there["thresholds"] == pytest.approx(here["thresholds"], rel=1e-6), (name, rank)
            for one, other in zip(there["weights"], here["weights"], strict=True):
                difference = float((one - other).norm() / other.norm().clamp(min=1e-3))
                assert difference <= TOLERANCE[training.dtype], (name, rank, difference)


def test_two_ranks_train_as_one_process(every: dict[str, Training]) -> None:
    compare(every, 2)


def test_four_ranks_train_as_one_process(every: dict[str, Training]) -> None:
    compare({name: every[name] for name in ("random 3 torch.float64", "rank without an example")}, 4)


TRAINING = Training("residual-mlp-3d", grouping_for("residual-mlp-3d", (2, 5)))


def test_shares_of_a_loop_of_ones_own_may_be_uneven_or_empty() -> None:
    shares = [[(0, 5), (5, 6)], [(0, 0), (0, 4)], [(2, 7), (7, 7)], [(0, 0), (0, 0)]]
    here = own_loader(TRAINING, shares)
    for there in in_world(2, own_loader, TRAINING, shares):
        torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-12)


def test_what_is_sent_is_sent_once_a_step_and_while_backward_goes_on() -> None:
    numbers = sum(p.numel() for p in EVERY_CASE[TRAINING.case].model().parameters())
    found = in_world(2, traffic, TRAINING)
    for step in [step for rank in found for step in rank]:
        assert step["bytes"] == 8 * numbers
        assert step["sent"] == TRAINING.grouping.groups
        assert step["early"] == 0  # the passes before the last one
        assert step["overlapped"] == (TRAINING.grouping.groups if step["passes"] else 0)
    assert max(step["passes"] for step in found[0]) > 1


def test_a_backward_pass_that_failed_and_is_taken_again_adds_nothing_to_what_was_sent() -> None:
    here = after_an_accident(TRAINING)["weights"]
    found = in_world(2, after_an_accident, TRAINING)
    assert found[1]["sent"]
    for there in found:
        torch.testing.assert_close(there["weights"], here, rtol=1e-10, atol=1e-12)


def test_ranks_that_were_given_different_things_are_refused_with_one_message() -> None:
    first, second = in_world(2, differing, TRAINING)
    assert {name: text for name, (_, text) in first.items()} == {name: text for name, (_, text) in second.items()}
    named = {
        "noise": "another noise_multiplier (0.7 on rank 0, 2.0 on rank 1)",
        "number of groups": "another number of groups (3 on rank 0, 4 on rank 1)",
        "refused on one": "Rank 1 of 2 refused make_private: The plan covers parameters that this model does not train",
    }
    for name, (_, text) in first.items():
        assert named.get(name, f"another {name} (") in text, (name, text)
    assert len(first) == 10
    assert second["refused on one"][0] == "UnsupportedModelError"


def test_a_step_that_one_rank_refuses_is_refused_on_all() -> None:
    first, second = in_world(2, refused_step, TRAINING)
    assert first == second
    assert first.startswith("Rank 1 of 2 refused the step: Expected an optimizer step on the examples of one finished")


def test_weights_that_differ_are_found() -> None:
    first, second = in_world(2, diverged, TRAINING)
    assert first == second
    assert "another weights in the course of training" in first


def test_ddp_around_an_engine_is_refused_with_the_remedy() -> None:
    for found in in_world(2, wrapped_later, TRAINING):
        assert "Give make_private that DistributedDataParallel" in found


def test_the_loss_scale_is_that_of_all_ranks() -> None:
    (first, weights), (second, others) = in_world(2, scaled)
    assert first == second == 4.0
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_secure_noise_is_one_ranks_and_the_weights_are_the_same(adaptive: bool) -> None:
    training = replace(TRAINING, secure=True, adaptive=adaptive, expected=9.0)
    first, second = in_world(2, Training.run, training)
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["thresholds"] == second["thresholds"]
    assert sum(first["sizes"]) != 0
    assert 0 < sum(second["sizes"]) <= 6 * training.steps
    start = EVERY_CASE[training.case].model().parameters()
    assert all((one - other).abs().min() > 0 for one, other in zip(first["weights"], start, strict=True))


def test_a_world_of_another_size_is_refused_and_the_same_goes_on() -> None:
    alone, (first, second) = states(TRAINING), in_world(2, states, TRAINING)
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    said, _ = resumed(TRAINING, first)
    assert "processes=2, this engine has 1" in said
    for text, _ in in_world(2, resumed, TRAINING, alone):
        assert text.startswith("Rank 0 of 2 refused the state to go on with: ")
        assert "processes=1, this engine has 2" in text
    (done, weights), (also, others) = in_world(2, resumed, TRAINING, second)
    assert done == also == "3 steps"
    torch.testing.assert_close(weights, others, rtol=0, atol=0)  # fresh noise, and the same


@pytest.mark.parametrize(("how", "within"), [("killed", 5.0), ("hangs", 5.0)])
def test_a_rank_that_is_gone_ends_the_others_and_the_checkpoint_loads(how: str, within: float, tmp_path: Path) -> None:
    with World(2, killed, (TRAINING, str(tmp_path), how), tmp_path / "store", timeout=2.0) as world:
        kind, text, seconds = world.results()[0]
    assert kind == "LostRankError"
    assert "Rank 0 of 2 lost the others in" in text
    assert "start all of them again from the last checkpoint" in text
    assert seconds < within
    state = torch.load(tmp_path / "checkpoint.pt")
    assert [said for said, _ in in_world(2, resumed, TRAINING, state)] == ["3 steps", "3 steps"]


STEPS = 60


@pytest.fixture(scope="module")
def audits() -> dict[str, list[dict[str, Any]]]:
    return {damage: in_world(2, audited, damage, STEPS) for damage in DAMAGES}


def verdict(found: list[dict[str, Any]]) -> list[str]:
    """What an audit objects to: the noise's loudness, in all and anywhere; how far one example moves the sums."""
    objections = []
    numbers = found[0]["noise"].numel()
    spread = float(found[0]["noise"].square().mean())
    if abs(spread - 1) > 5 * math.sqrt(2 / numbers):  # five deviations of a mean of squares
        objections.append("noise")
    if bool((found[0]["noise"].square().mean(0) < 0.2).any()):  # 1e-16 for a sum of squares of 60
        objections.append("silent")
    if any(not torch.equal(each["noise"], found[0]["noise"]) for each in found):
        objections.append("differs")
    if found[0]["moved"] > 1 + 1e-6:
        objections.append("sensitivity")
    return objections


def test_the_audit_across_ranks_finds_nothing_in_the_engine(audits: dict[str, list[dict[str, Any]]]) -> None:
    assert verdict(audits["none"]) == []
    assert audits["none"][0]["moved"] > 0.7  # the example is loud enough to tell


@pytest.mark.parametrize(
    ("damage", "objection"),
    [
        ("noise on every rank", "noise"),
        ("no noise on a part", "silent"),
        ("norms of a part", "sensitivity"),
        ("one rank unclipped", "sensitivity"),
    ],
)
def test_the_audit_across_ranks_catches(damage: str, objection: str, audits: dict[str, list[dict[str, Any]]]) -> None:
    assert objection in verdict(audits[damage])
