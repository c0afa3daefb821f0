"""The three levels of a peak: estimate against simulation, simulation against measurement.

All of it is exact, so tolerances are tight; what is left are buffers of a few bytes per example
and, under checkpointing, the state of the random generator that every block saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from groupsearch.grouping import Grouping
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.simulate import simulate_peak
from groupsearch.tracer.step import StepSettings
from groupsearch.workloads import Workload
from tests.benchmarks.accuracy import BUILT_IN, Subject, small_workload
from tests.cases import EVERY_CASE

TOLERANCE = 5e-3
PLAIN = [(name, "none") for name in (*BUILT_IN, "gpt2", "t5", "llama", "vit")]
CHECKPOINTED = [(name, "blocks") for name in ("digits-vit", "stdlib-gpt", "gpt2", "llama", "vit", "t5")]
SHARED = ("tied-linears", "tied-three-ways", "reused-linear-3d", "reused-conv", "tied-embedding-head")
Prepare = Callable[[str, str], Subject]


def _marked(subjects: list[tuple[str, str]], flaws: dict[tuple[str, str], str]) -> list[object]:
    def marks(key: tuple[str, str]) -> list[pytest.MarkDecorator]:
        return [pytest.mark.xfail(strict=True, reason=flaws[key])] if key in flaws else []

    return [pytest.param(*key, id="-".join(key), marks=marks(key)) for key in subjects]


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


@pytest.mark.parametrize(("name", "checkpoint"), PLAIN + CHECKPOINTED)
def test_estimates_are_what_is_simulated(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    many = subject.groupings(30 if name in BUILT_IN and checkpoint == "none" else 4, seed=1)
    errors = {text: subject.estimate(g) / subject.simulate(g) - 1 for text, g in many.items()}
    assert max(map(abs, errors.values())) < TOLERANCE, errors


@pytest.mark.parametrize(("name", "checkpoint"), PLAIN + CHECKPOINTED)
def test_simulations_are_what_is_measured(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    many = subject.groupings(2, seed=2)
    errors = {text: subject.simulate(g) / subject.measure(g) - 1 for text, g in many.items()}
    assert max(map(abs, errors.values())) < (5e-2 if name == "digits-cnn" else TOLERANCE), errors


@pytest.mark.parametrize(("name", "checkpoint"), PLAIN + CHECKPOINTED)
def test_non_private_peaks_are_what_is_measured(name: str, checkpoint: str, prepare: Prepare) -> None:
    subject = prepare(name, checkpoint)
    assert subject.trace.nonprivate_peak_bytes == pytest.approx(subject.measure(None), rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("norm_method", NORM_METHODS)
def test_every_optimizer_and_norm_method_is_modelled(norm_method: str, optimizer: str, tmp_path: Path) -> None:
    workload = small_workload("digits-vit", tmp_path, blocks=2)
    subject = Subject(workload, StepSettings(EngineOptions(norm_method), optimizer))
    for grouping in subject.groupings(1, seed=3).values():
        estimate, simulated, measured = (f(grouping) for f in (subject.estimate, subject.simulate, subject.measure))
        assert estimate == pytest.approx(simulated, rel=TOLERANCE)
        assert simulated == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("norm_method", NORM_METHODS)
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
