"""Models as people make them: what cannot be built without values is built once, and its shapes are copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from groupsearch import trace_model
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Workload
from tests.cli.running import refused, run
from tests.workloads.conftest import CONFIGS

# peft asks transformers in a way that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FILE = """
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from groupsearch.workloads import Data, TrainingDefaults, Workload, load_workload

HERE = Path(__file__).parent

def built():
    with (HERE / "built").open("a") as file:
        file.write(".")

def of(build):
    ids = torch.arange(96).view(8, 12) % 97
    examples = {"input_ids": ids, "labels": torch.arange(8) % 2}

    def loss(model, batch):
        return nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"]).logits.float(), batch["labels"], reduction="none"
        )

    return Workload(
        name="mine",
        build=build,
        make_batch=lambda size: {name: tensor[:size] for name, tensor in examples.items()},
        loss=loss,
        data=Data(examples, examples),
        batch_size=4,
        training=TrainingDefaults(steps=2, learning_rate=0.01),
    )

def pretrained(seed=0):
    import transformers

    built()
    return transformers.BertForSequenceClassification.from_pretrained(HERE / "saved")

def saved():
    return of(lambda seed=0: pretrained().train())

def half():
    return of(lambda seed=0: pretrained().to(torch.bfloat16).train())

def adapted():
    import peft

    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["classifier"])
    return of(lambda seed=0: peft.get_peft_model(pretrained(), config).train())

def looked_at():
    def build(seed=0):
        model = pretrained()
        largest = max(parameter.abs().max().item() for parameter in model.parameters())
        for parameter in model.bert.parameters():
            parameter.requires_grad_(largest < 0)
        return model.train()

    return of(build)

def broken():
    def build(seed=0):
        raise ValueError("no such weights")

    return of(build)

def triple():
    made = saved()
    return made.build(), made.make_batch(4), made.loss
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    import transformers

    config = transformers.AutoConfig.for_model("bert", **CONFIGS["bert"])
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "saved")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def builds(file: Path) -> int:
    return len((file.parent / "built").read_text())


@pytest.mark.parametrize("name", ["saved", "half", "adapted", "looked_at"])
def test_shapes_are_those_of_a_model_that_is_built_once(file: Path, name: str) -> None:
    workload = load_workload(f"{file}:{name}")
    first, second = workload.empty(), workload.empty()
    attempts = builds(file)
    assert attempts <= 2, "tried on the meta device, and then built once"
    real = workload.build()
    for empty in (first, second):
        assert empty.training
        assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
        told = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (empty, real)]
        assert told[0] == told[1]
    assert not set(map(id, first.parameters())) & set(map(id, second.parameters()))


@pytest.mark.parametrize("name", ["saved", "half", "adapted", "looked_at", "triple"])
def test_every_command_takes_it(file: Path, name: str) -> None:
    result = run("profile", f"{file}:{name}", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    trainable = sum(p.numel() for p in load_workload(f"{file}:{name}").build().parameters() if p.requires_grad)
    assert document["model"]["parameters"] == trainable
    assert document["nonprivate_peak_bytes"] > 0
    if name != "triple":
        result = run("train", f"{file}:{name}", "--grouping", "all-layer", "--json")
        assert result.exit_code == 0, result.output


def test_a_profile_builds_it_once(file: Path) -> None:
    assert run("profile", f"{file}:looked_at", "--verify", "simulate", "--json").exit_code == 0
    assert builds(file) <= 2, "tried on the meta device, and then built once"


def test_a_build_that_fails_for_real_is_told_in_a_paragraph(file: Path) -> None:
    message = refused("profile", f"{file}:broken", "--json")
    assert "The build of" in message
    assert "raised ValueError: no such weights" in message
    with pytest.raises(GroupSearchError, match="no such weights") as caught:
        load_workload(f"{file}:broken").build()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.filterwarnings("ignore")  # torch is about to drop what packs them
@pytest.mark.parametrize("kind", ["quantized", "packed"])
def test_packed_weights_are_refused_by_name(kind: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    if kind == "packed":
        model = torch.ao.quantization.quantize_dynamic(model, {"0"}, dtype=torch.qint8)
        named = r"0\._packed_params\._packed_params of LinearPackedParams"
    else:
        model[0].register_buffer("codes", torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8))
        named = r"0\.codes of Linear"
    batch = {"x": torch.zeros(3, 4)}
    with pytest.raises(UnsupportedModelError, match=f"{named}.*packed form.*dtype=bfloat16"):
        trace_model(model, batch, lambda model, batch: model(batch["x"]).sum(1))


def test_what_builds_on_the_meta_device_is_never_built_for_real(tiny: Callable[..., Workload]) -> None:
    seen = []
    workload = tiny("bert")
    build = workload.build

    def counted(seed: int = 0) -> torch.nn.Module:
        seen.append(torch.get_default_device().type)
        return build(seed)

    object.__setattr__(workload, "build", counted)
    workload.empty()
    workload.empty()
    assert seen == ["meta"]
