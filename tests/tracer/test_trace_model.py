"""A trace: the same from any kind of model, consistent in itself, and nothing happens to the model."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine.truth import comparison as signature
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.options import EngineOptions
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import cost_table, lifetimes, peak_memory
from groupsearch.plan.trace import Trace
from groupsearch.tracer import trace_model
from groupsearch.tracer.live import LiveBytes
from groupsearch.workloads import load_workload
from tests.support.cases import EVERY_CASE, LAYER_CASES, MODEL_CASES, Case
from tests.support.reference import trainable

CHOSEN = (
    *("linear-2d", "linear-relu-in-place", "bitfit", "conv2d-groups", "conv1d-circular-same", "conv-channels-last"),
    *("embedding-padding", "positions-broadcast", "groupnorm", "rmsnorm-t5", "class-token", "temperature"),
    *("parameter-used-three-ways", "conv-transpose2d", "bare-einsum", "two-outputs-both", "reused-linear-3d"),
    *("reused-conv", "reused-embedding", "reused-parameter", "tied-embedding-head", "tied-three-ways"),
    *("frozen-first-half", "lora", "branches", "attention", *(n for n in LAYER_CASES if n.startswith("checkpoint-"))),
    *MODEL_CASES,
)
LIKE_OTHERS = {"gpt2-square", "gpt2-reentrant", "bert", "roberta", "t5-square", "vit-eager"}
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in CHOSEN]
WORKLOADS = {"digits-vit": {}, "digits-cnn": {}, "stdlib-gpt": {"width": 32, "blocks": 2}}


@cache
def trace_of(case: Case, batch_size: int = 4, **settings: Any) -> Trace:
    """Once for all tests of a process, none of which may change it."""
    batch = case.batch(torch.float32, batch_size)
    return trace_model(case.model(torch.float32), batch, case.loss, **settings)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_trace_is_consistent(name: str) -> None:
    case = EVERY_CASE[name]
    trace = trace_of(case)
    step = lifetimes(trace)  # refuses instants that are not those of one backward pass
    cost_table(trace)
    assert trace.batch_size == 4
    for instant in trace.instants:
        assert 0 <= instant.forward_bytes <= instant.live_bytes - trace.static.total
    for booked in trace.booked:
        assert booked.size_bytes > 0
        assert booked.released > step.hook_at[booked.last_site]
    assert all(site.close_bytes >= site.gradient_bytes >= 0 for site in trace.sites)
    assert all(term.transient_bytes > 0 for term in trace.cross_terms)


KEPT = (
    *("gpt2", "t5", "vit", "tied-embedding-head", "tied-linears", "reused-parameter", "reused-function", "temperature"),
    *("parameter-used-three-ways", "checkpoint-tied-reentrant", "checkpoint-non-reentrant", "bilinear"),
)


@pytest.mark.parametrize("name", KEPT)
def test_nothing_of_a_model_is_alive_after_its_trace(name: str) -> None:
    case, live = EVERY_CASE[name], LiveBytes()
    model = case.model(torch.float32)
    with live:
        trace_model(copy.deepcopy(model), case.batch(torch.float32), case.loss, device="cpu", copy_model=False)
    gc.collect()  # a circle that goes through the graph of autograd would stay
    assert live.live_bytes == 0
    assert len(live.sizes) > 50
    assert signature._signs.cache_info().currsize == 0  # hooks of gradients run unwatched


@pytest.mark.parametrize("name", PARAMETERS)
def test_sums_of_all_sites_are_the_trainable_parameters(name: str) -> None:
    case = EVERY_CASE[name]
    model = case.model(torch.float32)
    trace = trace_of(case)
    assert sum(site.gradient_bytes for site in trace.sites) == sum(p.nbytes for p in trainable(model).values())
    assert {name for site in trace.sites for name in site.parameters} == set(trainable(model))
    assert trace.static.weights == sum(p.nbytes for p in model.parameters())
    assert trace.static.batch == sum(t.nbytes for t in case.batch(torch.float32).values())


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2)])
def test_static_bytes_have_the_state_of_the_optimizer(optimizer: str, copies: int) -> None:
    trace = trace_of(LAYER_CASES["linear-3d"], optimizer=optimizer)
    counters = 4 * 3 if copies == 2 else 0  # Adam counts the steps of each of the three parameters
    assert trace.static.optimizer == copies * trace.static.weights + counters
    assert trace.settings["optimizer"] == optimizer


@pytest.mark.parametrize("name", ["linear-3d", "tied-embedding-head", "checkpoint-non-reentrant"])
def test_a_later_micro_batch_leaves_no_sums_of_its_own(name: str) -> None:
    once, twice, thrice = (trace_of(EVERY_CASE[name], micro_batches=count) for count in (1, 2, 3))
    trainable_bytes = sum(site.gradient_bytes for site in once.sites)
    assert (once.carried_bytes, twice.carried_bytes) == (0, trainable_bytes)
    assert {site.gradient_bytes for site in twice.sites} == {0}
    assert [site.name for site in twice.sites] == [site.name for site in once.sites]
    assert once.step_bytes == twice.step_bytes
    for instant in twice.instants:
        assert 0 <= instant.forward_bytes <= instant.live_bytes - twice.static.total
    assert {**twice.to_json(), "settings": {}} == {**thrice.to_json(), "settings": {}}


def test_a_document_from_before_micro_batches_is_read() -> None:
    trace = trace_of(LAYER_CASES["linear-3d"])
    older = trace.to_json()
    del older["carried_bytes"]
    assert Trace.from_json(older).to_json() == trace.to_json()


def test_pairs_of_sites_on_one_parameter_are_cross_terms() -> None:
    pairs = {(c.early, c.late) for c in trace_of(LAYER_CASES["reused-linear"]).cross_terms}
    assert pairs == {(1, 0), (2, 0), (2, 1)}
    assert {(c.early, c.late) for c in trace_of(LAYER_CASES["tied-embedding-head"]).cross_terms} == {(2, 0)}
    assert not trace_of(LAYER_CASES["linear-3d"]).cross_terms


def test_the_cost_of_a_cross_term_is_that_of_its_inner_product() -> None:
    """Two Gram matrices (B, T, T) and nothing else: the operands are booked already."""
    examples, positions = 4, 16
    case = Case("tied", LAYER_CASES["tied-linears"].build, (positions, 6))
    (term,) = trace_of(case, examples, options=EngineOptions("ghost")).cross_terms
    gram_bytes = 4 * examples * positions**2
    assert 2 * gram_bytes <= term.transient_bytes <= 2 * gram_bytes + 16 * examples


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_a_model_on_the_meta_device_has_the_same_trace(name: str, checkpoint: str) -> None:
    if (name, checkpoint) == ("digits-cnn", "blocks"):
        pytest.skip("it has no blocks")
    workload = load_workload(name, batch_size=6, **WORKLOADS[name])
    with torch.device("meta"):
        empty = workload.build()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    batch = workload.make_batch(6)
    traces = [trace_model(model, batch, workload.loss, checkpoint=checkpoint) for model in (empty, workload.build())]
    assert traces[0].to_json() == {key: value for key, value in traces[1].to_json().items() if key != "checked"}
    assert (traces[0].checked is None, traces[1].checked is None) == (True, False)
    assert traces[0].settings["checkpoint"] == checkpoint


@pytest.mark.parametrize("name", ["digits-vit", "stdlib-gpt"])
def test_real_tensors_on_the_cpu_give_the_same_peaks(name: str) -> None:
    workload = load_workload(name, batch_size=32, **WORKLOADS[name])
    batch = workload.make_batch(32)
    fake = trace_model(workload.model, batch, workload.loss)
    real = trace_model(workload.model, batch, workload.loss, device="cpu")
    assert (fake.settings["fake"], real.settings["fake"]) == (True, False)
    assert [site.name for site in fake.sites] == [site.name for site in real.sites]
    assert real.nonprivate_peak_bytes == pytest.approx(fake.nonprivate_peak_bytes, rel=5e-3)
    for make in (Grouping.all_layer, Grouping.layer_wise, Grouping.block_wise):
        peaks = [peak_memory(trace, make(trace)).peak_bytes for trace in (fake, real)]
        assert peaks[1] == pytest.approx(peaks[0], rel=5e-3)


@pytest.mark.parametrize("name", ["gpt2", "t5", "reused-conv", "class-token"])
def test_tracing_twice_gives_the_same(name: str) -> None:
    again = trace_of.__wrapped__  # not from the cache
    assert again(EVERY_CASE[name]).to_json() == trace_of(EVERY_CASE[name]).to_json()


@pytest.mark.parametrize("name", ["tied-embedding-head", "gpt2", "checkpoint-reentrant"])
def test_a_trace_survives_json(name: str) -> None:
    trace = trace_of(EVERY_CASE[name], options=EngineOptions("ghost"), optimizer="sgd")
    again = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    assert again.to_json() == trace.to_json()
    assert {"norm_method": "ghost", "optimizer": "sgd", "checkpoint": "none", "fake": True}.items() <= (
        again.settings.items()
    )
    assert peak_memory(again, ()) == peak_memory(trace, ())


def test_more_examples_take_more_and_weights_the_same() -> None:
    few, many = (trace_of(MODEL_CASES["gpt2"], size) for size in (2, 8))
    assert few.static.weights == many.static.weights
    assert 4 * few.static.batch == many.static.batch
    assert few.nonprivate_peak_bytes < many.nonprivate_peak_bytes
    assert peak_memory(few, ()).peak_bytes < peak_memory(many, ()).peak_bytes


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a trace must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": [p.detach().clone() for p in (*model.parameters(), *model.buffers())],
        "identity": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "tensor hooks": [p._backward_hooks for p in model.parameters()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, work: Callable[[nn.Module], object], random: bool = True) -> None:
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 3.0)
    list(model.modules())[-1].eval()
    before = state_of(model)
    work(model)
    after = state_of(model)
    for key in ("identity", "modes", "hooks", "tensor hooks", "forwards"):
        assert after[key] == before[key], key
    torch.testing.assert_close(after["values"], before["values"], rtol=0, atol=0)
    torch.testing.assert_close(after["grads"], before["grads"], rtol=0, atol=0)
    if random:  # a step on real tensors draws real noise
        assert torch.equal(after["random"], before["random"])


@pytest.mark.parametrize("name", ["gpt2", "tied-embedding-head", "conv2d-groups", "class-token", "residual-mlp"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_trace_leaves_the_model_alone(name: str, device: str | None) -> None:
    case = EVERY_CASE[name]
    work = lambda model: trace_model(model, case.batch(torch.float32), case.loss, device=device)  # noqa: E731
    assert_untouched(case.model(torch.float32), work, random=device is None)


def test_checkpointing_blocks_leaves_the_model_alone() -> None:
    case = MODEL_CASES["gpt2"]
    work = lambda m: trace_model(m, case.batch(torch.float32), case.loss, checkpoint="blocks")  # noqa: E731
    assert_untouched(case.model(torch.float32), work)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def _mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).mean()


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(
    ("build", "loss", "message"),
    [
        (_batch_norm, LAYER_CASES["linear-2d"].loss, "BatchNorm"),
        (Unused, LAYER_CASES["linear-2d"].loss, "spare.weight, spare.bias"),
        (lambda: nn.Linear(6, 5), _mean_loss, "one loss per example"),
    ],
    ids=["batch norm", "unused parameter", "mean loss"],
)
def test_what_is_refused_is_left_alone(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module, Any], Tensor], message: str, device: str | None
) -> None:
    def work(model: nn.Module) -> None:
        with pytest.raises(UnsupportedModelError, match=message):
            trace_model(model, LAYER_CASES["linear-2d"].batch(torch.float32), loss, device=device)

    assert_untouched(build(), work, random=device is None)


def test_a_loss_that_raises_leaves_the_model_alone() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        model(batch["x"])
        raise ZeroDivisionError

    def work(model: nn.Module) -> None:
        with pytest.raises(ZeroDivisionError):
            trace_model(model, LAYER_CASES["linear-2d"].batch(torch.float32), broken)

    assert_untouched(LAYER_CASES["linear-2d"].model(torch.float32), work)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "some"}, "checkpoint"),
        ({"checkpoint": "every:0"}, "every:K"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"optimizer": "adam:"}, "alone or followed by"),
        ({"optimizer": "sgd:faster"}, "alone or followed by"),
        ({"micro_batches": 0}, "micro_batches >= 1"),
        ({"autocast": "int8"}, "autocast to be one of none"),
        ({"device": "cuda:99"}, "cannot be used"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        trace_of(LAYER_CASES["linear-2d"], **settings)


def test_a_model_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(UnsupportedModelError, match="no repeated blocks"):
        trace_of(LAYER_CASES["linear-2d"], checkpoint="blocks")
