"""The models that people train, at the sizes they train them at; no weights are needed, nor anything that draws."""

from __future__ import annotations

from dataclasses import dataclass

from groupsearch.verify import Setup


@dataclass(frozen=True)
class Model:
    """One model at the size it is trained at.

    Attributes:
        workload: its text, see :func:`groupsearch.workloads.load_workload`.
        batch_size: B.
        given: what an example is, in words.
        sequence_length: T, where the workload has the setting.
    """

    workload: str
    batch_size: int
    given: str
    sequence_length: int | None = None

    def setup(self, autocast: str, checkpoint: str) -> Setup:
        """One step of it."""
        length = {} if self.sequence_length is None else {"sequence_length": self.sequence_length}
        settings = {"batch_size": self.batch_size, **length}
        return Setup(self.workload, settings, checkpoint=checkpoint, autocast=autocast)


def _text(workload: str, batch_size: int, length: int) -> Model:
    return Model(workload, batch_size, f"{length} tokens", length)


MODELS = {
    "GPT-2 small": _text("hf:gpt2", 8, 512),
    "GPT-2 medium": _text("hf:gpt2-medium", 8, 512),
    "GPT-2 large": _text("hf:gpt2-large", 8, 512),
    "GPT-2 XL": _text("hf:gpt2-xl", 8, 512),
    "RoBERTa base": _text("hf:roberta-base", 40, 256),
    "RoBERTa large": _text("hf:roberta-large", 40, 256),
    "BERT base": _text("hf:bert-base-uncased", 40, 256),
    "ViT-B/16": Model("hf:google/vit-base-patch16-224", 50, "224 x 224"),
    "ViT-L/16": Model("hf:google/vit-large-patch16-224", 50, "224 x 224"),
    "Llama 3.2 1B": _text("hf:benchmarks/configurations/llama-3.2-1b", 4, 512),
    "T5 base": _text("hf:t5-base", 16, 256),
    "ResNet-50 with GroupNorm": Model("benchmarks.networks:resnet50_groupnorm", 32, "224 x 224"),
    "Whisper small encoder": Model("benchmarks.networks:whisper_small_encoder", 32, "30 s of sound"),
}
