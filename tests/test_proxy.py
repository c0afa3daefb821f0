"""Gram matrices of real models against gradients of one example at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import proxy as benchmark
from groupsearch.engine.book import Groups
from groupsearch.engine.capture import Capture
from groupsearch.engine.entries import Entry
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.gram import Grams, sharing_pairs
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.proxy import default_steps, gram, gram_matrices, site_grams
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.training import TrainSettings, train
from groupsearch.workloads import Workload, load_workload
from groupsearch.workloads.workload import Data
from tests.engine.test_parity import by_name, groupings, sites_of, truth, typical_norm
from tests.support.cases import LAYER_CASES, Case
from tests.support.reference import combine, trainable

EXACT = {name: case for name, case in LAYER_CASES.items() if not case.whole}
SHARING = {name: case for name, case in EXACT.items() if any(word in name for word in ("reused", "tied", "shared"))}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def grams_of(case: Case, dtype: torch.dtype = torch.float64) -> Grams:
    """Of one batch of the case, at one instant."""
    model, batch = case.model(dtype), case.batch(dtype)
    sites = sites_of(case)
    grams, crosses = site_grams(model, batch, case.loss, sites)
    sizes = {name: p.numel() for name, p in trainable(model).items()}
    return Grams(sites, sizes, (0,), grams[None], sharing_pairs(sites), crosses[None])


@by_name(EXACT, quick=2)
def test_grams_are_inner_products_of_single_examples_gradients(case: Case) -> None:
    sites, gradients = truth(case, torch.float64)
    found = grams_of(case)
    assert found.sites == sites
    scale = max(float(np.abs(found.grams).max()), 1e-12)
    for (early, late), matrix in [
        *(((site, site), found.grams[0, site]) for site in range(len(sites))),
        *zip(found.pairs, found.crosses[0], strict=True),
    ]:
        shared = [name for name in sites[early].parameters if name in sites[late].parameters]
        expected = [
            [sum(float((a[early, n] * b[late, n]).sum()) for n in shared) for b in gradients] for a in gradients
        ]
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=10 * case.tolerance[torch.float64] * scale)


@by_name(SHARING, names=["rule"], settings=[("abadi",), ("auto-s",)], each=1)
def test_clipped_sums_have_the_norm_that_the_moments_say(case: Case, rule: str) -> None:
    sites, gradients = truth(case, torch.float64)
    grams = grams_of(case)
    for grouping in groupings(case, sites).values():
        plan = ClipPlan(grouping, typical_norm(gradients), rule)
        clipped, unclipped = combine(gradients, plan), combine(gradients, ClipPlan(grouping, 1e12))
        found = grams.moments(plan)
        assert found.clipped[0] == pytest.approx(sum(float(c.square().sum()) for c in clipped.values()), rel=1e-8)
        expected = sum(float((clipped[name] * unclipped[name]).sum()) for name in clipped)
        size = float(np.sqrt(found.clipped[0] * found.gradient[0]))
        assert found.inner[0] == pytest.approx(expected, rel=1e-8, abs=1e-8 * size)


def _entries(case: Case, sites: tuple[Site, ...]) -> dict[int, Entry]:
    model, entries = case.model(), {}
    progress = Groups(sites, lambda site: site, len(sites)).begin()
    capture = Capture(model, lambda a: entries.update({progress.arrive(a.key)[0]: a.make_entry()}), EngineOptions())
    case.loss(model, case.batch()).sum().backward()
    capture.remove()
    return entries


@by_name(SHARING)
def test_little_memory_changes_no_gram(case: Case) -> None:
    """One example at a time, or as many as fit."""
    sites, _ = truth(case, torch.float64)
    entries = _entries(case, sites)
    for early, late in [*((i, i) for i in range(len(sites))), *sharing_pairs(sites)]:
        whole = gram(entries[early], entries[late], 4)
        for limit in (1, 4 * 8 * sum(p.numel() for p in case.model().parameters())):
            np.testing.assert_allclose(gram(entries[early], entries[late], 4, limit), whole, rtol=1e-12, atol=1e-14)


def test_taking_grams_leaves_the_model_as_it_was() -> None:
    workload = _small()
    model = workload.build().train()
    before, batch = {k: v.clone() for k, v in model.state_dict().items()}, workload.make_batch(4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    site_grams(model, batch, workload.loss, observe_sites(model, batch, workload.loss))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_other_sites_than_the_models_are_refused() -> None:
    workload = _small()
    model, batch = workload.build(), workload.make_batch(4)
    sites = observe_sites(model, batch, workload.loss)
    more = replace(sites[0], name="other", layer="other")
    with pytest.raises(UnsupportedModelError, match="did not reach other"):
        site_grams(model, batch, workload.loss, (*sites, more))
    with pytest.raises(UnsupportedModelError, match="was used 1 times"):
        site_grams(model, batch, workload.loss, sites[1:])


def _small() -> Workload:
    return load_workload("digits-cnn", width=4)


def _settings(workload: Workload, steps: int = 3) -> TrainSettings:
    return TrainSettings.of(workload, steps=steps, noise_multiplier=1.0, learning_rate=1e-2, sampling_rate=0.05, seed=0)


def test_instants_are_those_of_the_all_layer_training() -> None:
    """At step 2 the Grams are those of the model that two steps of training leave."""
    workload = _small()
    settings = _settings(workload)
    found = gram_matrices(workload, examples=8, batches=2, settings=settings, steps=(2, 0))
    assert found.steps == (0, 0, 2, 2)
    models: list[torch.nn.Module] = []
    trained = replace(workload, build=lambda seed=0: models.append(workload.build(seed)) or models[-1])
    train(trained, Grouping((), found.sites), replace(settings, steps=2))
    assert workload.data is not None
    order = torch.randperm(workload.data.train_size, generator=torch.Generator().manual_seed(0))
    for number in (0, 1):
        batch = {k: v[order[8 * number : 8 * number + 8]] for k, v in workload.data.train.items()}
        grams, _ = site_grams(models[0], batch, workload.loss, found.sites)
        np.testing.assert_array_equal(found.grams[2 + number], grams)
    assert not np.array_equal(found.grams[0], found.grams[2])
    assert not np.array_equal(found.grams[2], found.grams[3])


def test_the_same_seed_gives_the_same_grams_and_another_one_others() -> None:
    workload = _small()
    one, same, other = (gram_matrices(workload, examples=4, seed=seed, steps=(0,)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.grams, same.grams)
    assert not np.array_equal(one.grams, other.grams)


def test_a_workload_without_data_is_scored_at_its_beginning() -> None:
    workload = replace(_small(), data=None, training=None)
    found = gram_matrices(workload, examples=4, batches=1)
    assert found.steps == (0,)
    assert found.score((2,), noise_multiplier=1.0, expected_batch_size=64.0).value > 0
    with pytest.raises(GroupSearchError, match="data and settings to train by"):
        gram_matrices(workload, examples=4, steps=(0, 1))


def test_no_example_is_taken_twice_in_a_batch() -> None:
    workload = _small()
    assert workload.data is not None
    few = {name: tensor[:6] for name, tensor in workload.data.train.items()}
    small = replace(workload, data=Data(few, few))
    grams = gram_matrices(small, examples=4, batches=3, steps=(0,)).grams
    for batch in grams:
        norms = np.diagonal(batch.sum(0))
        assert len(np.unique(norms.round(12))) == 4
    with pytest.raises(GroupSearchError, match="6 training examples"):
        gram_matrices(small, examples=7, steps=(0,))
    with pytest.raises(GroupSearchError, match="at least two examples"):
        gram_matrices(small, examples=1, steps=(0,))


@pytest.mark.parametrize("steps", [(), (-1, 0), (0, 4)])
def test_instants_outside_of_the_training_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(GroupSearchError, match="between 0 and its 3 steps"):
        gram_matrices(_small(), examples=4, settings=_settings(_small()), steps=steps)


def test_default_instants() -> None:
    assert default_steps(None) == (0,)
    assert default_steps(_settings(_small(), steps=48)) == (0, 3, 6)
    assert default_steps(_settings(_small(), steps=1)) == (0, 1, 1)


def test_the_benchmarks_groupings_are_all_different() -> None:
    workload = _small()
    trace = trace_model(workload.build(), workload.make_batch(4), workload.loss)
    found = benchmark.groupings_of(trace, 12)
    assert len({grouping.boundaries for grouping in found.values()}) == len(found) == 12
    assert list(found)[:2] == ["all-layer", "layer-wise"]


def test_the_document_holds_the_correlations_of_the_rows_beside_it(tmp_path: Path) -> None:
    name, epsilon = next(iter(benchmark.SUBJECTS)), 8.0
    document = benchmark.Document(tmp_path / "proxy.json")
    for groups in range(benchmark.SUBJECTS[name].groupings):
        run = {"metric": 1 / (1 + groups), "loss": float(groups)}
        row = {"workload": name, "epsilon": epsilon, "groups": groups, "short": run, "full": [run, run]}
        document.rows.append({**row, "score": {"value": -float(groups)}})
    document.write()
    written = json.loads(document.path.read_text(encoding="utf-8"))
    assert "rows" not in written
    (part,) = written["correlations"]
    assert part["proxy/full"]["value"] == pytest.approx(1)
    assert part["few groups/full"]["value"] == pytest.approx(1)
    assert benchmark.Document(document.path).rows == document.rows  # the next run goes on from there


def test_the_committed_correlations_are_of_every_workload_and_all_its_groupings() -> None:
    found = json.loads(benchmark.OUTPUT.read_text(encoding="utf-8"))["correlations"]
    assert {part["workload"] for part in found} == set(benchmark.SUBJECTS)
    for part in found:
        assert part["proxy/full"]["count"] == benchmark.SUBJECTS[part["workload"]].groupings
