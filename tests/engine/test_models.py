"""Models of transformers, PEFT and torch.nn, left as they are, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.engine.test_parity import (
    DTYPES_AND_RULES,
    METHODS,
    assert_case_agrees,
    by_name,
    sites_of,
    step,
    truth,
    typical_norm,
)
from tests.support.model_table import HEADER, cells, five_groupings, reached, written
from tests.support.reference import trainable
from tests.support.zoo import CHECKPOINTS, LISTED, MODELS, Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's doing
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),  # nn.Transformer's, time first
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),  # Swin's nested stages
]
EXACT = {name: model for name, model in LISTED.items() if model.refusal is None}
VARIANTS = {name: model for name, model in MODELS.items() if model.refusal is None and name not in LISTED}
REFUSED = {name: model for name, model in MODELS.items() if model.refusal is not None}
TITLED = {name: model for name, model in LISTED.items() if model.title}


@by_name(EXACT, names=("dtype", "rule"), settings=DTYPES_AND_RULES, each=1)
def test_clipped_sums_equal_the_reference(case: Model, dtype: torch.dtype, rule: str) -> None:
    assert reached(case, dtype, rule) <= 10 * case.tolerance[dtype]


@by_name(VARIANTS, quick=4)
def test_attention_and_checkpointing_change_nothing(case: Model) -> None:
    assert reached(case, torch.float64) <= 10 * case.tolerance[torch.float64]


@by_name(EXACT, names=["method"], settings=METHODS, each=1)
def test_norm_methods_change_nothing(case: Model, method: str) -> None:
    _, gradients = truth(case, torch.float64)
    for name in ("all-layer", "block-wise"):
        plan = ClipPlan(five_groupings(case)[name], max_grad_norm=typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, norm_method=method)
        assert_case_agrees(case, sums, gradients, plan)


@by_name(EXACT)
def test_a_clipped_example_is_no_longer_than_its_threshold(case: Model) -> None:
    """In every group whose parameters are its own, and in all groups together than the sensitivity."""
    sites, gradients = truth(case, torch.float64)
    for name in ("all-layer", "layer-wise"):
        grouping = five_groupings(case)[name]
        plan = ClipPlan(grouping, max_grad_norm=0.3 * typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, batch_size=1)
        users: dict[str, set[int]] = {}
        for index, site in enumerate(sites):
            for parameter in site.parameters:
                users.setdefault(parameter, set()).add(grouping.group_of(index))
        for group, threshold in enumerate(plan.thresholds):
            alone = [sums[parameter] for parameter, groups in users.items() if groups == {group}]
            assert _length(alone) <= threshold * (1 + 1e-6)
        assert _length(list(sums.values())) <= plan.sensitivity * (1 + 1e-6)


def _length(tensors: list[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


@by_name(EXACT)
def test_every_trainable_parameter_has_a_site(case: Model) -> None:
    sites, _ = truth(case, torch.float64)
    assert {name for site in sites for name in site.parameters} == set(trainable(case.model()))
    assert len({site.name for site in sites}) == len(sites)


@by_name(EXACT, quick=4)
def test_sites_are_those_of_single_precision(case: Model) -> None:
    assert sites_of(case, torch.float32) == sites_of(case)


@by_name(REFUSED)
def test_what_is_not_covered_is_refused_and_says_why(case: Model) -> None:
    """A model that begins to work fails here: then its ``refusal`` in the catalogue is to go."""
    assert case.refusal is not None
    with pytest.raises((UnsupportedModelError, RuntimeError), match=case.refusal.says):  # some fail without an engine
        _observe_and_step(case)


def _observe_and_step(case: Model) -> None:
    sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
    step(case, torch.float64, ClipPlan(Grouping((), sites)))


@by_name(TITLED, quick=4)
def test_the_documentation_says_what_happens(case: Model) -> None:
    """Row by row; another processor rounds otherwise, so that an error may be a power of ten larger than written."""
    found = dict(zip(HEADER, cells(case), strict=True))
    rows = [dict(zip(HEADER, row, strict=True)) for row in written()]
    (stated,) = [row for row in rows if (row["model"], row["trained"]) == (found["model"], found["trained"])]
    for column in HEADER:
        if column in ("float32", "float64") and found[column] != "-":
            assert float(found[column]) <= 10.5 * float(stated[column])
        else:
            assert found[column] == stated[column], "run `python -m tests.support.model_table`"


def test_the_documentation_lists_every_model_once() -> None:
    assert len(written()) == len(TITLED)


def test_every_choice_of_attention_and_checkpointing_is_tried() -> None:
    """For each class that transformers can checkpoint, or give another attention."""
    tried: dict[type, set[str]] = {}
    offered: dict[type, set[str]] = {}
    for listed in LISTED.values():
        model = listed.build()
        if hasattr(model, "supports_gradient_checkpointing") and not hasattr(model, "peft_config"):
            tried.setdefault(type(model), set()).update(listed.variants)
            kinds = {*(["eager"] if model._supports_sdpa else []), *CHECKPOINTS * model.supports_gradient_checkpointing}
            offered[type(model)] = kinds
    hopeless = {type(LISTED[name].build()) for name in ("bert-unused-pooler", "clip-contrastive")}
    assert {
        cls.__name__ for cls, kinds in offered.items() if cls not in hopeless and kinds != tried[cls] - {"blocks"}
    } == set()


def test_a_tied_head_is_a_second_site_of_the_embedding() -> None:
    sites, _ = truth(MODELS["gpt2"], torch.float64)
    users = [site.layer for site in sites if "transformer.wte.weight" in site.parameters]
    assert sorted(users) == ["lm_head", "transformer.wte"]


@pytest.mark.parametrize("name", ["mixtral", "mixtral-square", "mixtral-batched"])
def test_tokens_are_routed_to_different_experts(name: str) -> None:
    """Every expert has tokens, and no two examples route theirs alike: what makes the case worth having."""
    case = MODELS[name]
    model, chosen = case.model(), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    case.loss(model, case.batch())
    for indices in chosen:
        assert set(indices.flatten().tolist()) == set(range(model.config.num_local_experts))
        routes = [tuple(example.flatten().tolist()) for example in indices.view(4, -1, 2)]
        assert len(set(routes)) == len(routes)
