"""Several rows of one example in a batch are clipped once: views folded into it, triplets, sentence pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.measure import measure_step
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import Rows, Trace
from groupsearch.tracer import StepSettings, trace_model
from groupsearch.tracer.step import made_private, make_stage, real_copy
from groupsearch.training import TrainSettings, train
from groupsearch.workloads.batches import mean_over_views, repeat_views, with_views
from groupsearch.workloads.workload import Data, Workload
from tests.support.reference import clipped_sums, per_example_gradients

B, K = 4, 3
THRESHOLD = 0.05


class Permuted(nn.Module):
    """Images (N, 1, 6, 6) to positions (N, T, d), so that rows are folded a second time inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2, 2)
        self.norm = nn.GroupNorm(2, 4)
        self.inner = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(self.conv(x)).flatten(2).mT  # (N, 9, 4)
        windows = seen.unflatten(1, (3, 3)).flatten(0, 1)  # (N 3, 3, 4)
        return self.head(self.inner(windows).tanh().unflatten(0, (len(x), 3)).flatten(1, 2).mean(1))


class Positions(nn.Module):
    """A learned position and class token in front of layers: bare parameters that meet every row."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.place = nn.Parameter(torch.randn(5, 4))
        self.gate = nn.Parameter(torch.randn(4, 4))
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.flatten(1)[:, :4].abs() * 3).long().clamp(max=6)
        seen = torch.cat([self.token.expand(len(x), -1, -1), self.embed(ids)], 1) + self.place
        return self.head(self.norm(seen @ self.gate).tanh().mean(1))


class Attending(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.inner(x.squeeze(1))
        seen = seen if self.batch_first else seen.transpose(0, 1)
        return self.head(self.attention(seen, seen, seen)[0].mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cells = nn.LSTM(6, 4, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = x.squeeze(1) if self.batch_first else x.squeeze(1).transpose(0, 1)
        return self.head(self.cells(seen)[0].mean(1 if self.batch_first else 0))


class Routed(nn.Module):
    """Rows that leave their examples: the module is differentiated as one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Routing()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.squeeze(1)).tanh().mean(1))


class Routing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = torch.zeros_like(x), x.sum(-1) > 0
        out[chosen] = self.experts[0](x[chosen])
        out[~chosen] = self.experts[1](x[~chosen])
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)),
    "folded twice": Permuted,
    "bare parameters": Positions,
    "attention, batch first": lambda: Attending(True),
    "attention": lambda: Attending(False),
    "recurrent, batch first": lambda: Recurrent(True),
    "recurrent": lambda: Recurrent(False),
    "routed": Routed,
}


def side_by_side(model: nn.Module, batch: Any) -> Tensor:
    views = batch["x"]
    logits = model(views.flatten(0, 1))
    labels = batch["y"].repeat_interleave(views.shape[1])
    return functional.cross_entropy(logits, labels, reduction="none").view(len(views), -1).mean(1)


def apart(model: nn.Module, batch: Any) -> Tensor:
    anchor, near, far = model(torch.cat(batch["x"].unbind(1))).chunk(3)
    return functional.triplet_margin_loss(anchor, near, far, margin=5.0, reduction="none")


LOSSES = {"side by side": side_by_side, "apart": apart}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[name]().double()
        x = torch.randn(B, 1, 1, 6, 6, dtype=torch.float64) + 0.3 * torch.randn(B, K, 1, 6, 6, dtype=torch.float64)
        return model, {"x": x, "y": torch.randint(3, (B,))}


def sums_of(model: nn.Module, trace: Trace, batches: list[Any], loss: Any, boundaries: tuple[int, ...]) -> Any:
    plan = ClipPlan(Grouping(boundaries, trace.sites), max_grad_norm=THRESHOLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
    for batch in batches:
        loss(model, batch).mean().backward()
    sums = engine.clipped_sums()
    engine.detach()
    return plan, sums


@pytest.mark.parametrize("order", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_an_example_of_several_rows_is_clipped_once(name: str, order: str) -> None:
    loss = LOSSES[order]
    model, batch = make(name)
    trace = trace_model(model, batch, loss)
    assert {site.rows for site in trace.sites} == {Rows(0, 0, K, order == "apart")}
    for boundaries in ((), tuple(range(1, len(trace.sites)))):
        plan, found = sums_of(model, trace, [batch], loss, boundaries)
        truth = clipped_sums(model, batch, loss, plan)
        for parameter, expected in truth.items():
            torch.testing.assert_close(found[parameter], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", LOSSES)
def test_leaving_one_example_out_moves_the_sum_by_no_more_than_the_sensitivity(order: str) -> None:
    model, batch = make("linear")
    trace = trace_model(model, batch, LOSSES[order])
    plan, whole = sums_of(model, trace, [batch], LOSSES[order], ())
    _, less = sums_of(model, trace, [{k: v[1:] for k, v in batch.items()}], LOSSES[order], ())
    moved = torch.sqrt(sum(((whole[name] - less[name]) ** 2).sum() for name in whole))
    assert 0.99 * plan.sensitivity < float(moved) <= plan.sensitivity * (1 + 1e-6)


def test_micro_batches_and_empty_ones_count_examples_and_not_rows() -> None:
    model, batch = make("linear")
    trace = trace_model(model, batch, side_by_side)
    pieces = [{k: v[i:j] for k, v in batch.items()} for i, j in ((0, 1), (1, 4), (4, 4))]
    _, together = sums_of(model, trace, [batch], side_by_side, ())
    _, found = sums_of(model, trace, pieces[:2], side_by_side, ())
    for name, expected in together.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_rows_that_do_not_make_up_whole_examples_are_refused() -> None:
    model, batch = make("linear")
    plan = ClipPlan(Grouping((), trace_model(model, batch, side_by_side).sites))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    make_private(model, optimizer, plan, noise_multiplier=1.0, expected_batch_size=B)
    with pytest.raises(UnsupportedModelError, match=r"called with rows of which 3 belong to every example"):
        model(torch.zeros(4, 1, 6, 6, dtype=torch.float64))


def test_an_order_that_only_values_show_is_not_guessed() -> None:
    model, batch = make("linear")
    with pytest.raises(UnsupportedModelError, match="3 rows of every example, whose order only values show"):
        trace_model(model.to("meta"), batch, side_by_side)


def test_a_trace_with_several_rows_is_read_as_it_was_written() -> None:
    model, batch = make("linear")
    trace = trace_model(model, batch, apart)
    assert Trace.from_json(trace.to_json()).sites == trace.sites


@pytest.mark.parametrize("order", LOSSES)
@pytest.mark.parametrize("name", ["linear", "folded twice"])
def test_estimates_of_several_rows_are_measured(name: str, order: str) -> None:
    model, batch = make(name)
    loss = LOSSES[order]
    trace = trace_model(model, batch, loss)
    for grouping in (Grouping.all_layer(trace), Grouping.layer_wise(trace)):
        stage = make_stage(*real_copy(model, batch, torch.device("cpu")), loss, StepSettings())
        with made_private(stage, StepSettings(), grouping, B):
            measured = measure_step(stage, torch.device("cpu"), steps=1)
        assert peak_memory(trace, grouping).peak_bytes == pytest.approx(measured.peak_bytes, abs=128)


def _shifted(rows: Any) -> Any:
    return {**rows, "x": rows["x"] + 0.1 * torch.randn_like(rows["x"])}


def _plain(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_batches_come_with_as_many_views_as_are_asked_for() -> None:
    data = {"x": torch.arange(40.0).view(20, 2), "y": torch.arange(20)}
    batches = PoissonBatches(data, expected_batch_size=8, steps=3, physical_batch=4, views=K, augment=_shifted)
    for logical in batches:
        for batch in logical:
            assert batch["x"].shape[1:] == (K, 2)
            assert (batch["y"] == batch["y"][:, :1]).all()
            assert len({tuple(view) for view in batch["x"][0].tolist()}) == K
            assert (batch["x"] - data["x"][batch["y"]]).abs().max() < 1.0


def test_a_data_set_is_looked_at_once_for_every_view() -> None:
    class Random(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            return index, torch.rand(2)

    for logical in PoissonBatches(Random(), expected_batch_size=5, steps=2, views=K):
        for numbers, drawn in logical:
            assert numbers.shape[1] == K
            assert (numbers == numbers[:, :1]).all()
            assert (drawn[:, 0] != drawn[:, 1]).all()


def test_the_mean_over_views_is_the_loss_of_an_example() -> None:
    model, batch = make("linear")
    views = {"x": batch["x"], "y": batch["y"][:, None].expand(-1, K)}
    torch.testing.assert_close(mean_over_views(_plain)(model, views), side_by_side(model, batch))
    with pytest.raises(GroupSearchError, match="begin with the examples and their views"):
        mean_over_views(_plain)(model, batch)


def test_what_augments_must_keep_the_number_of_rows() -> None:
    with pytest.raises(GroupSearchError, match=r"Expected 3 views .* \(7, 2\)"):
        repeat_views(torch.zeros(4, 2), 3, lambda rows: rows[:7])


def test_a_workload_is_traced_and_trained_with_views() -> None:
    def build(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    generator = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(60, 6, generator=generator), "y": torch.randint(3, (60,), generator=generator)}
    plain = Workload("own", build, lambda b: {k: v[:b] for k, v in data.items()}, _plain, data=Data(data, data))
    workload = with_views(plain, K, _shifted)
    batch = workload.make_batch(5)
    assert batch["x"].shape == (5, K, 6)
    trace = trace_model(workload.model, batch, workload.loss)
    assert {site.rows.count for site in trace.sites} == {K}
    settings = TrainSettings(4, 0.1, noise_multiplier=0.5, sampling_rate=0.3, physical_batch=7)
    result = train(workload, Grouping((1,), trace.sites), settings)
    assert result.curve[-1].loss > 0
    with pytest.raises(GroupSearchError, match="of one that has 3"):
        with_views(workload, 2)


def test_gradients_over_views_are_those_of_the_mean() -> None:
    model, batch = make("linear")
    views = {"x": batch["x"], "y": batch["y"][:, None].expand(-1, K)}
    one = per_example_gradients(model, views, mean_over_views(_plain))
    other = per_example_gradients(model, batch, side_by_side)
    for mine, theirs in zip(one, other, strict=True):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name])
