"""Output gradients are learnt whatever the model and the user's hooks do with the outputs, and of the loss alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import trace_model
from groupsearch.workloads.blocks import checkpoint_blocks
from tests.support.reference import clipped_sums

B, T, D = 4, 3, 6


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def batch_of(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(3, (B,), generator=generator)}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build().double()


def check_exact(model: nn.Module, batch: Any, loss: Any, also_all_layer: bool = False) -> None:
    """A group per site, and with ``also_all_layer`` one for all, too."""
    sites = trace_model(model, batch, loss).sites
    for cuts in (tuple(range(1, len(sites))), *[()] * also_all_layer):
        plan = ClipPlan(Grouping(cuts, sites), max_grad_norm=0.1)
        truth = clipped_sums(model, batch, loss, plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
        loss(model, batch).mean().backward()
        sums = engine.clipped_sums()
        engine.detach()
        for name, expected in truth.items():
            torch.testing.assert_close(sums[name], expected, rtol=1e-9, atol=1e-12)


class Changed(nn.Module):
    """A layer between two others whose output is changed by what ``change`` does to it."""

    def __init__(self, layer: nn.Module, change: Callable[..., Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first = inner or nn.Linear(D, D)
        self.layer = layer
        self.other = nn.Linear(D, D)
        self.head = nn.Linear(D, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x).tanh()
        out = self.layer(before)
        changed = self.change(self, out[0] if isinstance(out, tuple) else out, before)
        return self.head(changed.tanh().flatten(1, -2).mean(1) if changed.dim() > 2 else changed.tanh())


def _zeroed(model: Any, z: Tensor, before: Tensor) -> Tensor:
    kept = z.mean(1, keepdim=True)
    z[:, 0] = 0.0
    return z + model.other(kept)


def _attended(model: Any, z: Tensor, before: Tensor) -> Tensor:
    z *= 0.3
    return (z @ model.other(before).mT).softmax(-1) @ before


def _in_views(model: Any, z: Tensor, before: Tensor) -> Tensor:
    z[..., :2].mul_(2)
    z.transpose(0, 1)[1:].relu_()
    return model.other(z)


CHANGES: dict[str, Callable[..., Tensor]] = {
    "relu_": lambda m, z, r: m.other(z.relu_()),
    "+=": lambda m, z, r: m.other(z.add_(r)),
    "*= and a product": _attended,
    "+= another layer's": lambda m, z, r: z.add_(m.other(z.mean(1, keepdim=True))),
    "read, then a slice assigned": _zeroed,
    "views changed": _in_views,
    "masked_fill_": lambda m, z, r: m.other(z.masked_fill_(z > 0.5, 0.5)),
    "copied over in part": lambda m, z, r: m.other(z.index_fill_(1, torch.tensor([1]), 0.2)),
    "dropped": lambda m, z, r: m.other(r),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "bias alone": lambda: nn.Linear(D, D).requires_grad_(False),
    "norm": lambda: nn.LayerNorm(D),
    "recurrence": lambda: nn.GRU(D, D, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 7, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_operations_on_outputs_are_exact(layer: str, change: str) -> None:
    def build() -> nn.Module:
        inner = LAYERS[layer]()
        if layer == "bias alone":
            inner.get_parameter("bias").requires_grad_(True)
        return Changed(inner, CHANGES[change])

    model, batch = made(build), batch_of(T, D)
    if change == "dropped":
        with pytest.raises(UnsupportedModelError):
            check_exact(model, batch, entropy)
        return
    check_exact(model, batch, entropy, also_all_layer=True)


def test_in_place_operations_on_the_first_outputs_are_exact() -> None:
    def convolutions() -> nn.Module:
        first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        return nn.Sequential(
            first, nn.ReLU(inplace=True), second, nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
        )

    check_exact(made(convolutions), batch_of(1, 6, 6), entropy)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place, self.head = nn.Embedding(5, D), nn.Embedding(T, D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.embed(x)
            z += self.place(torch.arange(T))
            return self.head(z.mul_(1.5).tanh().mean(1))

    check_exact(made(Tokens), {**batch_of(T), "x": torch.randint(5, (B, T))}, entropy)


KEPT: dict[str, Tensor] = {}


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("prepended", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_output_that_the_users_hook_keeps_is_followed(layer: int, prepended: bool) -> None:
    model, batch = made(_chain), batch_of(D)
    keep: Any = lambda module, args, out: KEPT.__setitem__("out", out)  # noqa: E731
    model[layer].register_forward_hook(keep, prepend=prepended)  # type: ignore[index]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return entropy(model, batch) + 0.3 * KEPT["out"].square().mean(1)

    check_exact(model, batch, loss)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_output_that_the_users_hook_replaces_is_followed(layer: int) -> None:
    model, batch = made(_chain), batch_of(D)
    model[layer].register_forward_hook(lambda module, args, out: 2 * out + out.sin())  # type: ignore[index]
    check_exact(model, batch, entropy)


def test_tensor_hooks_and_retained_gradients_of_the_user_see_what_they_saw() -> None:
    model, batch, seen = made(_chain), batch_of(D), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        hidden = model[1](model[0](batch["x"]))  # type: ignore[index]
        del hidden
        return entropy(model, batch)

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda g: seen.append(g.clone()))

    model[2].register_forward_hook(look)  # type: ignore[index]
    check_exact(model, batch, entropy)
    assert seen
    with pytest.raises(UnsupportedModelError, match="before the model itself was called"):
        check_exact(model, batch, loss)


def attack(model: nn.Module, batch: Any, steps: int = 1, kept: list[Any] | None = None, **how: bool) -> Tensor:
    x = batch["x"]
    for _ in range(steps):
        x = x.detach().requires_grad_()
        inner = functional.cross_entropy(model(x), batch["y"], reduction="sum")
        (g,) = torch.autograd.grad(inner, x, **how)
        if kept is not None:
            kept.append(inner)
        x = x + 0.05 * g.sign()
    return functional.cross_entropy(model(x.detach()), batch["y"], reduction="none")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_an_attack_is_not_the_examples(steps: int, kept: bool, checkpointed: bool) -> None:
    model, batch = made(_chain), batch_of(D)
    if checkpointed:
        model = made(Blocks)
        checkpoint_blocks(model)
    alive: list[Any] | None = [] if kept else None
    check_exact(model, batch, lambda model, batch: attack(model, batch, steps, alive))


def _private(model: nn.Module, batch: Any, loss: Any = entropy) -> tuple[PrivateEngine, torch.optim.Optimizer]:
    plan = ClipPlan(Grouping((), trace_model(model, batch, loss).sites))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=B), optimizer


def test_an_attack_outside_of_the_loss_function_is_left_alone_too() -> None:
    model, batch = made(_chain), batch_of(D)
    x = batch["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(entropy(model, {**batch, "x": x}).sum(), x)
    moved = {**batch, "x": batch["x"] + 0.05 * g.sign()}
    plan = ClipPlan(Grouping((), trace_model(model, batch, entropy).sites), max_grad_norm=0.1)
    truth = clipped_sums(model, moved, entropy, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
    inner = entropy(model, {**batch, "x": x}).sum()
    torch.testing.assert_close(torch.autograd.grad(inner, x)[0], g)
    entropy(model, moved).mean().backward()
    for name, expected in engine.clipped_sums().items():
        torch.testing.assert_close(expected, truth[name], rtol=1e-9, atol=1e-12)


def test_a_pass_that_was_only_looked_at_and_kept_is_not_mixed_with_the_next() -> None:
    model, batch = made(_chain), batch_of(D)
    _private(model, batch)
    x = batch["x"].clone().requires_grad_()
    inner = entropy(model, {**batch, "x": x}).sum()
    torch.autograd.grad(inner, x, retain_graph=True)
    with pytest.raises(UnsupportedModelError, match="while another one is still open"):
        entropy(model, batch).mean().backward()


def test_a_gradient_that_is_differentiated_again_is_refused() -> None:
    model, batch = made(_chain), batch_of(D)
    _private(model, batch)
    x = batch["x"].clone().requires_grad_()
    losses = entropy(model, {**batch, "x": x})
    with pytest.raises(UnsupportedModelError, match="create_graph=True"):
        torch.autograd.grad(losses.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedModelError, match="create_graph=True"):
        entropy(model, batch).mean().backward(create_graph=True)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_a_transform_of_torch_func_around_a_layer_is_refused(transform: Any) -> None:
    model, batch = made(_chain), batch_of(D)
    _private(model, batch)
    call: Any = transform(lambda x: model(x[None]).sum())
    with pytest.raises(UnsupportedModelError, match="transform of torch"):
        call(batch["x"][0] if transform is torch.func.grad else batch["x"])


def test_other_tensors_in_the_place_of_parameters_are_refused() -> None:
    model, batch = made(_chain), batch_of(D)
    _private(model, batch)
    others = {name: p * 2 for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match="functional_call"):
        torch.func.functional_call(model, others, (batch["x"],))


class Leaving(nn.Module):
    """Routes rows, so that it is differentiated as one, and leaves a tensor on itself."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.gate, self.where = nn.Linear(D, D), where
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = torch.zeros_like(x), x.sum(-1) > 0
        out[chosen] = self.gate(x[chosen])
        extra = out.square().mean((1, 2))
        if self.where:
            self.kept = {"attribute": extra, "list": [extra], "dictionary": {"a": (extra,)}}[self.where]
        return out


@pytest.mark.parametrize("where", ["attribute", "list", "dictionary"])
def test_what_a_module_run_as_one_leaves_on_itself_is_refused(where: str) -> None:
    model = made(lambda: Changed(Leaving(where), CHANGES["relu_"], nn.Identity()))
    with pytest.raises(UnsupportedModelError, match=r"leaves a tensor in the attribute 'layer\.kept'"):
        trace_model(model, batch_of(T, D), entropy)


def test_a_module_run_as_one_that_leaves_nothing_is_exact() -> None:
    model = made(lambda: Changed(Leaving(""), CHANGES["relu_"]))
    check_exact(model, batch_of(T, D), entropy)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(D))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "saved"])
def test_a_copy_of_a_private_model_is_a_plain_model(way: str, stepped: bool) -> None:
    model, batch = made(Blocks), batch_of(D)
    checkpoint_blocks(model)
    engine, optimizer = _private(model, batch)
    if stepped:
        entropy(model, batch).mean().backward()
        optimizer.step()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.zero_grad()
    entropy(twin, batch).sum().backward()
    plain = made(Blocks)
    plain.load_state_dict(model.state_dict())
    entropy(plain, batch).sum().backward()
    for one, other in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert not engine.clipped_sums()["head.weight"].any()
    check_exact(twin, batch, entropy)  # it can be made private by itself
    entropy(model, batch).mean().backward()
    assert engine.clipped_sums()["head.weight"].any()


def test_an_average_of_a_private_model_is_a_plain_model() -> None:
    model, batch = made(_chain), batch_of(D)
    _, optimizer = _private(model, batch)
    average = torch.optim.swa_utils.AveragedModel(model)
    entropy(model, batch).mean().backward()
    optimizer.step()
    average.update_parameters(model)
    torch.testing.assert_close(average(batch["x"]), model(batch["x"]))


def test_an_engine_is_neither_copied_nor_pickled() -> None:
    engine, _ = _private(made(_chain), batch_of(D))
    with pytest.raises(GroupSearchError, match=r"engine\.state_dict"):
        copy.deepcopy(engine)
