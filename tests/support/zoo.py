"""The catalogue of small real models: unmodified, from configuration, with random weights.

Shapes: B examples, T positions. Widths of 8, two layers, B = 4 and mostly T = 6; ``square`` ones have
T = B, so that a dimension that is not the batch looks like it.
"""
# One model is one line, however long: a table is read down its columns.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.workloads.blocks import checkpoint_blocks
from tests.support.case import BATCH_SIZE, VOCABULARY, Batch, Case, Wrap

CHECKPOINTS = ("reentrant", "non-reentrant")
# transformers computes root mean squares, rotations or routes in float32 whatever it is given
SINGLE = {torch.float32: 1e-5, torch.float64: 2e-6}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16}
IMAGE = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 2}
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)


@dataclass(frozen=True)
class Refusal:
    """What the engine says of a model that it does not cover.

    Attributes:
        says: a pattern of the message.
        remedy: what a user can do.
    """

    says: str
    remedy: str


@dataclass(frozen=True, eq=False)
class Model(Case):
    """A case that is a model people have.

    Attributes:
        title: the class as its library calls it, and what is special about it; empty for a variant
            that is tested and not listed.
        trained: which parameters are trained.
        refusal: None where the engine is exact.
        variants: the same model with other attention (``eager``) or its activations recomputed.
    """

    title: str = ""
    trained: str = "all"
    refusal: Refusal | None = None
    variants: Mapping[str, Model] = field(default_factory=dict)


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of every next token, (B,)."""
    logits = _logits(model, input_ids=batch["x"], use_cache=False)[:, :-1]
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), batch["x"][:, 1:], reduction="none").mean(1)


def masked_class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a made-up class of each text, its last token masked, (B,)."""
    mask = torch.ones_like(batch["x"])
    mask[:, -1] = 0
    logits = _logits(model, input_ids=batch["x"], attention_mask=mask)
    return batch["scale"] * F.cross_entropy(logits, batch["x"][:, 0] % logits.shape[1], reduction="none")


def token_class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a made-up class of every token, (B,)."""
    logits = _logits(model, input_ids=batch["x"])
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), batch["x"] % 2, reduction="none").mean(1)


def image_class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a made-up class of each image, (B,)."""
    return _class_loss(_logits(model, pixel_values=batch["x"]), batch)


def sound_class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a made-up class of each spectrogram, (B,)."""
    return _class_loss(_logits(model, input_features=batch["x"]), batch)


def translation_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the input's tokens, reversed, (B,)."""
    target = batch["x"].flip(1)
    logits = _logits(model, input_ids=batch["x"], decoder_input_ids=target.roll(1, 1), use_cache=False)
    return batch["scale"] * F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Each image against the texts of all examples, (B,): no example has a loss of its own."""
    texts = batch["x"].flatten(1)[:, :6].abs().mul(10).long() % VOCABULARY
    output = model(input_ids=texts, pixel_values=batch["x"], return_dict=True)
    target = torch.arange(len(texts))
    return batch["scale"] * F.cross_entropy(output.logits_per_image, target, reduction="none")


def _logits(model: nn.Module, **forward: Any) -> Tensor:
    return model(**forward, return_dict=True).logits


def _class_loss(logits: Tensor, batch: Batch) -> Tensor:
    label = (batch["x"].flatten(1).sum(1) > 0).long()
    return batch["scale"] * F.cross_entropy(logits, label, reduction="none")


def _hf(name: str, config: str, checkpoint: str = "none", **settings: Any) -> nn.Module:
    """A model of transformers by its class and its configuration's."""
    import transformers

    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    if checkpoint != "none":
        model.activation_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
    return model


def _text(**settings: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}


def _gpt2(**settings: Any) -> nn.Module:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _hf("GPT2LMHeadModel", "GPT2Config", **{**_text(n_positions=16, n_embd=8, n_layer=2, n_head=2), **dropout, **settings})  # fmt: skip


def _bert(family: str = "Bert", task: str = "SequenceClassification", **settings: Any) -> nn.Module:
    sizes = _text(**BERT, **NO_DROPOUT, max_position_embeddings=20)
    return _hf(f"{family}For{task}", f"{family}Config", **{**sizes, **settings})


def _bert_without_use_of_pooler() -> nn.Module:
    from transformers import BertModel

    model = _bert(task="TokenClassification")
    model.bert = BertModel(model.config, add_pooling_layer=True)
    return model


def _distilbert(**settings: Any) -> nn.Module:
    sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    return _hf("DistilBertForSequenceClassification", "DistilBertConfig", **{**_text(**sizes, **dropout), **settings})


def _deberta(**settings: Any) -> nn.Module:
    kind = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0, "pooler_dropout": 0.0, "pooler_hidden_size": 8}  # fmt: skip
    return _bert("DebertaV2", **{**kind, **settings})


def _t5(**settings: Any) -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8}
    return _hf("T5ForConditionalGeneration", "T5Config", **{**_text(**sizes, dropout_rate=0.0, decoder_start_token_id=0), **settings})  # fmt: skip


def _bart(**settings: Any) -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16}  # fmt: skip
    special = {"dropout": 0.0, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return _hf("BartForConditionalGeneration", "BartConfig", **{**_text(**sizes, **special), **settings})


def _causal(family: str, **settings: Any) -> nn.Module:
    return _hf(f"{family}ForCausalLM", f"{family}Config", **{**_text(**LLAMA), **settings})


def _mixtral(**settings: Any) -> nn.Module:
    # the grouped matrix product that is the default knows no float64
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return _causal("Mixtral", **{**experts, **settings})


def _image(family: str, **settings: Any) -> nn.Module:
    return _hf(f"{family}ForImageClassification", f"{family}Config", **{**BERT, **NO_DROPOUT, **IMAGE, **settings})


def _beit(**settings: Any) -> nn.Module:
    return _image("Beit", drop_path_rate=0.0, layer_scale_init_value=0.5, **settings)


def _swin(**settings: Any) -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2, "num_labels": 2}  # fmt: skip
    return _hf("SwinForImageClassification", "SwinConfig", **{**sizes, **NO_DROPOUT, "drop_path_rate": 0.0, **settings})


def _convnext(**settings: Any) -> nn.Module:
    sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 2, "layer_scale_init_value": 0.5}  # fmt: skip
    return _hf("ConvNextForImageClassification", "ConvNextConfig", **{**sizes, **settings})


def _whisper(**settings: Any) -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_mel_bins": 3, "max_source_positions": 5, "max_target_positions": 8, "classifier_proj_size": 6, "num_labels": 2}  # fmt: skip
    special = {"dropout": 0.0, "decoder_start_token_id": 1}
    return _hf("WhisperForAudioClassification", "WhisperConfig", **{**_text(**sizes, **special), **settings})


def _clip(name: str = "CLIPForImageClassification", **settings: Any) -> nn.Module:
    vision = {**BERT, "image_size": 4, "patch_size": 2, "num_channels": 1, "projection_dim": 6}
    text = {**_text(**BERT), "max_position_embeddings": 8, "projection_dim": 6}
    return _hf(name, "CLIPConfig", **{"vision_config": vision, "text_config": text, "projection_dim": 6, "num_labels": 2, **settings})  # fmt: skip


def _resnet(norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "layer_type": "basic", "num_labels": 2}  # fmt: skip
    model = _hf("ResNetForImageClassification", "ResNetConfig", **sizes)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if norm and isinstance(child, nn.BatchNorm2d):
                setattr(module, name, norm(child.num_features))
    return model


def _frozen(build: Callable[..., nn.Module], *parts: str) -> Callable[..., nn.Module]:
    """The model with the parameters frozen whose names start so."""

    def make(**settings: Any) -> nn.Module:
        model = build(**settings)
        for name, parameter in model.named_parameters():
            if name.startswith(parts):
                parameter.requires_grad_(False)
        return model

    return make


def _only(build: Callable[..., nn.Module], *parts: str) -> Callable[..., nn.Module]:
    """The model with every parameter frozen whose name has none of these parts."""

    def make(**settings: Any) -> nn.Module:
        model = build(**settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model

    return make


def _lora(build: Callable[..., nn.Module], *targets: str, **lora: Any) -> Callable[..., nn.Module]:
    """The model with low-rank adapters of PEFT on the modules so named, and the rest frozen."""

    def make(**settings: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), lora_dropout=0.0, **lora)
        model: nn.Module = get_peft_model(build(**settings), adapters)
        return model

    return make


def _transformer(batch_first: bool, **settings: Any) -> nn.Module:
    core = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=batch_first, **settings)
    if batch_first:
        return Wrap(lambda m, x: m.core(x, m.start(x.flip(1))), core=core, start=nn.Linear(8, 8))
    return Wrap(
        lambda m, x: m.core(x.transpose(0, 1), m.start(x.flip(1)).transpose(0, 1)).transpose(0, 1),
        core=core,
        start=nn.Linear(8, 8),
    )


def _encoder(batch_first: bool, layers: int = 2, **settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first, **settings)
    core = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return _between(core, batch_first)


def _between(core: nn.Module, batch_first: bool, width: int = 8) -> nn.Module:
    """A Linear layer, the module in its own layout, and a Linear layer over its outputs, (B, T, 6) to (B, T, 3)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.core(x if batch_first else x.transpose(0, 1))
        y = y[0] if isinstance(y, tuple) else y
        return m.head(y if batch_first else y.transpose(0, 1))

    return Wrap(forward, stem=nn.Linear(6, 8), core=core, head=nn.Linear(width, 3))


def _attention(batch_first: bool, **settings: Any) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x) if batch_first else m.stem(x).transpose(0, 1)
        y = m.core(x, x, x, need_weights=False)[0]
        return m.head(y if batch_first else y.transpose(0, 1))

    core = nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings)
    return Wrap(forward, stem=nn.Linear(6, 8), core=core, head=nn.Linear(8, 3))


def _recurrent(cls: Callable[..., nn.RNNBase], batch_first: bool, **settings: Any) -> nn.Module:
    core = cls(8, 5, batch_first=batch_first, **settings)
    return _between(core, batch_first, 10 if settings.get("bidirectional") else 5)


def _reader(cls: Callable[..., nn.RNNBase]) -> nn.Module:
    """An embedding, a recurrent layer and a Linear layer on its last state, (B, T) to (B, 3)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        states = m.core(m.embed(x))[1]
        return m.head((states[0] if isinstance(states, tuple) else states)[-1])

    return Wrap(forward, embed=nn.Embedding(VOCABULARY, 6), core=cls(6, 5, batch_first=True), head=nn.Linear(5, 3))


class Experts(nn.Module):
    """Linear layers of which each token takes the one that the gate says, weighted by the gate."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        weights = self.gate(x).softmax(-1).flatten(0, 1)
        tokens, chosen, output = x.flatten(0, 1), weights.argmax(-1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                output = output.index_add(0, rows, expert(tokens[rows]) * weights[rows, number, None])
        return output.view_as(x)


class ChoosingExperts(Experts):
    """Each expert takes as many tokens of the whole batch as there are examples: those that the gate scores highest for it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        weights = self.gate(x).softmax(-1).flatten(0, 1)
        tokens, output = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            rows = weights[:, number].topk(len(x)).indices
            output = output.index_add(0, rows, expert(tokens[rows]) * weights[rows, number, None])
        return output.view_as(x)


def _with_blocks(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def make() -> nn.Module:
        model = build()
        checkpoint_blocks(model)
        return model

    return make


def _family(model: Model, *kinds: str, refusals: Mapping[str, Refusal] | None = None) -> Model:
    """The model with its variants: its ``build`` takes ``checkpoint`` and ``attn_implementation``.

    The kind ``blocks`` is the package's own way to recompute blocks.
    """
    settings = {"eager": {"attn_implementation": "eager"}, **{kind: {"checkpoint": kind} for kind in CHECKPOINTS}}
    variants = {
        kind: replace(
            model,
            name=f"{model.name}-{kind}",
            build=_with_blocks(model.build) if kind == "blocks" else partial(model.build, **settings[kind]),
            title="",
            refusal=(refusals or {}).get(kind, model.refusal),
        )
        for kind in kinds
    }
    return replace(model, variants=variants)


HF = ("eager", *CHECKPOINTS)
T5_BIASES = tuple(
    f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")
)
NON_REENTRANT = "checkpoint with `use_reentrant=False`"
OWNER = Refusal("runs again in backward", "use `groupsearch.workloads.blocks.checkpoint_blocks`")
WITHOUT = Refusal("runs again in backward", "train without")


def _text_models() -> list[Model]:
    words: dict[str, Any] = {"shape": (6,), "tokens": True}
    square: dict[str, Any] = {"shape": (BATCH_SIZE,), "tokens": True}
    next_word = {**words, "loss": next_token_loss}
    classes = {**words, "loss": masked_class_loss}
    translation = {**words, "loss": translation_loss}
    across_blocks = {"reentrant": Refusal("runs again in backward", NON_REENTRANT)}

    def causal(family: str, title: str, **settings: Any) -> Model:
        model = Model(family.lower(), partial(_causal, family), **next_word, tolerance=SINGLE, title=title, **settings)
        return _family(model, *HF)

    return [
        _family(Model("gpt2", _gpt2, **next_word, title="GPT2LMHeadModel, head tied"), *HF),
        Model("gpt2-square", _gpt2, **square, loss=next_token_loss),
        Model("gpt2-untied", partial(_gpt2, tie_word_embeddings=False), **next_word, title="GPT2LMHeadModel, head untied"),
        _family(Model("bert", _bert, **classes, title="BertForSequenceClassification"), *HF),
        Model("bert-square", _bert, **square, loss=masked_class_loss),
        _family(Model("bert-masked", partial(_bert, task="MaskedLM"), **next_word, title="BertForMaskedLM, head tied"), *HF),
        Model("bert-unused-pooler", _bert_without_use_of_pooler, **words, loss=token_class_loss, title="BertForTokenClassification, with an unused pooler", refusal=Refusal("no use of these trainable parameters: bert.pooler", "freeze the pooler")),
        _family(Model("roberta", partial(_bert, "Roberta"), **classes, opacus=True, title="RobertaForSequenceClassification"), *HF),
        _family(Model("distilbert", _distilbert, **classes, title="DistilBertForSequenceClassification"), *HF),
        _family(Model("deberta", _deberta, **classes, title="DebertaV2ForSequenceClassification, relative positions"), *CHECKPOINTS, refusals={"reentrant": Refusal("graph a second time", "train without"), "non-reentrant": WITHOUT}),
        Model("deberta-unshared", partial(_deberta, norm_rel_ebd="none", share_att_key=False), **classes, title="DebertaV2ForSequenceClassification, relative positions unshared"),
        _family(Model("deberta-absolute", partial(_deberta, relative_attention=False, norm_rel_ebd="none", position_biased_input=True), **classes, title="DebertaV2ForSequenceClassification, absolute positions"), *CHECKPOINTS),
        _family(Model("t5", _t5, **translation, tolerance=SINGLE, whole=T5_BIASES, title="T5ForConditionalGeneration, head tied"), *HF, refusals=across_blocks),
        Model("t5-square", _t5, **square, loss=translation_loss, tolerance=SINGLE, whole=T5_BIASES),
        _family(Model("bart", _bart, **translation, title="BartForConditionalGeneration, head tied"), *HF),
        causal("Llama", "LlamaForCausalLM", opacus=True),
        causal("Qwen3", "Qwen3ForCausalLM"),
        causal("Mistral", "MistralForCausalLM"),
        causal("Gemma", "GemmaForCausalLM, head tied"),
        _family(Model("mixtral", _mixtral, **next_word, tolerance=SINGLE, title="MixtralForCausalLM, 2 of 4 experts per token"), *HF),
        Model("mixtral-batched", partial(_mixtral, experts_implementation="batched_mm"), **next_word, tolerance=SINGLE),
        Model("mixtral-square", _mixtral, **square, loss=next_token_loss, tolerance=SINGLE),
    ]  # fmt: skip


def _other_models() -> list[Model]:
    small: dict[str, Any] = {"shape": (1, 4, 4), "loss": image_class_loss}
    larger: dict[str, Any] = {"shape": (1, 8, 8), "loss": image_class_loss}
    sound: dict[str, Any] = {"shape": (3, 10), "loss": sound_class_loss}
    beit, clip = "BeitForImageClassification", "CLIPForImageClassification"
    unused = "vision_model.post_layernorm"
    contrastive, one_by_one = partial(_clip, "CLIPModel"), "use a loss that does not compare examples with each other"
    relative = {"drop_path_rate": 0.0, "layer_scale_init_value": 0.0, "use_relative_position_bias": True}
    recomputed = {"reentrant": Refusal("runs again in backward", NON_REENTRANT)}

    def group_norm(channels: int) -> nn.Module:
        return nn.GroupNorm(2, channels)

    return [
        _family(Model("vit", partial(_image, "ViT"), **small, opacus=True, title="ViTForImageClassification"), *HF),
        _family(Model("beit", _beit, **small, title=f"{beit}, layer scale"), *HF, "blocks", refusals=dict.fromkeys(CHECKPOINTS, OWNER)),
        _family(Model("beit-relative", partial(_image, "Beit", **relative), **small, title=f"{beit}, relative positions"), *HF, refusals=recomputed),
        _family(Model("beit-shared", partial(_beit, use_shared_relative_position_bias=True, use_absolute_position_embeddings=True), **small, whole=("beit.shared_position_bias.relative_position_bias_table",), title=f"{beit}, layer scale, shared relative positions"), *HF, "blocks", refusals=dict.fromkeys(CHECKPOINTS, OWNER)),
        _family(Model("deit", partial(_image, "DeiT"), **small, title="DeiTForImageClassification"), *HF),
        _family(Model("swin", _swin, **larger, title="SwinForImageClassification"), *HF),
        Model("convnext", _convnext, **larger, title="ConvNextForImageClassification"),
        _family(Model("whisper", _whisper, **sound, title="WhisperForAudioClassification"), *HF),
        Model("whisper-layer-sum", partial(_whisper, use_weighted_layer_sum=True), **sound, title="WhisperForAudioClassification, weighted sum of layers"),
        Model("clip", _clip, **small, title=clip, refusal=Refusal(f"no use of these trainable parameters: {unused}", f"freeze `{unused}`, which the class never uses")),
        _family(Model("clip-frozen", _frozen(_clip, unused), **small, title=clip, trained="all but the unused norm"), *HF),
        Model("clip-contrastive", contrastive, (1, 4, 4), loss=contrastive_loss, title="CLIPModel, contrastive loss", refusal=Refusal("no dimension belongs to the examples", one_by_one)),
        Model("clip-contrastive-frozen", _frozen(contrastive, "logit_scale"), (1, 4, 4), loss=contrastive_loss, refusal=Refusal("depends on the other examples", one_by_one)),
        Model("resnet-groupnorm", partial(_resnet, group_norm), (1, 16, 16), loss=image_class_loss, title="ResNetForImageClassification, its norms replaced by GroupNorm"),
        Model("resnet", _resnet, **larger, title="ResNetForImageClassification", refusal=Refusal("BatchNorm2d, which mixes the examples", "replace BatchNorm by GroupNorm")),
    ]  # fmt: skip


def _tuned_models() -> list[Model]:
    words: dict[str, Any] = {"shape": (6,), "tokens": True}
    image: dict[str, Any] = {"shape": (1, 4, 4), "loss": image_class_loss}
    adapters, biases = "LoRA adapters (PEFT)", "biases and head"
    vit = partial(_image, "ViT")
    return [
        _family(Model("gpt2-lora", _lora(_gpt2, "c_attn", "c_proj", fan_in_fan_out=True), **words, loss=next_token_loss, title="GPT2LMHeadModel", trained=adapters), *HF),
        _family(Model("llama-lora", _lora(partial(_causal, "Llama"), "q_proj", "v_proj", "down_proj"), **words, loss=next_token_loss, tolerance=SINGLE, title="LlamaForCausalLM", trained=adapters), *HF),
        _family(Model("vit-lora", _lora(vit, "q_proj", "v_proj", modules_to_save=["classifier"]), **image, title="ViTForImageClassification", trained=f"{adapters} and head"), *HF),
        _family(Model("bert-biases", _only(_bert, "bias", "classifier"), **words, loss=masked_class_loss, title="BertForSequenceClassification", trained=biases), *HF),
        _family(Model("vit-biases", _only(vit, "bias", "classifier"), **image, title="ViTForImageClassification", trained=biases), *HF),
        Model("vit-head", _only(vit, "classifier"), **image, title="ViTForImageClassification", trained="head"),
    ]  # fmt: skip


def _both_layouts(name: str, build: Callable[..., nn.Module], shape: tuple[int, ...], title: str = "", **settings: Any) -> list[Model]:  # fmt: skip
    """The model with its inner part given (B, T, d), and given (T, B, d)."""
    return [
        Model(f"{name}-{layout.replace(' ', '-')}", partial(build, batch_first=first), shape, title=title and f"{title}, {layout}", **settings)
        for first, layout in ((True, "batch first"), (False, "time first"))
    ]  # fmt: skip


def _torch_models() -> list[Model]:
    long, square = (6, 6), (BATCH_SIZE, 6)
    cross = tuple(f"core.decoder.layers.0.multihead_attn.in_proj_{part}" for part in ("weight", "bias"))
    models = [
        *_both_layouts("transformer", _transformer, (6, 8), "nn.Transformer", whole=cross),
        *_both_layouts("transformer-encoder", _encoder, long, "nn.TransformerEncoder"),
        *_both_layouts("transformer-encoder-square", _encoder, square),
        *_both_layouts("attention", _attention, long, "nn.MultiheadAttention"),
        *_both_layouts("attention-square", partial(_attention, bias=False, add_bias_kv=True), square),
        Model("experts", lambda: Wrap(lambda m, x: m.head(m.moe(x)), moe=Experts(6, 3), head=nn.Linear(6, 3)), (12, 6), title="nn.Linear, as experts of which each token takes one"),
        Model("experts-choose", lambda: Wrap(lambda m, x: m.head(m.moe(x)), moe=ChoosingExperts(6, 3), head=nn.Linear(6, 3)), (12, 6), title="nn.Linear, as experts that choose among the tokens of the batch", refusal=Refusal("depends on the other", "let tokens choose their experts")),
        Model("experts-alone", partial(Experts, 6, 3), (12, 6), title="nn.Linear, as experts, the model itself"),
    ]  # fmt: skip
    for cls in (nn.LSTM, nn.GRU):
        name, title, build = cls.__name__.lower(), f"nn.{cls.__name__}", partial(_recurrent, cls)
        models += [
            *_both_layouts(name, build, long, title),
            *_both_layouts(f"{name}-deep", partial(build, num_layers=2, bidirectional=True), long, f"{title}, 2 layers, both directions"),
            *_both_layouts(f"{name}-square", build, square),
            Model(f"{name}-text", partial(_reader, cls), (6,), tokens=True, title=f"{title}, over an embedding, last state"),
        ]  # fmt: skip
    return models


LISTED: dict[str, Model] = {
    model.name: model
    for models in (_text_models, _other_models, _tuned_models, _torch_models)
    for model in models()
}  # fmt: skip
MODELS: dict[str, Model] = {
    model.name: model for listed in LISTED.values() for model in (listed, *listed.variants.values())
}
MODEL_CASES: dict[str, Case] = {
    name: MODELS[name]
    for name in ("gpt2", "gpt2-square", "gpt2-reentrant", "gpt2-non-reentrant", "bert", "bert-square", "roberta", "t5", "t5-square", "llama", "vit", "vit-eager")
}  # fmt: skip
