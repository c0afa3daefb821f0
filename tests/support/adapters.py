"""The methods of PEFT that can be made from a configuration alone, on a small Llama (or another model they ask for)."""

# One method is one line, however long.
# ruff: noqa: E501

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architectures import DECODER, SEQ2SEQ, TEXT, a_class, pairs, translated, words

LAYERS = ["q_proj", "v_proj", "down_proj"]
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A method: the class of its configuration and the settings.

    Attributes:
        name: how the table calls it.
        config: the class.
        settings: of the configuration.
        base: the kind of model it is put on.
        single: whether it runs in float32 only.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = "decoder"
    single: bool = False

    @property
    def seed(self) -> int:
        """The same for every run, another for every method."""
        return zlib.crc32(self.name.encode())

    @property
    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        """One loss per example."""
        return LOSSES[self.base]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model with its adapters, in training mode, the trainable ones off their special initial values."""
        import peft

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            model: nn.Module = peft.get_peft_model(_base(self.base), getattr(peft, self.config)(**self.settings))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point() and parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.to(dtype).train()

    def batch(self, dtype: torch.dtype, batch_size: int = 3) -> dict[str, Tensor]:
        """``batch_size`` examples."""
        generator = torch.Generator().manual_seed(self.seed)
        made = (pairs if self.base == "seq2seq" else words)(batch_size, generator)
        made |= {name: torch.ones_like(made["input_ids"]) for name in ("attention_mask",) if self.base != "seq2seq"}
        if "num_tasks" in self.settings:
            made["task_ids"] = torch.arange(batch_size) % 2
        return made | {
            "scale": torch.linspace(0.5, 3.0, batch_size, dtype=dtype),
            "label": torch.arange(batch_size) % 2,
        }


def after_prompt(model: nn.Module, batch: Any) -> Tensor:
    """As next-token loss, where a prompt may be put before the tokens."""
    inputs = {k: v for k, v in batch.items() if k not in ("scale", "label")}
    logits = model(**inputs, return_dict=True).logits[:, -batch["input_ids"].shape[1] : -1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return batch["scale"] * losses.mean(1)


LOSSES = {"decoder": after_prompt, "gpt2": after_prompt, "classifier": a_class, "seq2seq": translated}


def _base(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, n_positions=32, n_embd=8, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))  # fmt: skip
    if kind == "classifier":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**{**TEXT, "max_position_embeddings": 32}))  # fmt: skip
    if kind == "seq2seq":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**{**SEQ2SEQ, "max_position_embeddings": 32}))  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, "max_position_embeddings": 32}))


def _on(name: str, config: str = "", single: bool = False, **settings: Any) -> Adapter:
    return Adapter(name, config or f"{name}Config", {"target_modules": LAYERS, **settings}, single=single)


ADAPTERS: tuple[Adapter, ...] = (
    _on("LoRA", "LoraConfig", r=2, lora_dropout=0.1),
    _on("DoRA", "LoraConfig", r=2, use_dora=True),
    _on("rsLoRA", "LoraConfig", r=2, use_rslora=True),
    _on("LoRA with biases", "LoraConfig", r=2, lora_bias=True),
    _on("AdaLora", init_r=2, target_r=1, total_step=10),
    _on("IA3", feedforward_modules=["down_proj"]),
    _on("BOFT", boft_block_size=2, boft_n_butterfly_factor=1),
    _on("OFT", r=0, oft_block_size=4),
    _on("HRA", r=2),
    _on("LoHa", r=2),
    _on("LoKr", r=2),
    _on("Miss", r=2),
    _on("VeRA", "VeraConfig", r=2),
    _on("PVeRA", "PveraConfig", r=2),
    _on("VB-LoRA", "VBLoRAConfig", r=2, num_vectors=4, vector_length=4, topk=2),
    _on("FourierFT", n_frequency=8),
    _on("WaveFT", n_frequency=8),
    _on("SHiRA", "ShiraConfig", r=1),
    _on("C3A", block_size=4),
    _on("RandLora", r=2),
    _on("RoAd", "RoadConfig", variant="road_1", group_size=4),
    _on("HiRA", "HiraConfig", r=2),
    _on("DeLoRA", "DeloraConfig", r=2),
    _on("GraLoRA", "GraloraConfig", r=2, gralora_k=2),
    _on("GLoRA", "GloraConfig", r=2),
    _on("Lily", r=2, stride_A=1, num_B=2),
    _on("PEANuT", "PeanutConfig", r=2),
    _on("PSOFT", "PsoftConfig", r=2),
    _on("TinyLoRA", "TinyLoraConfig", r=2, u=4),
    _on("Uni-LoRA", "UniLoraConfig", r=2, theta_d_length=8),
    _on("FRoD", "FrodConfig", progressbar=False),
    _on("DEFT", "DeftConfig", r=2),
    _on("BEFT", "BeftConfig", target_modules=["v_proj"]),
    _on("AdaMSS", "AdamssConfig", r=4, num_subspaces=2, subspace_rank=1),
    _on("Supertuning", sparsity=0.5),
    _on("OSF", "OSFConfig", effective_rank=2),
    Adapter("LayerNorm tuning", "LNTuningConfig", {"target_modules": ["norm", "input_layernorm"]}),
    Adapter("Trainable tokens", "TrainableTokensConfig", {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]}),
    Adapter("Prompt tuning", "PromptTuningConfig", PROMPT),
    Adapter("P-tuning", "PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 6}),
    Adapter("P-tuning, LSTM", "PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    Adapter("Prefix tuning", "PrefixTuningConfig", PROMPT),
    Adapter("Prefix tuning, projected", "PrefixTuningConfig", {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 6}),
    Adapter("Multitask prompt tuning", "MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 2}),
    Adapter("CPT", "CPTConfig", {"task_type": "CAUSAL_LM", "cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
    Adapter("Cartridge", "CartridgeConfig", PROMPT),
    Adapter("LLaMA-Adapter", "AdaptionPromptConfig", {"adapter_layers": 1, "adapter_len": 3, "task_type": "CAUSAL_LM"}),
    Adapter("Prompt tuning, GPT-2", "PromptTuningConfig", PROMPT, "gpt2"),
    Adapter("Prefix tuning, GPT-2", "PrefixTuningConfig", PROMPT, "gpt2"),
    Adapter("Prompt tuning, BERT", "PromptTuningConfig", {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}, "classifier"),
    Adapter("Prefix tuning, BERT", "PrefixTuningConfig", {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}, "classifier"),
    Adapter("Prompt tuning, BART", "PromptTuningConfig", {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}, "seq2seq"),
)  # fmt: skip
