"""Sites: in the order backward reaches them, named by layer and use, labelled by block."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.trace import Site
from groupsearch.tracer import observe_sites, trace_model
from tests.support.cases import EVERY_CASE, LAYER_CASES, Case

ORDERED = ("linear-keyword", "unregistered-order", "residual-mlp-3d", "branches", "attention", "layernorm")


@cache
def sites_of(name: str) -> tuple[Site, ...]:
    case = EVERY_CASE[name]
    return observe_sites(case.model(torch.float32), case.batch(torch.float32), case.loss)


def names_of(name: str) -> list[str]:
    return [site.name for site in sites_of(name)]


def order_of_gradients(case: Case) -> list[str]:
    """The layers in the order in which plain autograd brings the gradients of their outputs."""
    model, order = case.model(torch.float32), []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: order.append(name))

        return hook

    for name, module in model.named_modules():
        if module._parameters:
            module.register_forward_hook(watch(name))
    case.loss(model, case.batch(torch.float32)).sum().backward()
    return order


@pytest.mark.parametrize("name", ORDERED)
def test_backward_reaches_the_last_site_first(name: str) -> None:
    assert names_of(name)[::-1] == order_of_gradients(EVERY_CASE[name])


@pytest.mark.parametrize("name", [*ORDERED, "gpt2", "t5", "tied-embedding-head", "class-token", "reused-conv"])
def test_a_trace_has_the_sites_that_are_observed(name: str) -> None:
    case = EVERY_CASE[name]
    traced = trace_model(case.model(torch.float32), case.batch(torch.float32), case.loss).sites
    described = [
        [(s.name, s.layer, s.block, s.kind, s.method, s.positions, s.inputs, s.outputs, s.parameters) for s in sites]
        for sites in (traced, sites_of(name))
    ]
    assert described[0] == described[1]


def test_further_uses_of_a_layer_are_numbered_in_forward_order() -> None:
    assert names_of("reused-linear") == ["a", "a#1", "a#2", "head"]
    assert [site.layer for site in sites_of("reused-linear")] == ["a", "a", "a", "head"]
    assert names_of("reused-layernorm") == ["norm", "a", "norm#1"]


def test_a_block_that_is_used_again_has_every_layer_again() -> None:
    layers = ["block.module.norm", "block.module.up", "block.module.down"]
    uses = [f"{layer}{use}" for use in ("", "#1", "#2") for layer in layers]
    for kind in ("reentrant", "non-reentrant"):
        assert names_of(f"checkpoint-shared-block-{kind}") == ["stem", *uses, "head"]


def test_tied_parameters_have_one_canonical_name() -> None:
    embed, _, head = sites_of("tied-embedding-head")
    assert (embed.name, head.name) == ("embed", "head")
    assert embed.parameters == head.parameters == ("embed.weight",)
    assert {p for site in sites_of("tied-three-ways") for p in site.parameters if "weight" in p} == {"0.weight"}


def test_bare_parameters_are_sites_of_their_own() -> None:
    sites = {site.name: site for site in sites_of("class-token")}
    assert sites.keys() == {"token", "position", "embed", "head"}
    assert sites["token"].kind == "parameter"
    assert sites["position"].parameters == ("position",)


def test_frozen_parameters_have_no_site_and_no_name() -> None:
    assert names_of("frozen-last-half") == names_of("residual-mlp-3d")[:4]
    assert {p for site in sites_of("bitfit") for p in site.parameters} == {"0.bias", "1.bias", "2.bias"}


def test_a_block_labels_the_sites_in_it() -> None:
    labels = {site.name: site.block for site in sites_of("gpt2")}
    assert labels["transformer.h.1.mlp.c_fc"] == "transformer.h.1"
    assert labels["transformer.h.0.ln_1"] == "transformer.h.0"
    assert labels["transformer.ln_f"] == "transformer.ln_f"


def test_dimensions_are_those_of_the_layers() -> None:
    first, last = sites_of("linear-3d")
    assert [(s.kind, s.positions, s.inputs, s.outputs) for s in (first, last)] == [
        ("linear", 4, 6, 5),
        ("linear", 4, 5, 3),
    ]
    assert [s.parameter_count for s in (first, last)] == [6 * 5 + 5, 5 * 3]
    (conv,) = sites_of("conv2d-patches")
    assert (conv.kind, conv.positions, conv.inputs, conv.outputs) == ("conv", 4, 4 * 2 * 2, 5)


def test_an_example_that_depends_on_others_is_refused() -> None:
    case = LAYER_CASES["linear-2d"]

    def centred(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(model, {**batch, "x": batch["x"] - batch["x"].mean(0)})

    with pytest.raises(UnsupportedModelError, match="depends on the other examples"):
        observe_sites(case.model(torch.float32), case.batch(torch.float32), centred)
