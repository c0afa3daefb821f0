"""Architectures of transformers that docs/models.md does not list: small, from configuration, as their classes build them.

Shapes: B examples, T positions. Widths of 8 to 32, two layers; settings say sizes only, so that dropout, experts,
attention and everything else are what the class comes with.
"""
# One architecture is one line, however long: a table is read down its columns.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 24
Batch = Mapping[str, Tensor]
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 20}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 4}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
SEQ2SEQ = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 20}
IMAGE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 2}
SPEECH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 2, "mask_time_length": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A class of transformers, its configuration and how it is trained.

    Attributes:
        name: of the class.
        config: name of the class of its configuration, and its settings.
        inputs: what one batch is: B to the named tensors, with a generator.
        loss: one loss per example, (B,).
        kind: what the table lists it under.
        build: makes the configuration, where one class of settings does not.
        frozen: starts of the names of parameters that do not train.
        note: what is special about it.
        single: whether it runs in float32 only.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    loss: Callable[[nn.Module, Any], Tensor]
    kind: str = ""
    build: Callable[[], Any] | None = None
    frozen: tuple[str, ...] = ()
    note: str = ""
    single: bool = False

    @property
    def seed(self) -> int:
        """The same for every run, another for every architecture."""
        return zlib.crc32(self.name.encode())

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model in training mode, its parameters moved off their special initial values."""
        import transformers

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            config = self.build() if self.build else getattr(transformers, self.config)(**self.settings)
            model: nn.Module = getattr(transformers, self.name)(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
                    if self.frozen and name.startswith(self.frozen):
                        parameter.requires_grad_(False)
        return model.to(dtype).train()

    def batch(self, dtype: torch.dtype, batch_size: int = 3) -> dict[str, Tensor]:
        """``batch_size`` examples, floating numbers in ``dtype``."""
        generator = torch.Generator().manual_seed(self.seed)
        made = self.inputs(batch_size, generator)
        made["scale"], made["label"] = torch.linspace(0.5, 3.0, batch_size), torch.arange(batch_size) % 2
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


# -- what goes in ---------------------------------------------------------------------------------


def words(size: int, generator: torch.Generator, length: int = 8, name: str = "input_ids") -> dict[str, Tensor]:
    """Tokens (B, T), none of them special."""
    return {name: torch.randint(4, VOCABULARY, (size, length), generator=generator)}


def pairs(size: int, generator: torch.Generator, length: int = 8) -> dict[str, Tensor]:
    """Tokens in and out, (B, T)."""
    return {**words(size, generator, length), **words(size, generator, 5, "decoder_input_ids")}


def pixels(size: int, generator: torch.Generator, side: int = 8, channels: int = 3, name: str = "pixel_values", more: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Images (B, C, H, W), or (B, *more, C, H, W)."""
    return {name: torch.randn(size, *more, channels, side, side, generator=generator)}


def numbers(size: int, generator: torch.Generator, shape: tuple[int, ...] = (), name: str = "input_values") -> dict[str, Tensor]:
    """Numbers (B, *shape)."""
    return {name: torch.randn(size, *shape, generator=generator)}


def together(*parts: Callable[[int, torch.Generator], dict[str, Tensor]]) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Several kinds of input."""
    return lambda size, generator: {k: v for part in parts for k, v in part(size, generator).items()}


def constant(name: str, make: Callable[[int], Tensor]) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """An input that is made from the number of examples."""
    return lambda size, generator: {name: make(size)}


def page(size: int, generator: torch.Generator, length: int = 8, scale: float = 0.0) -> dict[str, Tensor]:
    """Tokens and their boxes on a page, (B, T, 4)."""
    corner = torch.randint(0, 8, (size, length, 2), generator=generator)
    extent = torch.randint(1, 8, (size, length, 2), generator=generator)
    box = torch.cat([corner, corner + extent], 2)
    return {**words(size, generator, length), "bbox": box / scale if scale else box}


# -- what is trained for -----------------------------------------------------------------------------


def _call(model: nn.Module, batch: Batch, **more: Any) -> Any:
    return model(**{k: v for k, v in batch.items() if k not in ("scale", "label")}, **more, return_dict=True)


def next_token(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """Mean cross-entropy of every next token, (B,)."""
    logits = _call(model, batch, **more).logits[:, :-1]
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)


def same_token(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of another token at every position, (B,)."""
    logits = _call(model, batch).logits
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), batch["input_ids"].flip(1) % logits.shape[2], reduction="none").mean(1)


def translated(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """Mean cross-entropy of the tokens out, (B,)."""
    logits = _call(model, batch, use_cache=False, **more).logits
    target = batch["decoder_input_ids"].roll(-1, 1)
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


def a_class(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """Cross-entropy of a made-up class of each example, (B,)."""
    output = _call(model, batch, **more)
    logits = output.logits
    logits = logits.flatten(2).mean(2) if logits.dim() > 2 else logits
    return batch["scale"] * F.cross_entropy(logits, batch["label"], reduction="none")


def read(model: nn.Module, batch: Batch, names: tuple[str, ...] = ("logits",), **more: Any) -> Tensor:
    """A bounded function of some outputs, (B,)."""
    output = _call(model, batch, **more)
    total = torch.zeros_like(batch["scale"])
    for name in names:
        parts = output[name] if isinstance(output[name], tuple) else (output[name],)
        flat = torch.cat([part.flatten(1) for part in parts], 1)
        total = total + (flat.sin() * torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))).sum(1)
    return batch["scale"] * total


def hidden(model: nn.Module, batch: Batch) -> Tensor:
    """A bounded function of the last hidden state, (B,)."""
    return read(model, batch, ("last_hidden_state",))


# -- the catalogue -----------------------------------------------------------------------------------


def _entry(name: str, config: str, inputs: Any, loss: Any, kind: str, settings: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture(name, config, {k: v for k, v in settings.items() if v is not ...}, inputs, loss, kind, **more)


def decoder(name: str, more: Mapping[str, Any] | None = None, config: str = "", kind: str = "decoder", **own: Any) -> Architecture:
    """A language model that reads tokens from the left."""
    cls = name if name.endswith(("LM", "Model", "Generation", "Head")) else f"{name}ForCausalLM"
    loss = own.pop("loss", partial(next_token, use_cache=False))
    return _entry(cls, config or f"{name}Config", own.pop("inputs", words), loss, kind, {**DECODER, **(more or {})}, **own)


def experts(name: str, **more: Any) -> Architecture:
    """A language model whose tokens are routed to experts."""
    return decoder(name, {**MOE, **more}, kind="mixture of experts")


def encoder(name: str, more: Mapping[str, Any] | None = None, task: str = "SequenceClassification", **own: Any) -> Architecture:
    """A reader of whole texts."""
    loss = {"SequenceClassification": a_class, "TokenClassification": same_token, "MaskedLM": same_token}[task]
    config = own.pop("config", f"{name}Config")
    return _entry(f"{name}For{task}", config, own.pop("inputs", words), own.pop("loss", loss), "encoder", {**TEXT, **(more or {})}, **own)


def seq2seq(name: str, more: Mapping[str, Any] | None = None, cls: str = "", **own: Any) -> Architecture:
    """A translator."""
    return _entry(cls or f"{name}ForConditionalGeneration", own.pop("config", f"{name}Config"), own.pop("inputs", pairs), own.pop("loss", translated), own.pop("kind", "encoder and decoder"), {**SEQ2SEQ, **(more or {})}, **own)


def image(name: str, more: Mapping[str, Any] | None = None, cls: str = "", **own: Any) -> Architecture:
    """A reader of images."""
    return _entry(cls or f"{name}ForImageClassification", own.pop("config", f"{name}Config"), own.pop("inputs", pixels), own.pop("loss", a_class), "vision", {**IMAGE, **(more or {})}, **own)


def speech(name: str, more: Mapping[str, Any] | None = None, cls: str = "", **own: Any) -> Architecture:
    """A reader of sound."""
    inputs = own.pop("inputs", partial(numbers, shape=(400,)))
    return _entry(cls or f"{name}ForSequenceClassification", own.pop("config", f"{name}Config"), inputs, own.pop("loss", a_class), "sound", {**SPEECH, **(more or {})}, **own)


def other(name: str, kind: str, inputs: Any, loss: Any, settings: Mapping[str, Any] | None = None, config: str = "", **own: Any) -> Architecture:
    """Anything else."""
    return _entry(name, config, inputs, loss, kind, settings or {}, **own)


T5ISH = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}

ENCODERS = [
    encoder("Albert", {"embedding_size": 6}),
    encoder("Electra", {"embedding_size": 6}),
    encoder("MPNet", task="MaskedLM"),
    encoder("XLMRoberta"),
    encoder("Camembert", task="TokenClassification"),
    encoder("Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0, "pooler_hidden_size": 8}),
    encoder("FNet"),
    encoder("Funnel", {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "num_hidden_layers": ...}),
    encoder("BigBird", {"attention_type": "original_full"}),
    encoder("BigBird", {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 40}, inputs=partial(words, length=32), note="block-sparse attention"),
    encoder("Longformer", {"attention_window": 4}),
    encoder("Nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3}),
    encoder("Yoso", {"use_expectation": True}),
    encoder("RoFormer", {"embedding_size": 8}),
    encoder("ConvBert", {"embedding_size": 8, "head_ratio": 2, "conv_kernel_size": 3}),
    encoder("SqueezeBert", {"embedding_size": 8, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2}),
    encoder("MobileBert", {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}),
    encoder("RemBert", {"input_embedding_size": 6, "output_embedding_size": 6}),
    encoder("Canine", {"num_hash_buckets": 16, "local_transformer_stride": 8, "downsampling_rate": 2, "upsampling_kernel_size": 2}, inputs=partial(words, length=8)),
    encoder("XLNet", {"d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12, "max_position_embeddings": ...}),
    encoder("XLM", {"emb_dim": 8, "n_layers": 2, "n_heads": 2}),
    encoder("Flaubert", {"emb_dim": 8, "n_layers": 2, "n_heads": 2}),
    encoder("Esm", {"emb_layer_norm_before": True}, task="TokenClassification"),
    encoder("Ernie"),
    encoder("MegatronBert"),
    encoder("Data2VecText"),
    encoder("RobertaPreLayerNorm"),
    encoder("XLMRobertaXL"),
    encoder("Xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
    encoder("RoCBert", {"pronunciation_vocab_size": 24, "shape_vocab_size": 24, "pronunciation_embed_dim": 4, "shape_embed_dim": 4}),
    encoder("IBert"),
    encoder("Luke", {"entity_vocab_size": 8, "entity_emb_size": 4}),
    encoder("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 4}),
    encoder("Mra", {"block_per_row": 2, "max_position_embeddings": 40}, inputs=partial(words, length=32)),
    encoder("EuroBert", {"num_key_value_heads": 2, "head_dim": 4}),
    encoder("LayoutLM", {"max_2d_position_embeddings": 32}, inputs=page),
    encoder("LayoutLMv3", {"max_2d_position_embeddings": 32, "coordinate_size": 1, "shape_size": 2, "visual_embed": False, "has_spatial_attention_bias": True, "rel_pos_bins": 4, "rel_2d_pos_bins": 4, "max_rel_pos": 8, "max_rel_2d_pos": 8}, inputs=page),
    encoder("Lilt", {"max_2d_position_embeddings": 32, "channel_shrink_ratio": 2, "hidden_size": 24, "intermediate_size": 24}, inputs=page),
    encoder("MarkupLM", {"max_xpath_tag_unit_embeddings": 8, "max_xpath_subs_unit_embeddings": 8, "xpath_unit_hidden_size": 4, "max_depth": 3, "tag_pad_id": 7, "subs_pad_id": 7}),
    encoder("JinaEmbeddingsV3"),
    encoder("NomicBert"),
]

DECODERS = [
    decoder("GPTNeo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    decoder("GPTNeoX"),
    decoder("GPTJ", {"n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 20}),
    decoder("CodeGen", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 20, "n_ctx": 20, "num_attention_heads": 4, "hidden_size": 16}),
    decoder("GPTBigCode", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20}),
    decoder("OPT", {"ffn_dim": 12, "word_embed_proj_dim": 8}),
    decoder("Bloom", {"n_layer": 2, "n_head": 2}),
    decoder("Falcon", {"alibi": False, "head_dim": ...}),
    decoder("Mpt", {"d_model": 8, "n_heads": 2, "n_layers": 2, "max_seq_len": 20}),
    decoder("CTRLLMHeadModel", {"n_embd": 8, "n_layer": 2, "n_head": 2, "dff": 12, "n_positions": 20}, config="CTRLConfig"),
    decoder("OpenAIGPTLMHeadModel", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20}, config="OpenAIGPTConfig", loss=next_token),
    decoder("BioGpt"),
    decoder("XGLMForCausalLM", {"d_model": 8, "ffn_dim": 12, "num_layers": 2, "attention_heads": 2}, config="XGLMConfig"),
    decoder("Phi"),
    decoder("Phi3"),
    decoder("Qwen2"),
    decoder("Gemma2", {"query_pre_attn_scalar": 4}),
    decoder("Gemma3", {"query_pre_attn_scalar": 4}, config="Gemma3TextConfig"),
    decoder("Gemma3n", {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 24, "laurel_rank": 2, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.5, 0.0]}, config="Gemma3nTextConfig"),
    decoder("Cohere"),
    decoder("Cohere2"),
    decoder("StableLm"),
    decoder("Starcoder2"),
    decoder("Olmo"),
    decoder("Olmo2"),
    decoder("Olmo3"),
    decoder("Granite"),
    decoder("Glm"),
    decoder("Glm4"),
    decoder("Persimmon"),
    decoder("Nemotron"),
    decoder("Helium"),
    decoder("SmolLM3"),
    decoder("DiffLlama", {"num_key_value_heads": 2}),
    decoder("Ministral"),
    decoder("Exaone4"),
    decoder("Ernie4_5"),
    decoder("SeedOss"),
    decoder("BitNet"),
    decoder("Apertus"),
    decoder("NanoChat"),
    decoder("ModernBertDecoder"),
    decoder("MiniCPM3", {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "head_dim": ..., "num_key_value_heads": 2}),
    decoder("VaultGemma", {"query_pre_attn_scalar": 4}),
    decoder("Rwkv", {"attention_hidden_size": 8, "context_length": 16}, kind="state space and recurrent"),
    decoder("Mamba", {"state_size": 4, "conv_kernel": 2, "time_step_rank": 2}, kind="state space and recurrent"),
    decoder("Mamba2", {"state_size": 4, "conv_kernel": 2, "num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4}, kind="state space and recurrent"),
    decoder("FalconMamba", {"state_size": 4, "conv_kernel": 2, "time_step_rank": 2}, kind="state space and recurrent"),
    decoder("Bamba", {"mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_chunk_size": 4, "attn_layer_indices": [1]}, kind="state space and recurrent"),
    decoder("Zamba2", {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_headdim": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 4, "attention_head_dim": 8, "attention_hidden_size": 16, "num_key_value_heads": 2, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 2}, kind="state space and recurrent"),
    decoder("RecurrentGemma", {"lru_width": 8, "attention_window_size": 4, "conv1d_width": 2, "num_hidden_layers": 3}, kind="state space and recurrent"),
    decoder("FalconH1", {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_chunk_size": 4}, kind="state space and recurrent"),
    decoder("Lfm2", {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_multiple_of": 4}, kind="state space and recurrent"),
    decoder("xLSTM", {"num_heads": 2, "num_blocks": 2, "embedding_dim": 8, "chunk_size": 8}, kind="state space and recurrent"),
    decoder("Jamba", {**MOE, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}, kind="state space and recurrent"),
    decoder("Qwen3Next", {**MOE, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 2, "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8, "partial_rotary_factor": 1.0}, kind="state space and recurrent"),
]

MLA = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "qk_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 2}
EXPERTS = [
    experts("Qwen2Moe", shared_expert_intermediate_size=8),
    experts("Qwen3Moe"),
    experts("Olmoe"),
    experts("GptOss"),
    experts("DeepseekV2", **{**MLA, "topk_method": "group_limited_greedy"}),
    experts("DeepseekV3", **MLA),
    experts("Phimoe"),
    experts("GraniteMoe"),
    experts("GraniteMoeShared", shared_intermediate_size=8),
    decoder("Dbrx", {"d_model": 8, "n_heads": 2, "n_layers": 2, "max_seq_len": 20, "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 8}}, kind="mixture of experts"),
    experts("JetMoe", kv_channels=4, num_key_value_heads=2),
    experts("Ernie4_5_Moe", moe_k=2, moe_num_experts=4, moe_num_shared_experts=1, moe_layer_start_index=1),
    experts("Glm4Moe", **MLA),
    experts("MiniMax", block_size=4, layer_types=["linear_attention", "full_attention"]),
    experts("FlexOlmo"),
    experts("Lfm2Moe", conv_L_cache=3, layer_types=["conv", "full_attention"], num_dense_layers=1),
    experts("HunYuanMoEV1", moe_topk=2),
    experts("Dots1", **MLA),
    experts("LongcatFlash", **{**MLA, "num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 12, "expert_ffn_hidden_size": 8, "moe_topk": 2, "zero_expert_num": 1}),
    decoder("Llama4", {**MOE, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 12, "attention_chunk_size": 8}, config="Llama4TextConfig", kind="mixture of experts"),
    other("SwitchTransformersForConditionalGeneration", "mixture of experts", pairs, translated, {**T5ISH, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}, "SwitchTransformersConfig", single=True),
    seq2seq("NllbMoe", {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64}, kind="mixture of experts", single=True),
]

TRANSLATORS = [
    seq2seq("MBart"),
    seq2seq("Pegasus"),
    seq2seq("PegasusX", {"num_global_tokens": 2, "block_size": 4}),
    seq2seq("Blenderbot"),
    seq2seq("BlenderbotSmall"),
    seq2seq("M2M100"),
    seq2seq("Marian", cls="MarianMTModel"),
    seq2seq("LED", {"attention_window": 4, "max_encoder_position_embeddings": 20, "max_decoder_position_embeddings": 20}),
    seq2seq("BigBirdPegasus", {"attention_type": "original_full"}),
    seq2seq("PLBart"),
    seq2seq("Mvp"),
    seq2seq("ProphetNet", {"hidden_size": 8, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_layers": ..., "decoder_layers": ..., "ngram": 2, "num_buckets": 4, "relative_max_distance": 8}),
    seq2seq("FSMTFor", {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}, cls="FSMTForConditionalGeneration", config="FSMTConfig"),
    other("MT5ForConditionalGeneration", "encoder and decoder", pairs, translated, T5ISH, "MT5Config"),
    other("UMT5ForConditionalGeneration", "encoder and decoder", pairs, translated, T5ISH, "UMT5Config"),
    other("LongT5ForConditionalGeneration", "encoder and decoder", pairs, translated, {**T5ISH, "local_radius": 3}, "LongT5Config"),
]

VISION = [
    image("Dinov2"),
    image("Dinov2WithRegisters"),
    image("DINOv3ViT", cls="DINOv3ViTModel", loss=hidden),
    image("ViTMSN"),
    image("ViTMAE", {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 12}, cls="ViTMAEForPreTraining", loss=read),
    image("Siglip", cls="SiglipVisionModel", config="SiglipVisionConfig", loss=partial(read, names=("pooler_output",))),
    image("Data2VecVision"),
    image("Hiera", {"embed_dim": 8, "patch_size": [2, 2], "patch_stride": [2, 2], "patch_padding": [0, 0], "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2], "masked_unit_size": [2, 2], "num_query_pool": 1, "masked_unit_attention": [True, False], "image_size": [8, 8]}),
    image("FocalNet", {"embed_dim": 8, "patch_size": 2, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}),
    image("Swinv2", {"embed_dim": 8, "patch_size": 2, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "num_attention_heads": ..., "num_hidden_layers": ..., "hidden_size": ...}),
    image("ConvNextV2", {"patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 1]}),
    image("PoolFormer", {"hidden_sizes": [4, 8], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0}),
    image("Segformer", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    image("Segformer", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}, cls="SegformerForSemanticSegmentation", loss=read),
    image("Pvt", {"num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1], "hidden_sizes": [4, 8], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "image_size": 16}, inputs=partial(pixels, side=16)),
    image("PvtV2", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    image("Cvt", {"patch_sizes": [3, 3, 3], "patch_stride": [2, 2, 2], "patch_padding": [1, 1, 1], "embed_dim": [4, 4, 8], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]}, inputs=partial(pixels, side=16)),
    image("MobileViT", {"image_size": 32, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8], "expand_ratio": 1.0}, inputs=partial(pixels, side=32)),
    image("RegNet", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 4, "num_hidden_layers": ..., "hidden_size": ...}),
    image("Bit", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2, "num_hidden_layers": ..., "hidden_size": ...}),
    image("EfficientNet", {"image_size": 16, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, inputs=partial(pixels, side=64)),
    image("MobileNetV2", {"depth_multiplier": 0.25}, inputs=partial(pixels, side=32)),
    image("LevitFor", {"image_size": 32, "num_channels": 3, "patch_size": 16, "hidden_sizes": [8, 8, 8], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4], "drop_path_rate": 0}, cls="LevitForImageClassification", config="LevitConfig", inputs=partial(pixels, side=32)),
    image("ImageGPT", {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20}, inputs=words),
    image("Yolos", {"num_detection_tokens": 3, "image_size": [8, 8]}, cls="YolosForObjectDetection", loss=partial(read, names=("logits", "pred_boxes"))),
    image("Dpt", {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 4, "reassemble_factors": [2, 1, 1, 1], "image_size": 8, "use_batch_norm_in_fusion_residual": False}, cls="DPTForSemanticSegmentation", config="DPTConfig", loss=read),
    image("GLPN", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}, cls="GLPNForDepthEstimation", loss=partial(read, names=("predicted_depth",))),
    image("VideoMAE", {"num_frames": 2, "tubelet_size": 1, "decoder_num_hidden_layers": 1}, cls="VideoMAEForVideoClassification", inputs=partial(pixels, more=(2,))),
    image("Timesformer", {"num_frames": 2}, cls="TimesformerForVideoClassification", inputs=partial(pixels, more=(2,))),
    image("Vivit", {"num_frames": 2, "tubelet_size": [1, 4, 4]}, cls="VivitForVideoClassification", inputs=partial(pixels, more=(2,))),
    image("IJepa"),
    image("VitDet", {"num_hidden_layers": 2}, cls="VitDetModel", loss=hidden),
    image("SwiftFormer", {"image_size": 32, "depths": [1, 1], "embed_dims": [4, 8], "down_stride": 2}, inputs=partial(pixels, side=32)),
    image("Swin2SR", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 1, "upscale": 2, "num_attention_heads": ..., "num_hidden_layers": ..., "hidden_size": ...}, cls="Swin2SRForImageSuperResolution", loss=partial(read, names=("reconstruction",))),
]

SOUND = [
    speech("Wav2Vec2"),
    speech("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}, note="layer norm"),
    speech("Wav2Vec2", cls="Wav2Vec2ForCTC", loss=read),
    speech("Hubert"),
    speech("WavLM"),
    speech("UniSpeech"),
    speech("UniSpeechSat"),
    speech("SEW", {"squeeze_factor": 2}),
    speech("SEWD", {"squeeze_factor": 2, "max_position_embeddings": 16, "position_buckets": 4}),
    speech("Data2VecAudio", {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}),
    speech("Wav2Vec2Conformer", {"depthwise_conv_kernel_size": 3}),
    speech("Wav2Vec2Bert", {"feature_projection_input_dim": 6, "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 4, "right_max_position_embeddings": 4}, inputs=partial(numbers, shape=(10, 6), name="input_features")),
    seq2seq("Speech2Text", {"num_conv_layers": 2, "conv_kernel_sizes": [3, 3], "conv_channels": 8, "input_feat_per_channel": 6, "max_source_positions": 20, "max_target_positions": 20}, kind="sound", inputs=together(partial(numbers, shape=(10, 6), name="input_features"), partial(words, length=5, name="decoder_input_ids"))),
    seq2seq("Whisper", {"num_mel_bins": 3, "max_source_positions": 5, "max_target_positions": 8}, kind="sound", inputs=together(partial(numbers, shape=(3, 10), name="input_features"), partial(words, length=5, name="decoder_input_ids"))),
    seq2seq("Moonshine", {"hidden_size": 8, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "intermediate_size": 12}, kind="sound", inputs=together(partial(numbers, shape=(1200,)), partial(words, length=5, name="decoder_input_ids"))),
    speech("AST", {"max_length": 16, "num_mel_bins": 8, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}, cls="ASTForAudioClassification", inputs=partial(numbers, shape=(16, 8))),
    other("ClapAudioModelWithProjection", "sound", partial(numbers, shape=(1, 64, 8), name="input_features"), partial(read, names=("audio_embeds",)), {"spec_size": 32, "num_mel_bins": 8, "window_size": 2, "hidden_size": 8, "patch_embeds_hidden_size": 4, "depths": [1, 1], "num_attention_heads": [2, 2], "patch_size": 4, "patch_stride": [4, 4], "projection_dim": 4, "enable_fusion": False, "num_hidden_layers": 2}, "ClapAudioConfig"),
    other("EncodecModel", "sound", partial(numbers, shape=(1, 64)), partial(read, names=("audio_values",)), {"num_filters": 2, "hidden_size": 8, "num_residual_layers": 1, "upsampling_ratios": [4, 2], "codebook_size": 8, "num_lstm_layers": 1, "kernel_size": 3, "last_kernel_size": 3, "sampling_rate": 1000, "target_bandwidths": [1.0]}, "EncodecConfig"),
    other("DacModel", "sound", partial(numbers, shape=(1, 64)), partial(read, names=("audio_values",)), {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 2], "upsampling_ratios": [2, 2], "n_codebooks": 2, "codebook_size": 8, "codebook_dim": 4}, "DacConfig"),
    other("VitsModel", "sound", words, partial(read, names=("waveform",)), {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 12, "flow_size": 8, "spectrogram_bins": 5, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "prior_encoder_num_wavenet_layers": 1, "posterior_encoder_num_wavenet_layers": 1, "prior_encoder_num_flows": 2, "duration_predictor_num_flows": 2, "duration_predictor_filter_channels": 8}, "VitsConfig"),
    speech("UniSpeech", cls="UniSpeechForCTC", loss=read),
]

CLIPTEXT = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 20, "projection_dim": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIPVISION = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4, "projection_dim": 6}
seen = together(words, pixels)


def _sub(name: str, **parts: Any) -> Callable[[], Any]:
    """The configuration of a class with configurations as parts."""

    def build() -> Any:
        import transformers

        return getattr(transformers, name)(**parts)

    return build


BOTH = [
    other("BlipForConditionalGeneration", "several", seen, read, build=_sub("BlipConfig", text_config={**CLIPTEXT, "encoder_hidden_size": 8}, vision_config=CLIPVISION)),
    other("BlipForImageTextRetrieval", "several", seen, partial(read, names=("itm_score",)), build=_sub("BlipConfig", text_config={**CLIPTEXT, "encoder_hidden_size": 8}, vision_config=CLIPVISION, image_text_hidden_size=6)),
    other("CLIPSegForImageSegmentation", "several", seen, read, build=_sub("CLIPSegConfig", text_config=CLIPTEXT, vision_config=CLIPVISION, projection_dim=6, extract_layers=[0, 1], reduce_dim=4, decoder_num_attention_heads=2, decoder_intermediate_size=8)),
    other("ViltForQuestionAnswering", "several", seen, read, {**TEXT, "image_size": 8, "patch_size": 4, "max_image_length": -1, "modality_type_vocab_size": 2, "num_labels": 3}, "ViltConfig"),
    other("VisualBertForPreTraining", "several", together(words, partial(numbers, shape=(3, 6), name="visual_embeds")), partial(read, names=("prediction_logits",)), {**TEXT, "visual_embedding_dim": 6}, "VisualBertConfig"),
    other("GitForCausalLM", "several", seen, partial(read, use_cache=False), {**TEXT, "vision_config": CLIPVISION}, "GitConfig"),
    other("LxmertForQuestionAnswering", "several", together(words, partial(numbers, shape=(3, 6), name="visual_feats"), partial(numbers, shape=(3, 4), name="visual_pos")), partial(read, names=("question_answering_score",)), {**TEXT, "l_layers": 1, "r_layers": 1, "x_layers": 1, "visual_feat_dim": 6, "num_qa_labels": 3}, "LxmertConfig"),
    other("BridgeTowerForImageAndTextRetrieval", "several", seen, read, build=_sub("BridgeTowerConfig", text_config={**TEXT}, vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)),
    other("LlavaForConditionalGeneration", "several", together(lambda b, g: {"input_ids": torch.cat([torch.full((b, 4), 3), torch.randint(4, VOCABULARY, (b, 6), generator=g)], 1)}, pixels), read, build=_sub("LlavaConfig", text_config={"model_type": "llama", **DECODER}, vision_config={"model_type": "clip_vision_model", **CLIPVISION}, image_token_index=3)),
    other("PaliGemmaForConditionalGeneration", "several", together(lambda b, g: {"input_ids": torch.cat([torch.full((b, 4), 3), torch.randint(4, VOCABULARY, (b, 6), generator=g)], 1)}, pixels), read, build=_sub("PaliGemmaConfig", text_config={"model_type": "gemma", **DECODER}, vision_config={"model_type": "siglip_vision_model", **CLIPVISION}, image_token_index=3, projection_dim=8, hidden_size=8)),
    other("Idefics3ForConditionalGeneration", "several", together(lambda b, g: {"input_ids": torch.cat([torch.full((b, 1), 3), torch.randint(4, VOCABULARY, (b, 6), generator=g)], 1)}, partial(pixels, more=(1,))), read, build=_sub("Idefics3Config", text_config={"model_type": "llama", **DECODER}, vision_config={"model_type": "idefics3_vision", **CLIPVISION}, image_token_id=3, scale_factor=2)),
    other("VisionEncoderDecoderModel", "several", together(pixels, partial(words, length=6, name="decoder_input_ids")), translated, build=lambda: _encoder_decoder()),
    other("EncoderDecoderModel", "several", pairs, translated, build=lambda: _encoder_decoder("BertConfig")),
    other("OwlViTForObjectDetection", "several", together(lambda b, g: {"input_ids": torch.randint(4, VOCABULARY, (b, 6), generator=g)}, pixels), partial(read, names=("logits", "pred_boxes")), build=_sub("OwlViTConfig", text_config={**CLIPTEXT, "projection_dim": 8}, vision_config=CLIPVISION, projection_dim=8)),
    other("DetrForObjectDetection", "several", partial(pixels, side=32), partial(read, names=("logits", "pred_boxes")), build=lambda: _detr("DetrConfig")),
    other("TableTransformerForObjectDetection", "several", partial(pixels, side=32), partial(read, names=("logits", "pred_boxes")), build=lambda: _detr("TableTransformerConfig")),
    other("ConditionalDetrForObjectDetection", "several", partial(pixels, side=32), partial(read, names=("logits", "pred_boxes")), build=lambda: _detr("ConditionalDetrConfig")),
    image("Perceiver", {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 8}, cls="PerceiverForImageClassificationLearned", inputs=partial(pixels, name="inputs")),
    encoder("Perceiver", {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}, inputs=partial(words, length=20, name="inputs"), loss=a_class),
]


def _encoder_decoder(encoder: str = "ViTConfig") -> Any:
    import transformers

    first = getattr(transformers, encoder)(**(IMAGE if encoder == "ViTConfig" else TEXT))
    second = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    cls = transformers.VisionEncoderDecoderConfig if encoder == "ViTConfig" else transformers.EncoderDecoderConfig
    return cls.from_encoder_decoder_configs(first, second)


def _detr(name: str) -> Any:
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"])
    return getattr(transformers, name)(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_queries=3, num_labels=2)


def _series(*names: str) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    shapes = {"past_values": (12,), "past_time_features": (12, 2), "past_observed_mask": (12,), "future_values": (4,), "future_time_features": (4, 2)}

    def make(size: int, generator: torch.Generator) -> dict[str, Tensor]:
        made = {name: torch.randn(size, *shapes[name], generator=generator) for name in names}
        return {k: torch.ones_like(v) if k == "past_observed_mask" else v for k, v in made.items()}

    return make


FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3, 4], "num_time_features": 2, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
FUTURE = _series("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
SERIES = [
    other("TimeSeriesTransformerForPrediction", "time series", FUTURE, partial(read, names=("params",)), FORECAST, "TimeSeriesTransformerConfig"),
    other("InformerForPrediction", "time series", FUTURE, partial(read, names=("params",)), FORECAST, "InformerConfig"),
    other("AutoformerForPrediction", "time series", FUTURE, partial(read, names=("params",)), {**FORECAST, "moving_average": 3, "label_length": 4}, "AutoformerConfig"),
    other("PatchTSTForPrediction", "time series", partial(numbers, shape=(16, 2), name="past_values"), partial(read, names=("prediction_outputs",)), {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12, "prediction_length": 4, "loss": "mse"}, "PatchTSTConfig"),
    other("PatchTSMixerForPrediction", "time series", partial(numbers, shape=(16, 2), name="past_values"), partial(read, names=("prediction_outputs",)), {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8, "num_layers": 2, "prediction_length": 4, "loss": "mse"}, "PatchTSMixerConfig"),
    other("TimesFmModelForPrediction", "time series", partial(numbers, shape=(16,), name="past_values"), partial(read, names=("mean_predictions",)), {"patch_length": 4, "context_length": 16, "horizon_length": 4, "freq_size": 3, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12, "head_dim": 4, "num_attention_heads": 2, "quantiles": [0.5]}, "TimesFmConfig"),
    other("DecisionTransformerModel", "time series", lambda b, g: {"states": torch.randn(b, 4, 3, generator=g), "actions": torch.randn(b, 4, 2, generator=g), "rewards": torch.randn(b, 4, 1, generator=g), "returns_to_go": torch.randn(b, 4, 1, generator=g), "timesteps": torch.arange(4).repeat(b, 1), "attention_mask": torch.ones(b, 4, dtype=torch.long)}, partial(read, names=("action_preds", "state_preds", "return_preds")), {"state_dim": 3, "act_dim": 2, "hidden_size": 8, "max_ep_len": 8, "n_layer": 2, "n_head": 2, "n_positions": 20}, "DecisionTransformerConfig"),
    decoder("ReformerModelWithLMHead", {"hidden_size": 8, "axial_pos_shape": [2, 4], "axial_pos_embds_dim": [4, 4], "attn_layers": ["local", "lsh"], "feed_forward_size": 12, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_hashes": 1, "attention_head_size": 4, "is_decoder": True, "num_buckets": 2}, config="ReformerConfig", loss=next_token),
]

ARCHITECTURES: tuple[Architecture, ...] = (*ENCODERS, *DECODERS, *EXPERTS, *TRANSLATORS, *VISION, *SOUND, *BOTH, *SERIES)
