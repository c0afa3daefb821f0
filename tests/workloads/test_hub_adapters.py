"""Adapters from the command line: what is adapted, what is trained, and in every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsearch import Grouping, trace_model
from groupsearch.errors import GroupSearchError
from groupsearch.workloads.blocks import checkpoint_blocks
from groupsearch.workloads.workload import Workload
from tests.cli.running import refused, run
from tests.support.architecture_table import _compare, per_example
from tests.workloads.conftest import CONFIGS
from tests.workloads.test_data import LABELS, TEXTS, saved, write  # noqa: F401 - saved is a fixture

pytest.importorskip("peft")


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parts(model: torch.nn.Module) -> set[str]:
    """What is trained: layers with an adapter, and modules in full."""
    found = set()
    for name in trainable(model):
        layer, _, rest = name.partition(".lora_")
        found.add(layer.rpartition(".")[2] if rest else name.partition(".modules_to_save")[0].rpartition(".")[2])
    return found


@pytest.mark.parametrize(
    ("kind", "settings", "adapted", "head"),
    [
        ("bert", {}, {"query", "value"}, {"classifier", "pooler"}),
        ("roberta", {}, {"query", "value"}, {"classifier"}),
        ("gpt2", {}, {"c_attn"}, set()),
        ("gpt2", {"task": "sequence-classification"}, {"c_attn"}, {"score"}),
        ("llama", {}, {"q_proj", "v_proj"}, set()),
        ("t5", {}, {"q", "v"}, set()),
        ("vit", {}, {"q_proj", "v_proj"}, {"classifier"}),
        ("bert", {"lora_head": "false"}, {"query", "value"}, set()),
        ("llama", {"lora_head": "true", "lora_targets": "down_proj"}, {"down_proj"}, {"lm_head"}),
        ("gpt2", {"lora_head": "true"}, {"c_attn"}, {"lm_head"}),
        ("bert", {"lora_targets": "query, key", "lora_dropout": "0.1"}, {"query", "key"}, {"classifier", "pooler"}),
        ("roberta", {"lora_targets": "dense"}, {"dense"}, {"classifier"}),
        ("bert", {"lora_targets": ["key"]}, {"key"}, {"classifier", "pooler"}),
    ],
)
def test_adapters_and_head_are_trained_and_nothing_else(
    kind: str, settings: dict[str, Any], adapted: set[str], head: set[str], tiny: Callable[..., Workload]
) -> None:
    workload = tiny(kind, lora=3, **settings)
    for model in (workload.build(), workload.empty()):
        assert parts(model) == adapted | head
        assert model.training
        assert {p.shape[0] for name, p in trainable(model).items() if "lora_A" in name} == {3}
    told = workload.settings
    assert (told["lora"], told["lora_alpha"]) == (3, 3.0)
    assert told["lora_head"] == bool(head)
    grouping = Grouping.parse(trace_model(workload.build(), workload.make_batch(3), workload.loss), "layer-wise")
    assert grouping.groups >= len(adapted)


@pytest.mark.parametrize(
    ("kind", "settings", "trained"),
    [
        ("bert", {"dora": 3}, "lora_A lora_B lora_magnitude_vector classifier pooler"),
        ("gpt2", {"ia3": "true"}, "ia3_l"),
        ("vit", {"ia3": True, "ia3_targets": "all-linear"}, "ia3_l classifier"),
        ("t5", {"prompt": 3}, "prompt_encoder"),
        ("bert", {"prompt": 3, "prompt_head": "false"}, "prompt_encoder"),
        ("gpt2", {"prefix": 3, "task": "sequence-classification"}, "prompt_encoder score"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_other_methods(kind: str, settings: dict[str, Any], trained: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny(kind, dtype="float64", **settings)
    model = workload.build()
    found = {part for name in trainable(model) for part in trained.split() if part in name}
    assert found == set(trained.split())
    assert all(any(part in name for part in found) for name in trainable(model))
    assert settings.keys() <= workload.settings.keys()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.1)
    assert_exact(model, workload)


def assert_exact(model: torch.nn.Module, workload: Workload) -> None:
    """The clipped sums of a step are those of one example at a time, in one group and in as many as there can be."""
    batch = workload.make_batch(3)
    verdict = _compare(model, batch, workload.loss, per_example(model, batch, workload.loss), torch.float64)
    assert verdict.outcome == "right", verdict


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {"ia3": True}), ("bert", {"dora": 2, "dora_targets": "query"}), ("t5", {"prefix": 2})],
)
def test_with_checkpointed_blocks_above_what_is_frozen(
    kind: str, settings: dict[str, Any], tiny: Callable[..., Workload]
) -> None:
    """What a recomputed block is given asks for no gradients, and may be a cache that it added to."""
    workload = tiny(kind, dtype="float64", **settings)
    model = workload.build()
    checkpoint_blocks(model)
    assert_exact(model, workload)


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_all_linear_layers_below_the_head(kind: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny(kind, lora=2, lora_targets="all-linear")
    model = workload.build()
    assert len(parts(model)) >= 5
    assert not any("lm_head.lora" in name or "classifier.lora" in name for name in trainable(model))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_in_every_precision_it_is_trained(dtype: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny("bert", lora=2, dtype=dtype)
    assert trace_model(workload.build(), workload.make_batch(3), workload.loss).length > 0


def test_the_adapters_are_of_the_seed_and_begin_as_the_model_was(tiny: Callable[..., Workload]) -> None:
    workload, plain = tiny("llama", lora=2), tiny("llama")
    batch = plain.make_batch(2)
    assert torch.equal(workload.loss(workload.build(1), batch), plain.loss(plain.build(1), batch))
    first, same, other = (trainable(workload.build(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 4}, r"Found lora_alpha of hf:.* without lora\. Give the rank, as in lora=8"),
        ({"lora": 0}, "Expected lora of hf:.* to be a positive integer, found 0"),
        ({"lora": 2, "lora_alpha": -1}, "Expected lora_alpha of hf:.* above zero, found -1"),
        ({"lora": 2, "lora_dropout": 1}, "Expected lora_dropout of hf:.* from 0 to 1, found 1"),
        ({"lora": 2, "lora_head": "maybe"}, "to be true or false, found 'maybe'"),
        (
            {"lora": 2, "lora_targets": "query,qurey"},
            r"none called qurey\. Layers .* are called .*query, key, value, dense.* as in lora_targets=.*all-linear",
        ),
        ({"lora": 2, "lora_targets": "classifier"}, "below its head, found none called classifier"),
        ({"lora": 2, "ia3": True}, "Found lora and ia3 of hf:.*one method each"),
        ({"lora": 2, "ia3_head": True}, r"Found ia3_head of hf:.* without ia3\. Give ia3=true"),
        ({"prefix": 0}, "Expected prefix of hf:.* to be a positive integer, found 0"),
        ({"prompt": 3, "sequence_length": 38}, "at most 37, the positions it has less the 3 of the adapter"),
        ({"ia3": True, "ia3_targets": "qurey"}, r"none called qurey\..*as in ia3_targets="),
        ({"prompt": 3, "prompt_targets": "query"}, "no setting 'prompt_targets'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, tiny: Callable[..., Workload]) -> None:
    with pytest.raises(GroupSearchError, match=message):
        tiny("bert", **settings).build()


def test_tokens_before_a_picture_are_refused(tiny: Callable[..., Workload]) -> None:
    with pytest.raises(GroupSearchError, match=r"Found prefix of hf:.*before a text.*Give lora=8"):
        tiny("vit", prefix=3)


def test_targets_that_match_nothing_are_refused_in_a_paragraph_by_every_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **CONFIGS["bert"]}))
    asked = (f"hf:{tmp_path}", "--setting", "lora=2", "--setting", "lora_targets=nothing", "--json")
    for command in (["profile"], ["fit", "--memory", "1GiB"]):
        assert "none called nothing" in refused(command[0], *asked, *command[1:])


def test_every_command_takes_lora(
    saved: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a search leaves its journal
    data = write(tmp_path / "data", text=TEXTS, label=LABELS)
    for kind in ("bert", "gpt2"):
        asked = (
            f"hf:{saved(kind)}",
            "--setting",
            "lora=2",
            "--setting",
            f"data={data}",
            "--setting",
            "sequence_length=8",
        )
        short = ("--steps", 2, "--batch-size", 4)
        for command, *options in (
            ("profile", "--batch-size", 4, "--grouping", "all-layer"),
            ("fit", "--memory", "64MiB", "--limit", 8, "--batch-size", 4),
            ("train", "--grouping", "best:2", *short),
            ("optimize", "--trials", 1, "--max-groups", 2, "--seeds", 1, "--rungs", "full", "--verify", "none", *short),
        ):
            result = run(command, *asked, *options, "--json")
            assert result.exit_code == 0, result.output
            document = json.loads(result.stdout)
            assert document["model"]["lora"] == 2
            sites = {site["name"] for site in document["trace"]["sites"]}
            assert any("lora_B" in name for name in sites)
