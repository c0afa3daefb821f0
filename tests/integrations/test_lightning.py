"""Lightning's loop, private: its accumulation, its checkpoints; equal to the plain loop."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from groupsearch import GroupSearchError
from tests.support.loops import (
    EXPECTED,
    PHYSICAL,
    RATE,
    STEPS,
    assert_close,
    assert_same,
    batches,
    lora,
    loss,
    plainly_trained,
    privacy,
    rows,
    trained,
)

pytestmark = [
    pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),  # Lightning's doing, as those below
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
]


def module() -> Any:
    from groupsearch.integrations.lightning import PrivateModule  # the library takes seconds to import

    class Module(PrivateModule):
        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS + 2, 0.5)  # after the last step
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("judged", self.loss(self.model, batch).mean())

    return Module(lora().train(), loss, batches(), privacy())


def trainer(folder: Path, accumulation: int = EXPECTED // PHYSICAL, **changes: Any) -> Any:
    import lightning.pytorch as lightning

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saving = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    given = {"max_steps": STEPS + 2, "callbacks": [saving], **changes}
    return lightning.Trainer(default_root_dir=folder, accumulate_grad_batches=accumulation, **quiet, **given)


def refuse_without_engine_state(path: Path) -> None:
    kept = torch.load(path, weights_only=False)
    torch.save({key: value for key, value in kept.items() if key != "groupsearch"}, path.parent / "plain.ckpt")
    with pytest.raises(GroupSearchError, match=r"a checkpoint without the engine's state: what the steps before cost"):
        trainer(path.parent).fit(module(), ckpt_path=path.parent / "plain.ckpt")


def test_accumulation_and_lora_train_what_the_plain_loop_does_and_resume(tmp_path: Path) -> None:
    judged = DataLoader(rows()[:10], batch_size=10)  # type: ignore[arg-type]
    first, loop = module(), trainer(tmp_path)
    loop.fit(first, val_dataloaders=judged)
    weights = trained(first.model)
    assert_close(weights, plainly_trained(STEPS + 2))
    assert first.engine is not None
    assert first.engine.steps == loop.global_step == STEPS + 2
    assert loop.lr_scheduler_configs[0].scheduler.last_epoch == STEPS + 2, "it is stepped once an optimizer step"
    assert {"loss", "judged"} <= loop.callback_metrics.keys()
    again = module()
    refuse_without_engine_state(tmp_path / "step=4.ckpt")
    trainer(tmp_path).fit(again, ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(trained(again.model), weights)
    assert again.engine is not None
    assert again.engine.steps == STEPS + 2
    assert again.engine.epsilon(1e-3) == first.engine.epsilon(1e-3)


def test_without_accumulation_a_batch_is_a_whole_logical_one(tmp_path: Path) -> None:
    made = module()
    trainer(tmp_path, accumulation=1, max_steps=3).fit(made)
    assert_close(trained(made.model), plainly_trained(3))
    with pytest.raises(GroupSearchError, match=r"a second fit: the steps before.*ckpt_path"):
        trainer(tmp_path).fit(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val: it would clip nothing.*Privacy\(max_grad_norm=\)"),
        ({"max_steps": -1, "max_epochs": -1}, "a number of steps, found none"),
    ],
)
def test_what_cannot_be_private_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        trainer(tmp_path, **changes).fit(module())


def test_a_loader_of_ones_own_is_refused(tmp_path: Path) -> None:
    shuffling: Any = DataLoader(rows(), batch_size=8, shuffle=True)  # type: ignore[arg-type]
    with pytest.raises(GroupSearchError, match="a loader given to fit: it shuffles"):
        trainer(tmp_path).fit(module(), shuffling)


def test_epochs_cut_within_a_logical_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GroupSearchError, match="one finished logical batch"):
        trainer(tmp_path, limit_train_batches=2).fit(module())
