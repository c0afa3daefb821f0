"""transformers' Trainer, private: accumulation, LoRA, evaluation, checkpoints; equal to the plain loop."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from groupsearch import GroupSearchError, UnsupportedModelError
from groupsearch.workloads.tasks import TASKS
from tests.support.loops import (
    EXPECTED,
    PHYSICAL,
    RATE,
    SIZE,
    STEPS,
    assert_close,
    assert_same,
    lora,
    loss,
    plainly_trained,
    privacy,
    rows,
    trained,
)

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")

Made = Any


def trainer(folder: Path, model: nn.Module | None = None, own_loss: bool = False, **changes: Any) -> Made:
    """A private Trainer; changes are of its arguments, or of the Trainer's own where it has them."""
    import transformers  # with its Trainer it takes seconds to import

    from groupsearch.integrations.transformers import PrivateTrainer

    class Own(PrivateTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **_: Any) -> Any:
            return model(**inputs).loss

    kind = Own if own_loss else PrivateTrainer
    own = {name: changes.pop(name) for name in (*_OWN,) if name in changes}
    size = {"per_device_train_batch_size": PHYSICAL, "gradient_accumulation_steps": EXPECTED // PHYSICAL}
    how = {"learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "adamw_torch", "max_steps": STEPS + 2}
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(str(folder), **{**size, **how, **often, **quiet, **changes})
    given = {"train_dataset": rows(), "eval_dataset": rows()[:10], "privacy": privacy(), **own}
    return kind(lora() if model is None else model, arguments, **given)


_OWN = ("train_dataset", "privacy", "loss", "compute_loss_func", "model_init")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, dict[str, Tensor], Path]:
    """A trainer after eight steps, its weights, and its folder with a checkpoint of the fourth, in mid-epoch."""
    folder = tmp_path_factory.mktemp("trainer")
    made = trainer(folder)
    made.train()
    return made, trained(made.model), folder


def test_accumulation_and_lora_train_what_the_plain_loop_does(run: tuple[Made, dict[str, Tensor], Path]) -> None:
    made, weights, _ = run
    assert_close(weights, plainly_trained(STEPS + 2))
    assert made.engine.steps == made.micro_batches.batches.taken == STEPS + 2
    assert made.engine.settings.sampling_rate == EXPECTED / SIZE


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(run: tuple[Made, dict[str, Tensor], Path]) -> None:
    made, weights, folder = run
    resumed = trainer(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same(trained(resumed.model), weights)
    assert resumed.engine.steps == STEPS + 2
    assert resumed.engine.epsilon(1e-3) == made.engine.epsilon(1e-3)
    assert resumed.state.epoch == made.state.epoch == (STEPS + 2) / STEPS


def test_evaluation_has_the_loss_of_the_examples(run: tuple[Made, dict[str, Tensor], Path]) -> None:
    made, _, _ = run
    few = {name: torch.stack([row[name] for row in rows()[:10]]) for name in rows()[0]}
    made.model.eval()
    with torch.no_grad():
        expected = loss(made.model, few).mean().item()
    # batches of 8 and 2, each with the weight of its examples
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert made.predict(rows()[:10]).predictions.shape == (10, 8, 24)


def test_the_log_tells_what_was_spent(run: tuple[Made, dict[str, Tensor], Path]) -> None:
    logs = [entry for entry in run[0].state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6, 8]
    spent = [entry["epsilon"] for entry in logs]
    assert spent == sorted(set(spent))
    assert spent[-1] == run[0].engine.epsilon(1e-2 / SIZE)
    assert not any("grad_norm" in entry for entry in logs), "it would be zero: the gradient is made within the step"


def test_the_model_is_trained_in_training_mode(run: tuple[Made, dict[str, Tensor], Path]) -> None:
    assert run[0].engine.report().checked.mode == "training"


def test_a_checkpoint_without_its_privacy_is_not_resumed(
    run: tuple[Made, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    shutil.copytree(run[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "privacy.pt").unlink()
    with pytest.raises(GroupSearchError, match=r"what the steps before cost.*without save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_second_training_is_not_of_the_first_ones_budget(tmp_path: Path) -> None:
    said = replace(privacy(), noise_multiplier=None, epsilon=8.0, delta=1e-3, watch=0.0)
    made = trainer(tmp_path, privacy=said, max_steps=1, save_strategy="no", eval_strategy="no")
    made.train()
    assert 7 < made.engine.epsilon(1e-3) <= 8
    with pytest.raises(GroupSearchError, match=r"second training after 1 steps.*resume_from_checkpoint"):
        made.train()
    assert made.engine.steps == 1


def test_an_empty_batch_takes_a_step_of_noise_alone(tmp_path: Path) -> None:
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 6}
    made = trainer(tmp_path, **one, save_strategy="no", eval_strategy="no")
    made.train()
    drawn = privacy().batches(rows(), expected_batch_size=1, steps=6, physical_batch=1)
    sizes = [len(list(logical)) for logical in drawn]
    assert made.engine.steps == 6
    assert 0 in sizes, "or there is nothing to see here"


def test_steps_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
    made.train()
    made.optimizer, made.lr_scheduler = torch.optim.SGD(made.model.parameters(), lr=0.1), None
    with pytest.raises(GroupSearchError, match="stepped another optimizer"):
        made.train()


def test_batches_of_ones_own_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
    made.get_train_dataloader = lambda: torch.utils.data.DataLoader(rows()[:8], batch_size=4)
    with pytest.raises(GroupSearchError, match=r"get_train_dataloader.*overridden.*Give train_dataset"):
        made.train()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: .*give loss="),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: its noise depends on the longest example"),
        ({"torch_compile": True}, "torch_compile: layers inside cannot be followed"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: .*groupsearch fit"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: batches are Poisson samples"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm: it would clip nothing.*Privacy\(max_grad_norm=\)"),
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss: it returns one number for a batch"),
        ({"own_loss": True}, "compute_loss: it returns one number for a batch"),
    ],
)
def test_what_cannot_be_private_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "fp16: its scaler skips steps.*take bf16"),
        ("_n_gpu", 2, "several devices: one process on one device"),
        ("deepspeed", "zero.json", "fsdp or deepspeed: one process on one device"),
    ],
)
def test_what_this_machine_cannot_start_is_refused_as_well(tmp_path: Path, name: str, value: Any, message: str) -> None:
    made = trainer(tmp_path)
    setattr(made.args, name, value)
    with pytest.raises(GroupSearchError, match=message):
        made.check_private()


def test_experts_that_are_balanced_over_a_batch_are_refused(tmp_path: Path) -> None:
    model = lora()
    model.config.output_router_logits = True  # type: ignore[union-attr]
    with pytest.raises(GroupSearchError, match="output_router_logits: the loss that balances experts"):
        trainer(tmp_path, model)


@pytest.mark.parametrize(("data", "found"), [(Stream(), "Stream"), (rows()[:5], "list")])
def test_data_that_cannot_be_sampled_are_refused(tmp_path: Path, data: Any, found: str) -> None:
    with pytest.raises(GroupSearchError, match=f"at least 8 examples .* found {found}"):
        trainer(tmp_path, train_dataset=data).train()


def test_a_loss_of_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"shape \(.*one loss per example"):
        trainer(tmp_path, loss=lambda model, batch: loss(model, batch).mean()).train()


def text_batch(**labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(3, 24, (3, 6), generator=generator), **labels}


def cases() -> Mapping[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Models whose own loss of a single example is what the example's must be, with batches of three."""
    small = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = {**small, "intermediate_size": 12, "num_labels": 4}
    t5 = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "num_labels": 4}
    words = torch.tensor([[4, 5, 6, 7, 8, 9], [4, 5, 6, -100, -100, -100], [5, 6, 4, 4, -100, -100]])
    torch.manual_seed(0)
    import transformers as kinds

    regression = {"num_labels": 1, "problem_type": "regression"}
    several = {"problem_type": "multi_label_classification"}
    made = {
        "causal": (lora(), {name: value[:3] for name, value in _stacked().items()}),
        "classes": (
            kinds.BertForSequenceClassification(kinds.BertConfig(**bert)),
            text_batch(labels=torch.tensor([0, 3, 1])),
        ),
        "tokens": (
            kinds.BertForTokenClassification(kinds.BertConfig(**bert)),
            text_batch(labels=torch.where(words < 0, words, words % 4)),
        ),
        "masked": (kinds.BertForMaskedLM(kinds.BertConfig(**bert)), text_batch(labels=words)),
        "numbers": (
            kinds.BertForSequenceClassification(kinds.BertConfig(**bert | regression)),
            text_batch(labels=torch.tensor([0.5, -1.0, 2.0])),
        ),
        "several": (
            kinds.BertForSequenceClassification(kinds.BertConfig(**bert | several)),
            text_batch(labels=torch.eye(4)[:3]),
        ),
        "sequences": (
            kinds.T5ForConditionalGeneration(kinds.T5Config(**t5, decoder_start_token_id=0)),
            text_batch(labels=words),
        ),
    }
    return {name: (model.eval(), batch) for name, (model, batch) in made.items()}


def _stacked() -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}


def test_an_examples_loss_is_the_models_own_of_it_alone() -> None:
    from groupsearch.integrations.transformers import example_losses

    for name, (model, batch) in cases().items():
        with torch.no_grad():
            losses = example_losses(model, batch)
            alone = [model(**{key: value[i : i + 1] for key, value in batch.items()}).loss for i in range(3)]
        assert losses.shape == (3,), name
        torch.testing.assert_close(losses, torch.stack(alone), msg=name)


def test_the_losses_are_those_of_hub_models() -> None:
    from groupsearch.integrations.transformers import example_losses

    batch = {name: value[:3] for name, value in _stacked().items()}
    with torch.no_grad():
        torch.testing.assert_close(example_losses(lora(), batch), TASKS["causal-lm"].loss(lora(), batch))


def test_labels_without_a_usual_loss_are_named() -> None:
    from groupsearch.integrations.transformers import example_losses

    model, batch = cases()["classes"]
    with pytest.raises(UnsupportedModelError, match=r"labels of shape \(3, 2\).*Give loss="):
        example_losses(model, {**batch, "labels": torch.zeros(3, 2, dtype=torch.long)})
