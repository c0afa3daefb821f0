"""``train --save``: weights that load without groupsearch, with what they cost beside them, or nothing at all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import groupsearch as gs
from groupsearch.engine.loading import physical_chunks
from groupsearch.errors import GroupSearchError
from groupsearch.jobs import weights
from groupsearch.records import write_document
from groupsearch.workloads import Workload, load_workload
from tests.cli.running import ROOT, refused, run
from tests.workloads.test_data import LABELS, TEXTS, saved, write  # noqa: F401 - saved is a fixture

SMALL = ("digits-vit", "--setting", "blocks=1", "--setting", "width=8", "--steps", 3, "--grouping", "best:2")


def trained(*args: object) -> dict[str, Any]:
    result = run("train", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def loaded(folder: Path) -> nn.Module:
    """The model that the README's own lines make."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of tied heads and of what it asks transformers
        exec(code, names)
    return names["model"]


@torch.no_grad()
def judged(model: nn.Module, workload: Workload) -> float:
    """The metric as the command takes it: in pieces of the physical batch."""
    assert workload.data is not None
    assert workload.metric is not None
    assert not model.training
    total = 0.0
    for chunk in physical_chunks(torch.arange(workload.data.validation_size), workload.batch_size):
        batch = {name: tensor[chunk] for name, tensor in workload.data.validation.items()}
        total += workload.metric(model, batch).double().sum().item()
    return total / workload.data.validation_size


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data", text=TEXTS, label=LABELS)


@pytest.mark.parametrize(
    ("kind", "settings", "files"),
    [
        ("bert", {}, {"config.json", "model.safetensors"}),
        ("bert", {"lora": 2}, {"adapter_config.json", "adapter_model.safetensors"}),
        (
            "bert",
            {"lora": 2, "lora_head": "false", "num_labels": 3},
            {"adapter_config.json", "adapter_model.safetensors"},
        ),
        ("bert", {"lora": 2, "weights": "random"}, {"adapter_config.json", "adapter_model.safetensors", "base"}),
        ("bert", {"prompt": 2, "weights": "random"}, {"adapter_config.json", "adapter_model.safetensors", "base"}),
        ("bert", {"ia3": True}, {"adapter_config.json", "adapter_model.safetensors"}),
        ("gpt2", {"dora": 2}, {"adapter_config.json", "adapter_model.safetensors"}),
        ("gpt2", {"prefix": 2}, {"adapter_config.json", "adapter_model.safetensors"}),
        ("gpt2", {}, {"config.json", "generation_config.json", "model.safetensors"}),
        ("gpt2", {"lora": 2}, {"adapter_config.json", "adapter_model.safetensors"}),
        ("gpt2", {"lora": 2, "lora_head": "true"}, {"adapter_config.json", "adapter_model.safetensors"}),
        (
            "gpt2",
            {"lora": 2, "task": "sequence-classification", "dtype": "bfloat16"},
            {"adapter_config.json", "adapter_model.safetensors"},
        ),
    ],
)
def test_weights_of_transformers_load_and_are_judged_to_the_last_digit(
    kind: str,
    settings: dict[str, Any],
    files: set[str],
    saved: Callable[[str], Path],  # noqa: F811
    data: str,
    tmp_path: Path,
) -> None:
    settings = {"data": data, "sequence_length": 8, "batch_size": 16, **settings}
    asked = [part for key, value in settings.items() for part in ("--setting", f"{key}={value}")]
    place, text = tmp_path / "weights", f"hf:{saved(kind)}"
    grouping = "all-layer" if "prefix" in settings else "best:2"  # which has a single site
    document = trained(text, *asked, "--grouping", grouping, "--steps", 3, "--learning-rate", 0.1, "--save", place)
    written = {path.name for path in place.iterdir()}
    assert written == files | {"README.md", "privacy.json", "tokenizer.json", "tokenizer_config.json"}
    assert judged(loaded(place), load_workload(text, **settings)) == document["metric"]["mean"]
    if "adapter_config.json" in files:
        with safe_open(place / "adapter_model.safetensors", "pt") as file:
            assert all(re.search("lora_|ia3_|prompt_|classifier|pooler|score|lm_head", name) for name in file.keys())  # noqa: SIM118
    else:
        config = json.loads((place / "config.json").read_text())
        assert max(value for key, value in config.items() if "drop" in key and value) == 0.1, "dropout is as it was"
        assert (
            judged(load_workload(f"hf:{place}", **settings).build().eval(), load_workload(text, **settings))
            == (document["metric"]["mean"])
        )


def test_weights_of_another_model_are_a_state_dict(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    document = trained(*SMALL, "--save", place, "--checkpoint-every", 2)
    assert {path.name for path in place.iterdir()} == {"README.md", "privacy.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["weights"], "neither checkpoint nor anything half-written"
    workload = load_workload("digits-vit", blocks=1, width=8)
    assert judged(loaded(place), workload) == document["metric"]["mean"]
    assert oct(place.stat().st_mode)[-3:] == "755"


def test_the_card_says_what_the_weights_cost_and_no_exact_number(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    document = trained(*SMALL, "--save", place, "--epsilon", 4)
    card = json.loads((place / "privacy.json").read_text())
    for key in ("epsilon", "delta", "privacy", "noise_multiplier", "sampling", "sampling_rate", "steps", "environment"):
        assert card[key] == document[key], key
    assert card["clip_plan"]["boundaries"] == document["boundaries"]
    assert card["clip_plan"]["rule"] == document["rule"]
    assert card["privacy"]["covered"]
    assert card["privacy"]["not_covered"]
    assert card["search"]["epsilon"] is None
    assert "not known what was chosen" in card["search"]["statement"]
    readme = (place / "README.md").read_text()
    assert all(sentence in readme for sentence in document["privacy"]["sentences"])
    assert not {"metric", "curve", "step_seconds"} & card.keys()
    for text in (readme, (place / "privacy.json").read_text()):
        assert str(document["metric"]["mean"]) not in text


def test_nothing_is_overwritten_and_nothing_trained_for_it(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    trained(*SMALL, "--save", place, "--seed", 1)
    before = (place / "model.safetensors").read_bytes()
    assert "exists already and is not overwritten" in refused("train", *SMALL, "--save", place, "--json")
    assert (place / "model.safetensors").read_bytes() == before
    trained(*SMALL, "--save", place, "--seed", 2, "--force")
    assert (place / "model.safetensors").read_bytes() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "was not left by `groupsearch train" in refused("train", *SMALL, "--save", tmp_path / "other", "--force")
    assert "in one that is there" in refused("train", *SMALL, "--save", tmp_path / "nowhere" / "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "weights"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(made: Path, *rest: object) -> None:
        assert (made / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("groupsearch.jobs.train.write_card", full)
    place = tmp_path / "weights"
    with pytest.raises(GroupSearchError, match=r"No space left on device\. Nothing was written"):
        gs.train("digits-vit", setting={"blocks": 1, "width": 8}, steps=1, grouping="all-layer", save=place)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "weights"

    def fill(made: Path) -> None:
        assert not place.exists() or (place / "first").is_file()
        (made / ("second" if place.exists() else "first")).write_text("")
        if (made / "second").is_file():
            raise OSError("failed")

    weights.write_folder(place, fill)
    with pytest.raises(GroupSearchError, match="failed"):
        weights.write_folder(place, fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["weights", "first"]


def _killed(tmp_path: Path, instant: str) -> subprocess.CompletedProcess[str]:
    """A process that replaces a folder and is killed at an instant; what it imports is little."""
    code = f"""
import os, pathlib, signal
from groupsearch.jobs import weights
real = os.replace
def replace(*paths):
    if {instant!r} == "between" and pathlib.Path(paths[1]).name == "weights" and moved:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(real(*paths))
moved = []
weights.os.replace = replace
def fill(made):
    (made / "privacy.json").write_text("new")
    if {instant!r} == "filling":
        os.kill(os.getpid(), signal.SIGKILL)
weights.write_folder(pathlib.Path("weights"), fill)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


@pytest.mark.parametrize("instant", ["filling", "between"])
def test_what_a_kill_left_is_put_right_by_the_next(instant: str, tmp_path: Path) -> None:
    place = tmp_path / "weights"
    place.mkdir()
    (place / "privacy.json").write_text("old")
    killed = _killed(tmp_path, instant)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert place.exists() == (instant == "filling")
    assert [path for path in tmp_path.iterdir() if path != place], "something is left"
    for foreign in (".weights.more.abcdefgh.tmp", ".weights.abcdefgh.tmp.kept", ".weights.ABCDEFGH.tmp"):
        (tmp_path / foreign).mkdir()
    with pytest.raises(GroupSearchError, match="exists already"):  # as before the kill, not as if there were none
        weights.check_folder(place)
    assert (place / "privacy.json").read_text() == "old"
    weights.sweep(place)
    weights.write_folder(place, lambda made: (made / "privacy.json").write_text("third"))
    assert (place / "privacy.json").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".weights.ABCDEFGH.tmp",
        ".weights.abcdefgh.tmp.kept",
        ".weights.more.abcdefgh.tmp",
        "weights",
    ]


def test_what_another_training_is_writing_is_let_be(tmp_path: Path) -> None:
    place = tmp_path / "weights"

    def fill(made: Path) -> None:
        (made / "mine").write_text("")
        weights.sweep(place)
        assert (made / "mine").is_file()

    weights.write_folder(place, fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["weights", "mine"]


@pytest.mark.parametrize("wrong", ["not a search's recommendation", "other weights", "no such target"])
def test_a_wrong_request_is_one_paragraph_and_leaves_nothing(
    wrong: str,
    saved: Callable[[str], Path],  # noqa: F811
    data: str,
    tmp_path: Path,
) -> None:
    model, more, grouping = f"hf:{saved('bert')}", {"data": data, "sequence_length": 8}, "all-layer"
    if wrong == "other weights":
        more["weights"], remedy = str(saved("gpt2")), "Name the folder that the model was saved in"
    elif wrong == "no such target":
        more |= {"lora": 2, "lora_targets": "c_attn,fc9"}
        remedy = "as in lora_targets="
    else:
        document = json.loads((ROOT / "reports" / "digits-vit-checkpointed.json").read_text()) | {"recommended": None}
        grouping, remedy = str(write_document(tmp_path / "search.json", document)), "Go on with `groupsearch optimize"
    asked = [part for key, value in more.items() for part in ("--setting", f"{key}={value}")]
    before = sorted(tmp_path.rglob("*"))
    place = ("--save", tmp_path / "weights", "-o", tmp_path / "train.json")
    assert remedy in refused("train", model, *asked, "--grouping", grouping, "--steps", 1, *place)
    assert sorted(tmp_path.rglob("*")) == before
