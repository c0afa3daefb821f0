"""Repeated blocks are found where they are, and checkpointing them changes nothing but memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads import checkpoint_blocks, find_blocks, load_workload
from groupsearch.workloads.blocks import checkpoint_as
from groupsearch.workloads.workload import Workload

BLOCKS = {
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
    "roberta": ("roberta.encoder.layer.0", "roberta.encoder.layer.1"),
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "t5": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    "vit": ("vit.layers.0", "vit.layers.1"),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_transformers_models(kind: str, tiny: Callable[[str], Workload]) -> None:
    assert find_blocks(tiny(kind).model) == BLOCKS[kind]


@pytest.mark.parametrize("name", ["digits-vit", "stdlib-gpt"])
def test_blocks_of_built_in_models(name: str) -> None:
    assert find_blocks(load_workload(name).model) == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def test_single_layers_and_lone_blocks_are_no_blocks() -> None:
    assert find_blocks(load_workload("digits-cnn").model) == ()
    assert find_blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))) == ()


def test_nested_lists_inside_a_block_do_not_count() -> None:
    inner = [nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))) for _ in range(2)]
    assert find_blocks(nn.Sequential(*inner)) == ("0", "1")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [*BLOCKS, "digits-vit", "stdlib-gpt"])
def test_checkpointed_model_has_the_same_loss_and_gradients(
    kind: str, use_reentrant: bool, tiny: Callable[[str], Workload]
) -> None:
    workload = tiny(kind) if kind in BLOCKS else load_workload(kind)
    plain, checkpointed = workload.build(), workload.build()
    checkpoint_blocks(checkpointed, use_reentrant=use_reentrant)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    batch = workload.make_batch(3)
    losses = [workload.loss(model, batch) for model in (plain, checkpointed)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.mean().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_run_twice_with_gradients_and_once_without(use_reentrant: bool) -> None:
    workload = load_workload("digits-vit")
    model, batch, runs = workload.build(), workload.make_batch(2), []
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    model.get_submodule("blocks.2.norm1").register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        workload.loss(model.eval(), batch)
    assert len(runs) == 1
    workload.loss(model.train(), batch).sum().backward()
    assert len(runs) == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_checkpointed_model_runs_on_fake_tensors(
    kind: str, use_reentrant: bool, tiny: Callable[[str], Workload]
) -> None:
    workload = tiny(kind)
    batch = workload.make_batch(3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = workload.build()
        checkpoint_blocks(model, use_reentrant=use_reentrant)
        workload.loss(model, {key: mode.from_tensor(value) for key, value in batch.items()}).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_checkpointing_twice_is_checkpointing_once() -> None:
    workload = load_workload("digits-vit")
    model, runs = workload.build(), []
    checkpoint_blocks(model)
    checkpoint_blocks(model)
    model.get_submodule("blocks.0.norm1").register_forward_hook(lambda *_: runs.append(1))
    workload.loss(model, workload.make_batch(2)).sum().backward()
    assert len(runs) == 2


def runs_of_blocks(model: nn.Module, work: Callable[[], object]) -> list[int]:
    """How often each block runs."""
    names = find_blocks(model)
    runs = dict.fromkeys(names, 0)
    for name in names:
        inside = next(module for module in model.get_submodule(name).modules() if not [*module.children()])

        def count(*_: object, name: str = name) -> None:
            runs[name] += 1

        inside.register_forward_hook(count)
    work()
    return list(runs.values())


@pytest.mark.parametrize(
    ("setting", "runs"),
    [
        ("none", [1, 1, 1, 1]),
        ("blocks", [2, 2, 2, 2]),
        ("every:1", [2, 2, 2, 2]),
        ("every:2", [2, 1, 2, 1]),
        ("every:3", [2, 1, 1, 2]),
        ("every:9", [2, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("kind", ["digits-vit", "t5"])
def test_one_block_in_so_many_runs_twice(
    kind: str, setting: str, runs: list[int], tiny: Callable[[str], Workload]
) -> None:
    workload = tiny(kind) if kind in BLOCKS else load_workload(kind)
    model = workload.build()
    checkpoint_as(model, setting)
    assert runs_of_blocks(model, lambda: workload.loss(model, workload.make_batch(2)).sum().backward()) == runs


@pytest.mark.parametrize("setting", ["", "block", "every", "every:", "every:0", "every:-1", "every:1.5", "blocks:2"])
def test_a_setting_that_says_nothing_is_refused(setting: str) -> None:
    model = load_workload("digits-vit").build()
    with pytest.raises(GroupSearchError, match="checkpoint to be none, blocks, or every:K"):
        checkpoint_as(model, setting)
    with pytest.raises(GroupSearchError, match="every >= 1"):
        checkpoint_blocks(model, every=0)


def test_a_copy_of_a_checkpointed_model_calls_its_own_blocks() -> None:
    workload = load_workload("digits-vit")
    model = workload.build()
    checkpoint_blocks(model)
    other = copy.deepcopy(model)
    workload.loss(other, workload.make_batch(2)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in other.parameters())


class _Pair(nn.Module):
    """A block with a tuple as output and a tensor that arrives by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, int]:
        return self.drop(self.linear(x)) * scale, 7


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.layers = nn.ModuleList(_Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, seven = layer(x, scale=self.scale)
            assert seven == 7
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_keywords_tuples_and_dropout_pass_through(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = _Chain()
    checkpointed = copy.deepcopy(plain)
    checkpoint_blocks(checkpointed, use_reentrant=use_reentrant)
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        x = torch.ones(4, 3, requires_grad=True)
        model(x).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_model_without_blocks_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no repeated blocks .* leave activation checkpointing off"):
        checkpoint_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(("kind", "use_reentrant"), [("gpt2", True), ("t5", False)])
def test_caches_that_blocks_add_to(kind: str, use_reentrant: bool, tiny: Callable[..., Workload]) -> None:
    """As transformers' models are loaded: with ``use_cache``, of which a block that runs again finds what it found."""
    workload = tiny(kind)
    model, batch = workload.build(), workload.make_batch(2)
    model.config.use_cache = True
    found = []
    for _ in range(2):
        workload.loss(model, batch).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
        checkpoint_blocks(model, use_reentrant)
    torch.testing.assert_close(*found)
