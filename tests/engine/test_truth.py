"""The truth check: what mixes examples is refused however it hides; what does not is not."""

from __future__ import annotations

import random
from collections import UserDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine.truth.comparison import signature
from groupsearch.engine.truth.draws import OTHERS, USUAL, alike
from groupsearch.engine.truth.rows import choose_rows, joined
from groupsearch.errors import TruthError, UnsupportedModelError
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.tracer.sites import examine
from groupsearch.workloads.batches import count_examples, first_examples, map_tensors

SIZE = 8


def batch_of(*shape: int, classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(SIZE, *(shape or (6,)), generator=generator),
        "y": torch.arange(SIZE) % classes,
    }


def ids_of(length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randint(11, (SIZE, length), generator=generator), "y": torch.arange(SIZE) % 3}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Net(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 5), nn.Linear(5, 3)
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self._between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.tanh(self._between(self, self.a(x))))


# -- training-only mixing --------------------------------------------------------------------


def own_norm(m: Any, z: Tensor) -> Tensor:
    return functional.batch_norm(z, m.mean, m.var, training=m.training)


def centred(m: Any, z: Tensor) -> Tensor:
    return z - z.mean(0) if m.training else z


def mixup(m: Any, z: Tensor) -> Tensor:
    return 0.6 * z + 0.4 * z.roll(1, 0) if m.training else z


def random_mixup(m: Any, z: Tensor) -> Tensor:
    return 0.7 * z + 0.3 * z[torch.randperm(len(z))] if m.training else z


def python_mixup(m: Any, z: Tensor) -> Tensor:
    order = list(range(len(z)))
    random.shuffle(order)
    return 0.7 * z + 0.3 * z[order] if m.training else z


def numpy_mixup(m: Any, z: Tensor) -> Tensor:
    return 0.7 * z + 0.3 * z[torch.as_tensor(np.random.permutation(len(z)))] if m.training else z


def swapped(m: Any, z: Tensor) -> Tensor:
    return z.flip(0) if m.training else z


def whitened(m: Any, z: Tensor) -> Tensor:
    return z / (1 + z.pow(2).mean()) if m.training else z


def nearest(m: Any, z: Tensor) -> Tensor:
    return z + z[torch.cdist(z, z).argmax(1)].detach() if m.training else z


def attention_over_examples(m: Any, z: Tensor) -> Tensor:
    return (z @ z.T).softmax(1) @ z if m.training else z


MIXING = [
    centred, mixup, random_mixup, python_mixup, numpy_mixup, swapped, whitened, nearest, attention_over_examples,
]  # fmt: skip


@pytest.mark.parametrize("between", MIXING, ids=lambda f: f.__name__)
def test_mixing_in_training_is_refused(between: Callable[..., Tensor]) -> None:
    model = Net(between).train()
    with pytest.raises(UnsupportedModelError, match="depends on the other examples"):
        observe_sites(model, batch_of(), cross_entropy)
    observe_sites(model.eval(), batch_of(), cross_entropy)


def test_batch_statistics_of_ones_own_are_refused() -> None:
    model = Net(own_norm, mean=torch.zeros(5), var=torch.ones(5))
    with pytest.raises(UnsupportedModelError, match="needs several examples"):
        observe_sites(model, batch_of(), cross_entropy)
    spatial = nn.Sequential(nn.Conv1d(2, 3, 1), SpatialNorm(), nn.Flatten(), nn.Linear(9, 3))
    with pytest.raises(TruthError, match="from module '1' on"):
        observe_sites(spatial, batch_of(2, 3), cross_entropy)


class SpatialNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)


# -- losses over the batch -------------------------------------------------------------------


def of_counted(model: nn.Module, batch: Any) -> Tensor:
    losses = cross_entropy(model, batch)
    counted = batch["y"] > 0
    return losses * counted / counted.sum().clamp(min=1)


def of_mean(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) / len(batch["x"])


def with_spread(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["x"])
    return functional.cross_entropy(out, batch["y"], reduction="none") + 0.1 * out.var(unbiased=False)


def balanced(model: nn.Module, batch: Any) -> Tensor:
    counts = torch.bincount(batch["y"], minlength=3)
    return cross_entropy(model, batch) / counts[batch["y"]]


def hardest(model: nn.Module, batch: Any) -> Tensor:
    losses = cross_entropy(model, batch)
    return losses * (losses >= losses.median())


def with_neighbours_of_the_same_label(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["x"])
    same = (batch["y"][:, None] == batch["y"][None]).float().fill_diagonal_(0)
    return functional.cross_entropy(out, batch["y"], reduction="none") + (same @ out).square().sum(1)


def with_duplicates(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"]
    copies = (x[:, None] == x[None]).all(-1).sum(1)
    return cross_entropy(model, batch) / copies


LOSSES = [
    of_counted, of_mean, with_spread, balanced, hardest, with_neighbours_of_the_same_label, with_duplicates,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses_with_terms_over_the_batch_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(TruthError, match="loss of an example depends on the other"):
        observe_sites(Net(lambda m, z: z), batch_of(), loss)


# -- products that a zero hides --------------------------------------------------------------


def hidden_mean(m: Any, z: Tensor) -> Tensor:
    return z + 0.0 * z.mean(0)


def hidden_mask(m: Any, z: Tensor) -> Tensor:
    return (z[None] * torch.eye(len(z))[..., None]).sum(1)


def switched_off(m: Any, z: Tensor) -> Tensor:
    return z + m.gate * z.mean(0)


@pytest.mark.parametrize("between", [hidden_mean, hidden_mask, switched_off], ids=lambda f: f.__name__)
def test_what_a_zero_hides_is_found_by_nan(between: Callable[..., Tensor]) -> None:
    model = Net(between, gate=torch.zeros(()))
    with pytest.raises(TruthError, match="NaN in the inputs of one example reaches"):
        observe_sites(model, batch_of(), cross_entropy)


def test_what_a_zero_hides_behind_an_embedding_is_found() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.e(x).mean(1)
            return self.h(z + 0.0 * z.mean(0))

    with pytest.raises(TruthError, match="NaN"):
        observe_sites(Words(), ids_of(), cross_entropy)


# -- state -----------------------------------------------------------------------------------


def remembers_mean(m: Any, z: Tensor) -> Tensor:
    out = z - m.mean
    m.mean.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
    return out


def replaces_buffer(m: Any, z: Tensor) -> Tensor:
    m.mean = z.detach().mean(0)
    return z


def counts_examples(m: Any, z: Tensor) -> Tensor:
    m.mean += len(z)
    return z


def counts_steps(m: Any, z: Tensor) -> Tensor:
    m.mean += 1
    return z


def keeps_last(m: Any, z: Tensor) -> Tensor:
    out = z if m.last is None else z + m.last.mean(0)
    m.last = z.detach()
    return out


def keeps_queue(m: Any, z: Tensor) -> Tensor:
    out = z + torch.stack([q.mean(0) for q in m.last]).mean(0) if m.last else z
    m.last.append(z.detach())
    return out


def keeps_table(m: Any, z: Tensor) -> Tensor:
    out = z + m.last.get("z", torch.zeros(5))
    m.last["z"] = z.detach().mean(0)
    return out


@pytest.mark.parametrize("between", [remembers_mean, replaces_buffer, counts_examples], ids=lambda f: f.__name__)
def test_buffers_that_keep_what_depends_on_the_data_are_refused_by_name(between: Callable[..., Tensor]) -> None:
    model = Net(between, mean=torch.zeros(5))
    with pytest.raises(UnsupportedModelError, match="leaves what depends on its examples in 'mean'"):
        observe_sites(model, batch_of(), cross_entropy)
    assert torch.equal(model.mean, torch.zeros(5))
    checked = examine(model, batch_of(), cross_entropy, allow_state=("mean",)).checked
    assert checked is not None
    assert any("mean (allowed by name)" in text for text in checked.state)


@pytest.mark.parametrize(
    ("between", "empty"),
    [(keeps_last, lambda: None), (keeps_queue, list), (keeps_queue, deque), (keeps_table, dict)],
    ids=["attribute", "list", "deque", "dict"],
)
def test_state_in_python_that_the_next_step_uses_is_refused(between: Callable[..., Tensor], empty: Any) -> None:
    model = Net(between, last=empty())
    with pytest.raises(UnsupportedModelError, match=r"depends on the batch before its own.*'last'"):
        observe_sites(model, batch_of(), cross_entropy)
    assert not model.last


def test_state_outside_of_the_model_is_refused() -> None:
    kept: list[Tensor] = []

    def between(m: Any, z: Tensor) -> Tensor:
        out = z + kept[-1] if kept else z
        kept.append(z.detach().mean(0))
        return out

    with pytest.raises(UnsupportedModelError, match="depends on the"):
        observe_sites(Net(between), batch_of(), cross_entropy)


def test_counters_and_kept_activations_are_not_refused() -> None:
    def between(m: Any, z: Tensor) -> Tensor:
        m.steps += 1
        m.features = z.detach()
        m.calls.append("between")
        return z * min(1.0, 0.1 * m.steps)

    model = Net(between, steps=0, calls=[], features=None)
    checked = examine(model, batch_of(), cross_entropy).checked
    assert checked is not None
    assert any("features" in text for text in checked.state)
    assert (model.steps, model.calls, model.features) == (0, [], None)
    observe_sites(Net(counts_steps, mean=torch.zeros(())), batch_of(), cross_entropy)


# -- right models ----------------------------------------------------------------------------


def dropped(m: Any, z: Tensor) -> Tensor:
    return functional.dropout(z, 0.3, m.training)


def noisy(m: Any, z: Tensor) -> Tensor:
    return z + 0.1 * torch.randn_like(z) * torch.rand(len(z), 1)


def own_generator(m: Any, z: Tensor) -> Tensor:
    return z + 0.1 * torch.randn(z.shape, generator=m.generator)


def masked_by_python(m: Any, z: Tensor) -> Tensor:
    mask = torch.tensor([[random.random() < 0.8 for _ in row] for row in z])
    return torch.where(mask, z, 0.0)


def masked_by_numpy(m: Any, z: Tensor) -> Tensor:
    mask = np.zeros(z.shape, dtype=bool)
    for row in mask:
        row[np.random.choice(5, 2, replace=False)] = True
    return z.masked_fill(torch.as_tensor(mask), 0.0)


def stochastic_depth(m: Any, z: Tensor) -> Tensor:
    return z + z.new_empty(len(z), 1).bernoulli_(0.8) / 0.8 * torch.tanh(z)


def spread_features(m: Any, z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (1 + z.std(1, keepdim=True))


RIGHT = [
    dropped, noisy, own_generator, masked_by_python, masked_by_numpy, stochastic_depth, spread_features,
]  # fmt: skip


@pytest.mark.parametrize("between", RIGHT, ids=lambda f: f.__name__)
def test_right_models_are_not_refused(between: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    checked = examine(Net(between, generator=generator), batch_of(), cross_entropy).checked
    assert checked is not None
    assert checked.mode == "training"
    assert checked.worst < 1e-4
    assert not checked.skipped
    assert torch.equal(generator.get_state(), before)


def test_a_check_leaves_everything_as_it_was() -> None:
    model = Net(lambda m, z: functional.dropout(z, 0.2), count=torch.zeros(()))
    model.h.eval()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for loss in (cross_entropy, of_mean):
        try:
            observe_sites(model, batch_of(), loss)
        except TruthError:
            assert loss is of_mean
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert repr(np.random.get_state()) == repr(states[2])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
        assert model.a.bias.grad is None
        assert model.training
        assert not model.h.training


# -- rows ------------------------------------------------------------------------------------


class Categories(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.ModuleList([nn.Embedding(c, 3) for c in (50, 4, 2)])
        self.h = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.cat([e(x[:, j]) for j, e in enumerate(self.e)], 1))


class CategoryAmongNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(5, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.cat([self.e(x[:, 0].long()), x[:, 1:]], 1))


class Covariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.linalg.cholesky(x).flatten(1))


class Angles(nn.Module):
    """Takes what lies between -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1:
            raise ValueError("expected sines")
        return self.h(torch.asin(x))


class Shares(nn.Module):
    """Takes rows that add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert torch.allclose(x.sum(1), torch.ones(len(x)))
        return self.h(x)


def tables() -> dict[str, tuple[nn.Module, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(SIZE, 3, 3, generator=generator)
    few = torch.randint(2, (SIZE, 1), generator=generator)
    return {
        "categories": (Categories(), torch.cat([torch.arange(SIZE)[:, None] + 40, few + 2, few], 1)),
        "a category among numbers": (
            CategoryAmongNumbers(),
            torch.cat([few + 3.0, 40 + 20 * torch.rand(SIZE, 3, generator=generator)], 1),
        ),
        "covariances": (Covariance(), square @ square.mT + 0.1 * torch.eye(3)),
        "sines": (Angles(), torch.rand(SIZE, 6, generator=generator)),
        "shares": (Shares(), torch.rand(SIZE, 6, generator=generator).softmax(1)),
    }


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("count", [SIZE, 4, 1])
def test_rows_are_taken_whole(name: str, count: int) -> None:
    model, x = tables()[name]
    batch = {"x": x[:count], "y": torch.arange(count) % 3}
    checked = examine(model, batch, cross_entropy).checked
    assert checked is not None
    assert checked.worst < 1e-3


def test_rows_are_different_with_two_equal_labels() -> None:
    batch = {"x": torch.tensor([[1.5], [1.5], [2.5], [3.5], [4.5]]), "y": torch.tensor([0, 0, 1, 1, 0])}
    rows = choose_rows(batch)
    assert joined(rows.examples)["x"].flatten().tolist() == [1.5, 4.5, 2.5]
    assert joined(rows.examples)["y"].tolist() == [0, 0, 1]
    assert [crowd.batch["x"].flatten().tolist() for crowd in rows.extremes] == [[1.5, *[s * 75.0] * 4] for s in (1, -1)]
    assert [crowd.batch["y"].tolist() for crowd in rows.crowds] == [[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_capacity_that_no_row_of_the_batch_fills_is_found(places: int, sign: float) -> None:
    def limited(m: Any, z: Tensor) -> Tensor:
        rows = (sign * z[:, 0] > 10).nonzero().squeeze(1)[:places]
        return z.index_fill(0, rows, 0.3)

    model = Net(limited)
    nn.init.ones_(model.a.weight)
    batch = {"x": torch.rand(SIZE, 6), "y": torch.arange(SIZE) % 3}
    with pytest.raises(UnsupportedModelError, match=r"depends on the other examples"):
        trace_model(model, batch, cross_entropy)


def test_the_model_that_takes_no_batch_of_one_is_told_so() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.h = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.l(x.squeeze())[0][..., -1, :])

    with pytest.raises(UnsupportedModelError, match=r"one example alone failed where one on several runs.*squeeze"):
        trace_model(Squeezing(), batch_of(1, 2, 3), cross_entropy)


def test_the_model_that_takes_one_size_of_batch_is_told_so() -> None:
    model = Net(lambda m, z: z.view(SIZE, 5))
    with pytest.raises(UnsupportedModelError, match=f"on 3 of the examples failed where one on all {SIZE} runs"):
        observe_sites(model, batch_of(), cross_entropy)


def test_an_error_of_the_users_own_keeps_its_traceback_and_gains_a_sentence() -> None:
    batch = batch_of()
    batch["y"] = batch["y"] + 5
    with pytest.raises(IndexError, match="out of bounds") as caught:
        observe_sites(Net(lambda m, z: z), batch, cross_entropy)
    assert any("raised by the model or the loss itself" in note for note in caught.value.__notes__)
    assert any(entry.name == "cross_entropy" for entry in caught.traceback)


def test_the_examples_of_a_time_first_model_are_counted_where_they_are() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.h = nn.LSTM(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.l(x)[0][-1])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch["x"].transpose(0, 1)), batch["y"], reduction="none")

    sites = observe_sites(Sequences(), batch_of(3, 2), loss)
    assert {(site.rows.dimension, site.rows.count) for site in sites} == {(1, 1)}


# -- nested batches --------------------------------------------------------------------------


def test_nested_and_mixed_batches_are_taken() -> None:
    x, y = batch_of()["x"], batch_of()["y"]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels, nothing, power = batch
        assert isinstance(inputs, UserDict)
        assert nothing is None
        out = model(inputs["x"])
        return functional.cross_entropy(out, torch.as_tensor(labels), reduction="none") * power

    batch = (UserDict({"x": x, "more": {"z": x}}), y.numpy(), None, 2.0)
    assert count_examples(batch) == SIZE
    assert first_examples(batch, 2)[0]["more"]["z"].shape == (2, 6)
    trace = trace_model(Net(lambda m, z: z), batch, loss)
    assert trace.batch_size == SIZE
    assert trace.checked is not None


def test_mappings_stay_of_their_class() -> None:
    class Tokens(UserDict[str, Any]):
        pass

    made = map_tensors(lambda t: t + 1, {"a": Tokens({"ids": torch.zeros(2)}), "b": [torch.zeros(2), None]})
    assert isinstance(made["a"], Tokens)
    assert made["a"]["ids"].tolist() == [1, 1]
    assert made["b"][1] is None


# -- parts used in training, and at some draws -------------------------------------------------


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.h = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.a(x))
        return (self.h(z), self.aux(z)) if self.training else self.h(z)


def every_head(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["x"])
    heads = out if isinstance(out, tuple) else (out,)
    return sum((functional.cross_entropy(o, batch["y"], reduction="none") for o in heads), torch.zeros(()))


def test_auxiliary_heads_are_seen_in_training() -> None:
    assert {s.name for s in trace_model(Auxiliary().train(), batch_of(), every_head).sites} == {"a", "aux", "h"}
    with pytest.raises(UnsupportedModelError, match=r"aux.*evaluation mode: call .train\(\)"):
        observe_sites(Auxiliary().eval(), batch_of(), every_head)


class Skipping(nn.Module):
    """A layer that is used at some draws."""

    def __init__(self, is_used: Callable[[], bool]) -> None:
        super().__init__()
        self.a, self.extra, self.h = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self._is_used = is_used

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x))
        if self._is_used():
            z = z + self.extra(z)
        return self.h(z)


USED: dict[str, Callable[[], bool]] = {
    "layer drop": lambda: bool(torch.rand([]) > 0.1),
    "rarely": lambda: bool(torch.rand([]) < 0.1),
    "rarely, by a coin": lambda: bool(torch.bernoulli(torch.tensor(0.1))),
    "python": lambda: random.random() < 0.3,
    "numpy": lambda: np.random.rand() < 0.1,
    "above": lambda: random.random() > 0.9,
}


@pytest.mark.parametrize("name", USED)
def test_layers_that_are_used_at_some_draws_are_found(name: str) -> None:
    trace = trace_model(Skipping(USED[name]).train(), batch_of(), cross_entropy)
    assert {site.name for site in trace.sites} == {"a", "extra", "h"}
    assert trace.checked is not None


def test_a_part_that_no_draw_uses_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"extra\.weight, extra\.bias"):
        observe_sites(Skipping(lambda: False), batch_of(), cross_entropy)


# -- draws and signatures ----------------------------------------------------------------------


def test_draws_are_constants_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    with alike():
        drawn = [torch.rand(3), torch.randn(3), torch.randint(9, (3,)), torch.empty(3).exponential_()]
        kept = functional.dropout(torch.ones(4), 0.5)
        order = torch.randperm(4).tolist()
        numbers = random.random(), np.random.rand()
        again = random.random(), np.random.rand()
    assert all(len(set(values.tolist())) == 1 for values in drawn)
    assert kept.tolist() == [2, 2, 2, 2]
    assert order == [3, 2, 1, 0]
    assert numbers == again
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draws", [USUAL, *OTHERS])
def test_python_and_numpy_draw_near_the_quantile(draws: Any) -> None:
    with alike(draws):
        assert abs(random.random() - draws.uniform) < 0.02
        assert abs(float(np.random.rand()) - draws.uniform) < 0.02
        assert torch.rand(()).item() == pytest.approx(draws.uniform)


@pytest.mark.parametrize("numbers", [1, 7, 64, 65, 1000, 4096, 100_000])
def test_signatures_add_up_and_keep_lengths(numbers: int) -> None:
    generator = torch.Generator().manual_seed(numbers)
    one, other = torch.randn(2, numbers, generator=generator, dtype=torch.float64)
    assert torch.allclose(signature(one) + 3 * signature(other), signature(one + 3 * other))
    assert float(signature(one).norm() / one.norm()) == pytest.approx(1, abs=0.3)
