"""Training on a small real task: two Gaussian clouds told apart by a two-layer perceptron."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from groupsearch.engine.optimizers import OPTIMIZERS, make_optimizer, warm_state
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.privacy.accounting import default_delta, epsilon, noise_multiplier_for
from groupsearch.tracer import observe_sites
from groupsearch.training import CurvePoint, DivergedError, TrainSettings, train
from groupsearch.workloads.workload import Data, TrainingDefaults, Workload, seeded

TRAIN, VALIDATION = 120, 40
Settings = partial(TrainSettings, seed=0)  # an experiment, so that it fails again where it fails


def clouds(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=generator)
    x = torch.randn(count, 4, generator=generator) + 3 * label.unsqueeze(1)
    return {"x": x, "label": label}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def right(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]).argmax(1) == batch["label"]).float()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def workload(make: Callable[[], nn.Module] = perceptron, **changes: Any) -> Workload:
    data = Data(clouds(TRAIN, 0), clouds(VALIDATION, 1))
    made = Workload(
        name="clouds",
        build=seeded(make),
        make_batch=lambda size: {name: tensor[:size] for name, tensor in data.train.items()},
        loss=loss,
        metric=right,
        data=data,
        batch_size=16,
        training=TrainingDefaults(steps=20, learning_rate=0.05),
    )
    return dataclasses.replace(made, **changes)


def remembering(made: Workload) -> tuple[Workload, list[nn.Module]]:
    """The workload with a list that receives every model it builds."""
    models: list[nn.Module] = []

    def build(seed: int = 0) -> nn.Module:
        models.append(made.build(seed))
        return models[-1]

    return dataclasses.replace(made, build=build), models


def counting(made: Workload) -> tuple[Workload, list[int]]:
    """The workload with a list of the sizes of the batches it is trained on, those of check and watch left out."""
    sizes: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        sizes.extend([len(batch["x"])] * (model.training and not is_checking()))
        return made.loss(model, batch)

    return dataclasses.replace(made, loss=counted), sizes


def site(layer: str, inputs: int, outputs: int) -> Site:
    parameters = (f"{layer}.weight", f"{layer}.bias")
    return Site(layer, layer, layer, "linear", "ghost", 1, inputs, outputs, parameters, outputs * (inputs + 1))


SITES = (site("0", 4, 8), site("3", 8, 2))
GROUPINGS = {"none": None, "all-layer": Grouping((), SITES), "layer-wise": Grouping((1,), SITES)}
PRIVATE = ("all-layer", "layer-wise")


def weights(grouping: str, settings: TrainSettings, made: Workload | None = None) -> list[Tensor]:
    remembered, models = remembering(made or workload())
    train(remembered, GROUPINGS[grouping], settings)
    return [p.detach().clone() for p in models[0].parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_it_learns(grouping):
    counted, sizes = counting(workload())
    result = train(counted, GROUPINGS[grouping], Settings(30, 0.05, noise_multiplier=1.0))
    assert result.metric > 0.9
    assert result.metric_name == "accuracy"
    assert result.steps == 30
    assert 0 < result.step_seconds < 5
    # 30 Poisson batches of 24 expected examples: 5 standard deviations are 120.
    assert abs(sum(sizes) - 720) < 120


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_seed_decides_every_bit(grouping):
    first, same, other = (weights(grouping, Settings(6, 0.05, noise_multiplier=1.0, seed=s)) for s in (3, 3, 4))
    assert equal(first, same)
    assert not equal(first, other)


def test_seeds_that_differ_in_what_32_bits_leave_out_differ():
    one, far = (weights("all-layer", Settings(2, 0.05, noise_multiplier=1.0, seed=s)) for s in (3, 3 + 2**32))
    assert not equal(one, far)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_without_a_seed_two_trainings_differ_in_weights_batches_noise_and_dropout(grouping):
    plain = workload()
    made = dataclasses.replace(plain, build=lambda seed: plain.build(0))
    one, other = (weights(grouping, Settings(3, 0.05, noise_multiplier=1.0, seed=None), made) for _ in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    starts = [weights(grouping, Settings(1, 1e-30, "sgd", noise_multiplier=1.0, seed=None)) for _ in range(2)]
    assert not equal(*starts)


@pytest.mark.parametrize(
    ("stream", "grouping", "rate", "same_start", "dropout"),
    [
        ("weights", "none", 1.0, False, 0.0),
        ("sampling", "none", 0.2, True, 0.0),
        ("noise", "all-layer", 1.0, True, 0.0),
        ("dropout", "none", 1.0, True, 0.5),
        (None, "none", 1.0, True, 0.0),
    ],
)
def test_each_stream_alone_follows_the_seed(stream, grouping, rate, same_start, dropout):
    made = workload(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)))
    if same_start:
        made = dataclasses.replace(made, build=lambda seed, build=made.build: build(0))
    settings = [Settings(3, 0.05, sampling_rate=rate, noise_multiplier=1.0, seed=seed) for seed in (3, 4)]
    first, other = (weights(grouping, each, made) for each in settings)
    assert equal(first, other) == (stream is None)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_global_generator_neither_matters_nor_moves(grouping):
    settings = Settings(4, 0.05, noise_multiplier=1.0)
    torch.manual_seed(1)
    first = weights(grouping, settings)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert equal(first, weights(grouping, settings))
    assert torch.equal(state, torch.get_rng_state())


def is_checking() -> bool:
    """Whether the pass that runs is one of the check or the watch, which make random draws alike."""
    return _len_torch_dispatch_stack() > 0


def test_candidates_of_one_seed_share_weights_and_batches():
    batches: dict[str, list[Tensor]] = {}
    starts: dict[str, list[Tensor]] = {}
    for name, grouping in GROUPINGS.items():
        seen = batches.setdefault(name, [])

        def watched(model: nn.Module, batch: Any, seen: list[Tensor] = seen, name: str = name) -> Tensor:
            starts.setdefault(name, [p.detach().clone() for p in model.parameters()])
            if model.training and not is_checking():
                seen.append(batch["x"])
            return loss(model, batch)

        train(workload(loss=watched), grouping, Settings(5, 0.05, noise_multiplier=1.0))
    assert len(batches["none"]) == 5
    for name in PRIVATE:
        assert equal(batches[name], batches["none"])
        assert equal(starts[name], starts["none"])


def test_without_privacy_it_is_plain_training_on_poisson_batches():
    """The same training, written out."""
    made = workload(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    remembered, models = remembering(made)
    starts: list[dict[str, Tensor]] = []
    batches: list[Tensor] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        if not starts:
            starts.append({k: v.clone() for k, v in model.state_dict().items()})
        if model.training:
            batches.append(batch["x"])
        return loss(model, batch)

    train(dataclasses.replace(remembered, loss=watched), None, Settings(5, 0.1, optimizer="sgd", sampling_rate=0.1))
    model = made.build()
    model.load_state_dict(starts[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = {tuple(x.tolist()): label for x, label in zip(*clouds(TRAIN, 0).values(), strict=True)}
    for x in batches:
        label = torch.stack([rows[tuple(row.tolist())] for row in x])
        optimizer.zero_grad()
        (F.cross_entropy(model(x), label, reduction="sum") / (0.1 * TRAIN)).backward()
        optimizer.step()
    assert close(list(model.parameters()), list(models[0].parameters()))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("limit", [1, 7])
def test_a_physical_limit_changes_nothing_but_rounding(grouping, limit):
    made = workload(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 2)))
    sizes: list[int] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        if not is_checking():
            sizes.append(len(batch["x"]))
        return loss(model, batch)

    settings = Settings(4, 0.05, optimizer="sgd", noise_multiplier=1.0)
    whole = weights(grouping, settings, made)
    limited = dataclasses.replace(settings, physical_batch=limit)
    assert close(whole, weights(grouping, limited, dataclasses.replace(made, loss=watched)))
    assert max(sizes) == limit


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_empty_batches_are_steps_too(grouping):
    settings = Settings(12, 0.05, sampling_rate=0.005, noise_multiplier=1.0)
    counted, sizes = counting(workload())
    result = train(counted, GROUPINGS[grouping], settings)
    assert sum(sizes) < 12  # at most 11 examples in 12 batches: one is empty
    assert result.steps == 12
    if grouping != "none":
        assert result.epsilon == epsilon(1.0, 0.005, 12, default_delta(TRAIN))


@pytest.mark.parametrize("grouping", PRIVATE)
def test_one_step_is_clipped_sum_and_noise_over_the_expected_batch(grouping):
    """Without noise a step of SGD moves at most lr * sensitivity * batch / expected; noise adds its own."""
    plan = ClipPlan(GROUPINGS[grouping], 0.5, "abadi")
    quiet = Settings(1, 1.0, optimizer="sgd", noise_multiplier=0.0, rule="abadi", max_grad_norm=0.5)
    start = workload().build  # the weights stream's seed is not ours to know: take the start from the loss
    first: list[Tensor] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        if not first:
            first.extend(p.detach().clone() for p in model.parameters())
        return loss(model, batch)

    def moved(settings: TrainSettings) -> Tensor:
        first.clear()
        after = weights(grouping, settings, workload(build=start, loss=watched))
        return torch.cat([(a - b).flatten() for a, b in zip(after, first, strict=True)])

    clipped = moved(quiet)
    counted, sizes = counting(workload())
    train(counted, GROUPINGS[grouping], quiet)
    taken = sum(sizes)
    expected = 0.2 * TRAIN
    assert 0 < clipped.norm() <= plan.sensitivity * taken / expected * (1 + 1e-5)
    noise = moved(dataclasses.replace(quiet, noise_multiplier=3.0)) - clipped
    deviation = 3.0 * plan.sensitivity / expected
    # chi distribution with 58 degrees of freedom: 4 standard deviations are 37 %
    assert noise.norm() == pytest.approx(deviation * math.sqrt(len(noise)), rel=0.37)


ADAPTIVE = Settings(
    6, 0.05, noise_multiplier=1.0, evaluate_every=2, allocation=AdaptiveQuantile(0.7), noise_allocation="equal"
)


def test_adaptive_thresholds_are_on_the_curve_and_decided_by_the_seed():
    first, same = (train(workload(), GROUPINGS["layer-wise"], ADAPTIVE) for _ in range(2))
    other = train(workload(), GROUPINGS["layer-wise"], dataclasses.replace(ADAPTIVE, seed=1))
    assert first.curve == same.curve
    assert first.curve[-1].thresholds != other.curve[-1].thresholds
    thresholds = [point.thresholds for point in first.curve]
    assert [len(t) for t in thresholds] == [2, 2, 2]
    assert len({r for t in thresholds for r in t}) == 6  # each group's own, and every step's
    assert weights("layer-wise", ADAPTIVE)[0].equal(weights("layer-wise", ADAPTIVE)[0])


def test_adaptive_thresholds_cost_nothing_but_noise():
    fixed = dataclasses.replace(ADAPTIVE, allocation="uniform")
    results = [train(workload(), GROUPINGS["layer-wise"], each) for each in (ADAPTIVE, fixed)]
    assert results[0].epsilon == results[1].epsilon == epsilon(1.0, 0.2, 6, default_delta(TRAIN))
    assert results[1].curve[-1].thresholds == ()


def test_adaptive_thresholds_count_the_logical_batch():
    whole = train(workload(), GROUPINGS["layer-wise"], ADAPTIVE)
    limited = train(workload(), GROUPINGS["layer-wise"], dataclasses.replace(ADAPTIVE, physical_batch=5))
    assert limited.curve[-1].thresholds == pytest.approx(whole.curve[-1].thresholds)


def test_adaptive_thresholds_follow_the_gradients():
    """From far too small and far too large thresholds alike they come to the same scale."""
    ends = []
    for start in (1e-3, 1e3):
        allocation = AdaptiveQuantile(learning_rate=1.0, initial=(start, start))
        settings = dataclasses.replace(ADAPTIVE, steps=60, learning_rate=1e-6, allocation=allocation)
        ends.append(train(workload(), GROUPINGS["layer-wise"], settings).curve[-1].thresholds)
    for small, large in zip(*ends, strict=True):
        assert 0.5 < small / large < 2
        assert 1e-2 < small < 1e2


def test_adaptive_thresholds_that_cost_all_privacy_are_refused_before_the_first_step():
    settings = dataclasses.replace(ADAPTIVE, allocation=AdaptiveQuantile(count_noise=0.7))
    steps: list[int] = []
    with pytest.raises(GroupSearchError, match=r"count_noise above 0.707 for 2 adaptive thresholds"):
        train(workload(), GROUPINGS["layer-wise"], settings, lambda step, _: steps.append(step))
    assert steps == []


def test_epsilon_is_spent_as_asked():
    settings = Settings(10, 0.05, epsilon=4.0, delta=1e-5)
    result = train(workload(), GROUPINGS["layer-wise"], settings)
    assert result.noise_multiplier == noise_multiplier_for(4.0, 1e-5, 0.2, 10)
    assert 3.96 <= result.epsilon <= 4.0
    assert result.delta == 1e-5


def test_without_noise_or_without_grouping_epsilon_is_infinite():
    settings = Settings(2, 0.05, noise_multiplier=0.0)
    assert train(workload(), GROUPINGS["all-layer"], settings).epsilon == math.inf
    result = train(workload(), None, Settings(2, 0.05, epsilon=1.0))
    assert (result.epsilon, result.noise_multiplier, result.statement) == (math.inf, 0.0, None)
    assert result.delta == default_delta(TRAIN)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_curve_is_what_the_model_does_in_evaluation_mode(grouping):
    remembered, models = remembering(workload())
    heard: list[tuple[int, CurvePoint | None]] = []
    settings = Settings(7, 0.05, noise_multiplier=1.0, evaluate_every=3)
    result = train(remembered, GROUPINGS[grouping], settings, lambda step, point: heard.append((step, point)))
    assert [point.step for point in result.curve] == [3, 6, 7]
    assert [step for step, _ in heard] == list(range(1, 8))
    assert tuple(point for _, point in heard if point) == result.curve
    assert models[0].training
    model = models[0].eval()
    validation = clouds(VALIDATION, 1)
    assert result.curve[-1].loss == pytest.approx(loss(model, validation).mean().item(), rel=1e-5)
    assert result.metric == result.curve[-1].metric == pytest.approx(right(model, validation).mean().item())


def test_evaluating_does_not_change_the_training():
    settings = Settings(6, 0.05, noise_multiplier=1.0)
    assert equal(
        weights("layer-wise", settings), weights("layer-wise", dataclasses.replace(settings, evaluate_every=1))
    )


def test_modules_keep_the_mode_they_were_built_in():
    def frozen() -> nn.Module:
        model = perceptron()
        model[2].eval()
        return model

    seen: list[bool] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model[2].training)
        return loss(model, batch)

    train(workload(frozen, loss=watched), None, Settings(3, 0.05, evaluate_every=1))
    assert not any(seen)


def test_a_workload_without_metric_is_judged_by_its_loss_alone():
    result = train(workload(metric=None), None, Settings(2, 0.05))
    assert result.metric is None
    assert math.isfinite(result.curve[-1].loss)


@pytest.mark.parametrize("grouping", ["none", "all-layer"])
def test_divergence_is_of_the_weights_and_names_the_step(grouping):
    steps: list[int] = []
    settings = Settings(5, 1e38, optimizer="sgd", noise_multiplier=1e4)
    made = workload(
        loss=lambda model, batch: loss(model, batch) * (1e38 if model.training and not is_checking() else 1.0)
    )
    with pytest.raises(DivergedError, match=r"finite weights.*after step \d.*lower the learning rate") as caught:
        train(made, GROUPINGS[grouping], settings, lambda step, _: steps.append(step))
    assert caught.value.exit_code == 1
    assert steps == list(range(1, caught.value.step))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_no_loss_ends_private_training_or_leaves_a_batch_out(factor):
    """What the losses of private data are decides nothing: the run takes every step and its weights stay finite."""

    def breaking(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (factor if model.training and not is_checking() else 1.0)

    def gone(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (0.0 if model.training and not is_checking() else 1.0)

    settings = Settings(5, 0.05, noise_multiplier=1.0, evaluate_every=1)
    found, ends = [], []
    for each in (breaking, gone):
        remembered, models = remembering(workload(loss=each))
        found.append(train(remembered, GROUPINGS["all-layer"], settings))
        ends.append([p.detach().clone() for p in models[0].parameters()])
    assert [result.steps for result in found] == [5, 5]
    assert equal(*ends), "examples that are not finite add nothing"
    assert found[0].curve == found[1].curve


def test_a_validation_loss_that_is_not_finite_ends_nothing():
    """The data it is of have no privacy of their own; in private selection they have, and a stop would tell of them."""

    def breaking(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (1.0 if model.training or torch.is_grad_enabled() else math.nan)

    result = train(workload(loss=breaking), GROUPINGS["all-layer"], Settings(3, 0.05, noise_multiplier=1.0))
    assert (result.steps, math.isnan(result.curve[-1].loss)) == (3, True)


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_model_that_mixes_examples_is_refused_before_the_first_step():
    made = workload(lambda: nn.Sequential(nn.Linear(4, 8), Mixing(), nn.Identity(), nn.Linear(8, 2)))
    steps: list[int] = []
    with pytest.raises(UnsupportedModelError, match="depends on the other examples"):
        train(made, GROUPINGS["all-layer"], Settings(2, 0.05, noise_multiplier=1.0), lambda step, _: steps.append(step))
    assert steps == []
    assert train(made, None, Settings(2, 0.05)).steps == 2


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((SITES[1], SITES[0]), r"at site 0 0 \(parameters 0.weight, 0.bias\) instead of 3 \("),
        ((*SITES, site("4", 2, 2)), r"the 3 sites .* found 2, and at site 2 none instead of 4 \("),
        (SITES[:1], r"the 1 sites .* found 2, and at site 1 3 \(.*\) instead of none"),
        ((dataclasses.replace(SITES[0], parameters=("0.weight",)), SITES[1]), r"instead of 0 \(parameters 0.weight\)"),
    ],
    ids=["order", "missing", "further", "parameters"],
)
def test_a_model_with_other_sites_than_the_grouping_is_refused(sites, message):
    with pytest.raises(GroupSearchError, match=message + ".*Profile the model again"):
        train(workload(), Grouping((), sites), Settings(2, 0.05, noise_multiplier=1.0))


def test_the_check_before_the_first_step_draws_nothing_from_the_streams():
    """A model that draws random numbers in evaluation mode too trains as one that does so in training only."""

    class Drawing(nn.Module):
        def __init__(self, always: bool) -> None:
            super().__init__()
            self.always = always

        def forward(self, x: Tensor) -> Tensor:
            if self.training or self.always:
                torch.rand(3)
            return x

    def make(always: bool) -> Workload:
        return workload(lambda: nn.Sequential(nn.Linear(4, 8), Drawing(always), nn.Dropout(0.5), nn.Linear(8, 2)))

    settings = Settings(3, 0.05, noise_multiplier=1.0)
    assert equal(weights("all-layer", settings, make(True)), weights("all-layer", settings, make(False)))


def residual() -> nn.Module:
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4)) for _ in range(2))
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(4, 2))


@pytest.mark.parametrize("grouping", ["none", "all-layer", "layer-wise"])
def test_checkpointing_changes_nothing_but_rounding(grouping):
    made = workload(residual)
    calls: list[int] = []

    def counting() -> nn.Module:
        model = residual()
        model[0][0][1].register_forward_hook(lambda *_: calls.extend([1] * (model.training and not is_checking())))
        return model

    few = made.make_batch(5)
    sites = observe_sites(made.model, few, loss)
    cuts = tuple(range(1, len(sites))) if grouping == "layer-wise" else ()
    chosen = None if grouping == "none" else Grouping(cuts, sites)
    results, ends = {}, {}
    for checkpoint in ("none", "blocks"):
        calls.clear()
        remembered, models = remembering(workload(counting))
        settings = Settings(4, 0.05, noise_multiplier=1.0, checkpoint=checkpoint)
        results[checkpoint] = train(remembered, chosen, settings)
        ends[checkpoint] = [p.detach().clone() for p in models[0].parameters()]
        assert len(calls) == {"none": 4, "blocks": 8}[checkpoint]  # every block runs again in the backward pass
    assert close(ends["none"], ends["blocks"])
    assert results["blocks"].curve[-1].loss == pytest.approx(results["none"].curve[-1].loss, rel=1e-5)


def test_checkpointing_needs_blocks():
    with pytest.raises(UnsupportedModelError, match="no repeated blocks"):
        train(workload(), None, Settings(2, 0.05, checkpoint="blocks"))


def test_divergence_in_the_last_step_is_seen():
    settings = Settings(1, 1e38, optimizer="sgd", noise_multiplier=1e4)
    with pytest.raises(DivergedError, match="after step 1"):
        train(workload(), GROUPINGS["all-layer"], settings)


@pytest.mark.parametrize("grouping", ["none", "layer-wise"])
def test_what_the_callback_raises_ends_the_training_and_frees_the_model(grouping):
    class Stop(Exception):
        pass

    def stop(step: int, point: CurvePoint | None) -> None:
        if step == 2:
            raise Stop

    remembered, models = remembering(workload())
    with pytest.raises(Stop):
        train(remembered, GROUPINGS[grouping], Settings(5, 0.05, noise_multiplier=1.0), stop)
    batch = clouds(5, 2)
    loss(models[0], batch).mean().backward()
    assert all(p.grad is not None for p in models[0].parameters())


def test_bad_requests_are_refused():
    with pytest.raises(GroupSearchError, match="data to train on"):
        train(workload(data=None), None, Settings(2, 0.05))
    with pytest.raises(GroupSearchError, match="either epsilon or noise_multiplier"):
        train(workload(), GROUPINGS["all-layer"], Settings(2, 0.05))
    with pytest.raises(GroupSearchError, match="either epsilon or noise_multiplier"):
        train(workload(), GROUPINGS["all-layer"], Settings(2, 0.05, epsilon=1.0, noise_multiplier=1.0))
    with pytest.raises(GroupSearchError, match="sampling rate"):
        train(workload(), None, Settings(2, 0.05, sampling_rate=2.0))
    with pytest.raises(GroupSearchError, match="sgd, momentum, adam, adamw"):
        train(workload(), None, Settings(2, 0.05, optimizer="lamb"))
    with pytest.raises(GroupSearchError, match=r"checkpoint to be none, blocks, or every:K .*found 'layers'"):
        Settings(2, 0.05, checkpoint="layers")
    for bad in ({"steps": 0}, {"evaluate_every": -1}, {"seed": -1}):
        with pytest.raises(GroupSearchError, match=f"Expected {next(iter(bad))} >="):
            Settings(**{"steps": 2, "learning_rate": 0.05, **bad})


def test_settings_come_from_the_workload_and_may_be_changed():
    settings = TrainSettings.of(workload(), steps=3, seed=5)
    assert (settings.steps, settings.seed, settings.epsilon, settings.learning_rate) == (3, 5, 8.0, 0.05)
    by_noise = TrainSettings.of(workload(), noise_multiplier=2.0)
    assert (by_noise.epsilon, by_noise.noise_multiplier) == (None, 2.0)
    with pytest.raises(GroupSearchError, match="TrainingDefaults"):
        TrainSettings.of(workload(training=None))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_warm_optimizer_has_its_state_and_steps_as_a_fresh_one(name):
    fresh, warm = (nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)) for _ in range(2))  # alike, of their own state
    warm.load_state_dict(fresh.state_dict())
    optimizers = [make_optimizer(name, model.parameters(), 0.1) for model in (fresh, warm)]
    for parameter in warm.parameters():
        parameter.grad = torch.ones_like(parameter)
    warm_state(optimizers[1])
    assert equal(list(fresh.parameters()), list(warm.parameters()))
    assert all(p.grad is None for p in warm.parameters())
    for _ in range(3):
        if name != "sgd":
            assert optimizers[1].state
        for model, optimizer in zip((fresh, warm), optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().cos()
            optimizer.step()
        assert equal(list(fresh.parameters()), list(warm.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fake_optimizer_can_be_warmed_and_stepped(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(name, model.parameters(), 0.1)
        warm_state(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert name == "sgd" or len(optimizer.state) == 2


def test_an_optimizer_needs_something_to_train():
    with pytest.raises(GroupSearchError, match="trainable"):
        make_optimizer("sgd", nn.Linear(2, 2).requires_grad_(False).parameters(), 0.1)
    with pytest.raises(GroupSearchError, match="learning_rate > 0"):
        make_optimizer("sgd", nn.Linear(2, 2).parameters(), 0.0)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("autocast", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_autocast_reaches_the_loss_and_the_evaluation_and_changes_numbers_by_its_rounding(
    grouping, autocast, tolerance
):
    """An SGD run in half precision is near the one in float32 and not the same, and the model saw half precision."""
    seen: list[tuple[bool, torch.dtype]] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["x"])
        seen.append((torch.is_grad_enabled() and model.training, logits.dtype))
        return F.cross_entropy(logits.float(), batch["label"], reduction="none")

    made = workload(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 2)))
    settings = Settings(6, 0.05, optimizer="sgd", noise_multiplier=1.0, physical_batch=20)
    whole = weights(grouping, settings, dataclasses.replace(made, loss=watched))
    assert {dtype for _, dtype in seen} == {torch.float32}
    seen.clear()
    half = weights(grouping, dataclasses.replace(settings, autocast=autocast), dataclasses.replace(made, loss=watched))
    dtype = getattr(torch, autocast)
    assert seen.count((True, dtype)) >= 6
    assert (False, dtype) in seen
    assert close(whole, half, tolerance)
    assert not close(whole, half, 1e-6)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_empty_batches_are_steps_in_float16_too(grouping):
    settings = Settings(12, 0.05, sampling_rate=0.005, noise_multiplier=1.0, autocast="float16")
    assert train(workload(), GROUPINGS[grouping], settings).steps == 12


def test_an_unknown_autocast_is_refused():
    with pytest.raises(GroupSearchError, match="bfloat16, float16, found 'int8'"):
        Settings(2, 0.05, noise_multiplier=1.0, autocast="int8")
