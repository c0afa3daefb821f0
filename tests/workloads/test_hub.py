"""hf:NAME without network: what is shipped, how it is set up, and how a wrong request is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads import check_loss, list_workloads, load_workload
from groupsearch.workloads.hub import known_architectures
from groupsearch.workloads.workload import Workload

KINDS = ("gpt2", "llama", "roberta", "bert", "t5", "vit")
# Parameter counts as published with the models (classification heads: 2 labels; ViT: 1,000).
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "bert-base-uncased": 109_483_778,
    "google/vit-base-patch16-224": 86_567_656,
    "google/vit-large-patch16-224": 304_326_632,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "JackFram/llama-160m": 162_417_408,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


def test_every_shipped_architecture_has_its_published_size_on_meta() -> None:
    assert known_architectures().keys() == PARAMETERS.keys()
    for name, parameters in PARAMETERS.items():
        workload = load_workload(f"hf:{name}")
        with torch.device("meta"):
            model = workload.build()
        assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
        assert sum(p.numel() for p in model.parameters()) == parameters, name
        assert workload.settings["task"] == known_architectures()[name].task


def test_gpt2_xl_builds_on_meta_in_seconds() -> None:
    workload = load_workload("hf:gpt2-xl")
    began = time.perf_counter()
    with torch.device("meta"):
        workload.build()
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_an_example_does_not_depend_on_the_others(
    kind: str, attn_implementation: str, tiny: Callable[..., Workload]
) -> None:
    workload = tiny(kind, attn_implementation=attn_implementation)
    assert workload.model.config._attn_implementation == attn_implementation
    batch = workload.make_batch(3)
    together = check_loss(workload.model, batch, workload.loss)
    alone = [workload.loss(workload.model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_mean_of_the_losses_is_the_models_own_loss(kind: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny(kind)
    batch = workload.make_batch(3)
    own = workload.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(workload.loss(workload.model, batch).mean(), own)


@pytest.mark.parametrize("kind", ["t5", "roberta", "bert", "vit"])
def test_mean_of_the_losses_is_the_models_own_loss_on_labels(kind: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny(kind)
    batch = workload.make_batch(3)
    inputs = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    torch.testing.assert_close(workload.loss(workload.model, batch).mean(), workload.model(**inputs).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_without_dropout_by_default(kind: str, tiny: Callable[..., Workload]) -> None:
    workload = tiny(kind)
    batch = workload.make_batch(2)
    assert workload.model.training
    assert torch.equal(workload.loss(workload.model, batch), workload.loss(workload.model, batch))


def test_dropout_of_the_configuration_on_request(tiny: Callable[..., Workload]) -> None:
    workload = tiny("bert", dropout="config")
    batch = workload.make_batch(2)
    assert not torch.equal(workload.loss(workload.model, batch), workload.loss(workload.model, batch))


def test_same_seed_same_weights_and_batch(tiny: Callable[..., Workload]) -> None:
    workload = tiny("gpt2")
    first, second, other = workload.build(1), workload.build(1), workload.build(2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert torch.equal(workload.make_batch(2)["input_ids"], workload.make_batch(2)["input_ids"])


def test_settings_shape_the_batch_and_the_model(tiny: Callable[..., Workload]) -> None:
    text = tiny("roberta", batch_size="4", sequence_length="9", num_labels="3", dtype="bfloat16")
    assert text.batch_size == 4
    assert text.make_batch(4)["input_ids"].shape == (4, 9)
    assert next(text.model.parameters()).dtype is torch.bfloat16
    assert text.model(input_ids=text.make_batch(2)["input_ids"]).logits.shape == (2, 3)
    image = tiny("vit", dtype="bfloat16")
    assert image.make_batch(2)["pixel_values"].dtype is torch.bfloat16
    assert image.loss(image.model, image.make_batch(2)).dtype is torch.float32


def test_gpt2_and_t5_keep_their_ties(tiny: Callable[..., Workload]) -> None:
    gpt2, t5 = tiny("gpt2").model, tiny("t5").model
    assert gpt2.get_parameter("lm_head.weight") is gpt2.get_parameter("transformer.wte.weight")
    assert t5.get_parameter("shared.weight") is t5.get_parameter("decoder.embed_tokens.weight")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("hf:gpt2-small", {}, r"Did you mean .*hf:gpt2.*Known without network are gpt2, .*config\.json"),
        ("hf:gpt2", {"num_labels": 3}, "no setting 'num_labels'.*next-token"),
        ("hf:gpt2", {"sequence_length": 2000}, "at most 1024.*found 2000"),
        ("hf:roberta-base", {"sequence_length": 513}, "at most 512"),
        ("hf:google/vit-base-patch16-224", {"sequence_length": 8}, "no setting 'sequence_length'"),
        ("hf:gpt2", {"attn_implementation": "flash"}, "one of sdpa, eager, found 'flash'"),
        ("hf:gpt2", {"dtype": "int8"}, "one of float32, .*found 'int8'"),
        ("hf:gpt2", {"sequence_length": "long"}, "sequence_length .* positive integer, found 'long'"),
        ("hf:gpt2", {"layers": 3}, "no setting 'layers'.*batch_size"),
    ],
)
def test_wrong_requests_name_the_remedy(text: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        load_workload(text, **settings)


def test_folder_without_a_readable_configuration(tmp_path: Path) -> None:
    with pytest.raises(GroupSearchError, match=r"no config\.json in the folder"):
        load_workload(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{ truncated")
    with pytest.raises(GroupSearchError, match="could not be read"):
        load_workload(f"hf:{tmp_path}")


def test_configuration_that_transformers_refuses(tmp_path: Path) -> None:
    for config, message in (
        ({"model_type": "gpt2", "n_embd": "x"}, "could not be read: .*'n_embd'.*Mend its"),
        ({"model_type": "no-such-type"}, "could not be read: .*no-such-type"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(GroupSearchError, match=message):
            load_workload(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 10, "n_head": 3}))
    with pytest.raises(GroupSearchError, match=r"could not build .*divisible"):
        load_workload(f"hf:{tmp_path}").build()


def test_architecture_without_a_fitting_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timesformer"}))
    with pytest.raises(UnsupportedModelError, match=r"type 'timesformer'.*file\.py:factory"):
        load_workload(f"hf:{tmp_path}")


def test_transformers_is_imported_only_for_its_models(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')\n")
    code = (
        "from groupsearch.workloads import load_workload, list_workloads\n"
        "import sys\n"
        "load_workload('digits-vit'); list_workloads()\n"
        "assert 'transformers' not in sys.modules\n"
        "load_workload('hf:gpt2')\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert "GroupSearchError: hf:gpt2 needs the transformers package" in done.stderr
    assert "pip install 'groupsearch[hf]'" in done.stderr


def test_listed_tasks_are_those_of_the_models() -> None:
    listed = {info.name: info for info in list_workloads()}
    assert listed["hf:gpt2"].task == "next-token prediction"
    assert not listed["hf:gpt2"].has_data
