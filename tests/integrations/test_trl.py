"""TRL's SFTTrainer, private, on padded examples; equal to the plain loop."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from groupsearch import GroupSearchError
from tests.support.loops import (
    EXPECTED,
    PHYSICAL,
    RATE,
    STEPS,
    assert_close,
    assert_same,
    lora,
    plainly_trained,
    privacy,
    rows,
    trained,
)

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL's doing
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def texts() -> Any:
    """The examples before they are padded."""
    import datasets

    whole = [row["input_ids"][row["attention_mask"] == 1].tolist() for row in rows()]
    return datasets.Dataset.from_dict({"input_ids": whole, "labels": whole})


def trainer(folder: Path, **changes: Any) -> Any:
    import trl  # it takes seconds to import
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from groupsearch.integrations.trl import PrivateSFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(24)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")
    size = {"per_device_train_batch_size": PHYSICAL, "gradient_accumulation_steps": EXPECTED // PHYSICAL}
    how = {"learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "adamw_torch", "max_steps": STEPS}
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    arguments = trl.SFTConfig(str(folder), **{**size, **how, **often, **quiet, **changes})
    data = {"train_dataset": texts(), "eval_dataset": texts().select(range(10))}
    return PrivateSFTTrainer(lora(), arguments, processing_class=tokenizer, privacy=privacy(), **data)


def test_sft_with_accumulation_and_lora_trains_what_the_plain_loop_does_and_resumes(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    weights = trained(made.model)
    assert_close(weights, plainly_trained())
    assert any("eval_loss" in entry for entry in made.state.log_history)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(trained(resumed.model), weights)
    assert resumed.engine.steps == STEPS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "packing: a row must be one example, and no other"),
        ({"padding_free": True, "max_length": None}, "padding_free: a row must be one example"),
        ({"loss_type": "dft"}, "loss_type: .*give loss="),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # TRL's, of attention that packing asks for
def test_rows_that_hold_several_examples_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        trainer(tmp_path, **changes)
