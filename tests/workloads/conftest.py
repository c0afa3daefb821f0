"""Tiny transformers models, each from a config.json in a folder of its own, as a user would have one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Workload

_ENCODER = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER |= {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2},
    "llama": {**_ENCODER, "num_key_value_heads": 1},
    "roberta": _ENCODER,
    "bert": _ENCODER,
    "t5": {
        "vocab_size": 97,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "vit": {**_ENCODER, "image_size": 8, "patch_size": 4, "num_labels": 5},
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workload]:
    """``tiny(kind, **settings)``: a workload of 2 blocks of width 16, sequences of 12."""
    folder = tmp_path_factory.mktemp("configs")
    for kind, config in CONFIGS.items():
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": kind, **config}))

    def load(kind: str, **settings: Any) -> Workload:
        if kind != "vit":
            settings.setdefault("sequence_length", 12)
        return load_workload(f"hf:{folder / kind}", **settings)

    return load
