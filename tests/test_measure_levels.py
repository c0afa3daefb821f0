"""The three levels of a peak: estimate against simulation, simulation against measurement.

All of it is exact, so tolerances are tight; what is left are buffers of a few bytes per example
and group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import Subject
from benchmarks.architectures import BUILT_IN, small_workload
from groupsearch.cli import parameters
from groupsearch.engine.optimizers import OPTIMIZER_VARIANTS, OPTIMIZERS
from groupsearch.measure import simulate_peak
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.tracer.step import AUTOCASTS, StepSettings
from groupsearch.workloads import Workload
from tests.support.cases import EVERY_CASE

TOLERANCE = 1e-3
PLAIN = [(name, "none") for name in (*BUILT_IN, "gpt2", "t5", "llama", "vit", "bart", "inception")]
CHECKPOINTED = [(name, "blocks") for name in ("digits-vit", "stdlib-gpt", "gpt2", "llama", "vit", "t5", "resnet")]
CHECKPOINTED += [("stdlib-gpt", "every:2"), ("bart", "every:3")]
SHARED = ("tied-linears", "tied-three-ways", "reused-linear-3d", "reused-conv", "tied-embedding-head")
Prepare = Callable[[str, str], Subject]


QUICK = {("digits-vit", "none"), ("digits-vit", "blocks"), ("digits-cnn", "none"), ("gpt2", "blocks"), ("t5", "none")}
SUBJECTS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PLAIN + CHECKPOINTED]


def only(value: str, quick: str) -> Any:
    """A value of a parameter, slow unless it is the quick one."""
    return pytest.param(value, marks=() if value == quick else pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    folder = tmp_path_factory.mktemp("configurations")

    @cache
    def subject(name: str, checkpoint: str) -> Subject:
        return Subject(small_workload(name, Path(folder), blocks=2), StepSettings(checkpoint=checkpoint))

    return subject


@pytest.mark.parametrize(("name", "checkpoint"), SUBJECTS)
def test_estimates_are_what_is_simulated(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    many = subject.groupings(8 if name in BUILT_IN and checkpoint == "none" else 4, seed=1)
    errors = {text: subject.estimate(g) / subject.simulate(g) - 1 for text, g in many.items()}
    assert max(map(abs, errors.values())) < TOLERANCE, errors


@pytest.mark.parametrize(("name", "checkpoint"), SUBJECTS)
def test_simulations_are_what_is_measured(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    many = subject.groupings(2, seed=2)
    errors = {text: subject.simulate(g) / subject.measure(g) - 1 for text, g in many.items()}
    assert max(map(abs, errors.values())) < TOLERANCE, errors


@pytest.mark.parametrize(("name", "checkpoint"), SUBJECTS)
def test_non_private_peaks_are_what_is_measured(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    assert subject.trace.nonprivate_peak_bytes == pytest.approx(subject.measure(None), rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", [only(name, "adamw") for name in ("sgd", "momentum", "adamw")])
@pytest.mark.parametrize("norm_method", NORM_METHODS)
def test_every_optimizer_and_norm_method_is_modelled(norm_method: str, optimizer: str, tmp_path: Path) -> None:
    workload = small_workload("digits-vit", tmp_path, blocks=2)
    subject = Subject(workload, StepSettings(EngineOptions(norm_method), optimizer))
    assert_levels_agree(subject, 1, seed=3)


def assert_levels_agree(subject: Subject, count: int, seed: int) -> None:
    assert subject.trace.nonprivate_peak_bytes == pytest.approx(subject.measure(None), rel=TOLERANCE)
    for grouping in subject.groupings(count, seed=seed).values():
        estimate, simulated, measured = (f(grouping) for f in (subject.estimate, subject.simulate, subject.measure))
        norms_bytes = 8 * subject.workload.batch_size * grouping.groups  # of this pass and the one before
        assert abs(estimate - simulated) <= max(TOLERANCE * simulated, norms_bytes)
        assert simulated == pytest.approx(measured, rel=TOLERANCE)


def all_weights(width: int = 128) -> Workload:
    """So many weights and so few examples that the optimizer's step sets the peak."""

    def build(seed: int = 0) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).sum(1)

    return Workload("weights", build, lambda size: {"x": torch.ones(size, width)}, loss, batch_size=2)


@pytest.mark.parametrize("variant", [only(variant, ":foreach") for variant in ("", ":loop", ":foreach", ":fused")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_of_every_optimizer_is_modelled(name: str, variant: str) -> None:
    subject = Subject(all_weights(), StepSettings(optimizer=name + variant))
    assert_levels_agree(subject, 1, seed=3)


def test_adam_by_lists_of_operations_takes_another_copy_of_the_weights() -> None:
    loop, foreach, fused, default = (
        Subject(all_weights(512), StepSettings(optimizer=f"adam{variant}")).trace  # more than drawing noise takes
        for variant in (":loop", ":foreach", ":fused", "")
    )
    weights = loop.static.weights
    assert peak_memory(foreach, ()).where == "optimizer step"
    # The loop takes two copies of one weight at a time, of which there are eight.
    assert foreach.step_bytes - loop.step_bytes == pytest.approx((1 - 2 / 8) * weights, rel=0.02)
    assert fused.step_bytes < loop.step_bytes == default.step_bytes  # which torch takes on the CPU


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpoint"), [("gpt2", "none"), ("digits-vit", "blocks"), ("inception", "none")])
def test_the_second_micro_batch_finds_the_sums_of_the_first(name: str, checkpoint: str, tmp_path: Path) -> None:
    workload = small_workload(name, tmp_path, blocks=2)
    once, twice, thrice = (
        Subject(workload, StepSettings(checkpoint=checkpoint, micro_batches=count)) for count in (1, 2, 3)
    )
    assert_levels_agree(twice, 2, seed=5)
    trainable = sum(p.nbytes for p in workload.model.parameters())
    assert (once.trace.carried_bytes, twice.trace.carried_bytes) == (0, trainable)
    for grouping in once.groupings(1, seed=6).values():
        assert once.estimate(grouping) <= twice.estimate(grouping) == thrice.estimate(grouping)
        assert twice.measure(grouping) == pytest.approx(thrice.measure(grouping), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "step"),
    [
        ("vit", {"dtype": "bfloat16"}, {}),
        ("vit", {}, {"autocast": "bfloat16"}),
        ("roberta", {}, {"autocast": "float16", "checkpoint": "blocks", "micro_batches": 2}),
        ("gpt2", {"attn_implementation": "eager"}, {}),
        ("bart", {"attn_implementation": "eager"}, {"checkpoint": "blocks"}),
    ],
)
def test_half_precision_and_other_attention_are_modelled(
    name: str, settings: dict[str, str], step: dict[str, Any], tmp_path: Path
) -> None:
    subject = Subject(small_workload(name, tmp_path, blocks=2, **settings), StepSettings(**step))
    assert_levels_agree(subject, 1, seed=7)


@pytest.mark.parametrize(("name", "padded"), [("roberta", False), ("roberta", True), ("gpt2", False)])
def test_a_mask_in_the_batch_costs_what_its_values_cost(name: str, padded: bool, tmp_path: Path) -> None:
    """With padding every layer needs the mask in full; of all ones it needs none."""
    plain = small_workload(name, tmp_path, blocks=2)

    def make_batch(size: int) -> dict[str, Tensor]:
        batch = dict(plain.make_batch(size))
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -5:] = 0 if padded else 1
        return batch

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits.float().flatten(1).logsumexp(1)

    subject = Subject(replace(plain, make_batch=make_batch, loss=loss))
    assert_levels_agree(subject, 1, seed=8)


@pytest.mark.parametrize("norm_method", [only(m, "mixed") for m in NORM_METHODS])
@pytest.mark.parametrize("name", SHARED)
def test_shared_parameters_are_modelled(name: str, norm_method: str) -> None:
    """Many examples, so that activations outweigh what is kept for each of them."""
    case, examples = EVERY_CASE[name], 256
    workload = Workload(
        name=name,
        build=lambda seed=0: case.build().train(),
        make_batch=lambda size: case.batch(torch.float32, size),
        loss=case.loss,
        batch_size=examples,
    )
    subject = Subject(workload, StepSettings(EngineOptions(norm_method)))
    slack_bytes = 64 * examples * subject.trace.length  # norms and factors of every site, at most
    for grouping in subject.groupings(3, seed=4).values():
        estimate, simulated = subject.estimate(grouping), subject.simulate(grouping)
        assert abs(estimate - simulated) < max(TOLERANCE * simulated, slack_bytes)


def test_a_stage_that_was_used_simulates_what_a_fresh_one_does(prepare: Prepare) -> None:
    subject = prepare("digits-vit", "blocks")
    for grouping in (Grouping.layer_wise(subject.trace), Grouping.all_layer(subject.trace)):
        fresh = simulate_peak(
            subject.workload.build(), subject.batch, subject.workload.loss, grouping, checkpoint="blocks"
        )
        assert subject.simulate(grouping) == fresh


def test_groupings_differ_in_memory(prepare: Prepare) -> None:
    """What is compared above is no constant: checkpointed, all-layer takes much more than layer-wise."""
    subject = prepare("stdlib-gpt", "blocks")
    most, least = (f(subject.trace) for f in (Grouping.all_layer, Grouping.layer_wise))
    for level in (subject.estimate, subject.simulate, subject.measure):
        assert level(most) > 1.2 * level(least)


def test_choices_of_the_command_line_are_those_of_the_step() -> None:
    assert parameters.OPTIMIZER_VARIANTS == OPTIMIZER_VARIANTS
    assert parameters.AUTOCASTS == AUTOCASTS
