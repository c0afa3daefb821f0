"""One catalogue of small models: every kind of layer, every way parameters are shared, frozen or hidden.

Shapes: B examples, T positions, d inputs, p outputs. B is 4 unless a test asks otherwise, and several
cases have T = 4 as well, so that a dimension that is not the batch looks like it.
"""
# One case is one line, however long: a table is read down its columns.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.case import BATCH_SIZE as BATCH_SIZE
from tests.support.case import VOCABULARY, Case, Checkpointed, Wrap
from tests.support.case import plain as plain
from tests.support.case import readout as readout
from tests.support.zoo import MODEL_CASES as MODEL_CASES


class Residual(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm residual branch."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Single-head self-attention whose query, key and value read one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Every position attends to every position."""
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class LoRA(nn.Module):
    """A frozen Linear with a trainable low-rank branch (arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.weight = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Frozen part plus the low-rank one."""
        return self.weight(x) + self.up(self.down(x))


class EinsumExperts(nn.Module):
    """A bare three-dimensional weight used by einsum, next to a bare bias; neither has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 4) to (B, 3, 2)."""
        return torch.einsum("bhi,hio->bho", x, self.weight) + self.bias


class PairOut(nn.Module):
    """A bare weight, an argument that is no tensor, and two outputs of which one may go unused."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor, power: int = 1) -> tuple[Tensor, Tensor]:
        """(B, T, 6) to two of (B, T, 5)."""
        y = F.linear(x, self.weight)
        return y**power, y.sum(-1)


def _sequence(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*deepcopy(modules))


def _sandwich(layer: Callable[[], nn.Module], width: int = 6) -> Callable[[], nn.Module]:
    """The layer between two Linear layers, so that it receives and passes on gradients."""
    return lambda: nn.Sequential(nn.Linear(width, width), layer(), nn.Tanh())


def _freeze(build: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    """The model with the parameters whose names start so frozen."""

    def make() -> nn.Module:
        model = build()
        for name, parameter in model.named_parameters():
            if name.startswith(names):
                parameter.requires_grad_(False)
        return model

    return make


def _tie(build: Callable[[], nn.Module], first: str, second: str) -> Callable[[], nn.Module]:
    """The model whose module ``second`` has the weight of ``first``."""

    def make() -> nn.Module:
        model = build()
        model.get_submodule(second).weight = model.get_submodule(first).weight
        return model

    return make


def _linear_cases() -> list[Case]:
    from transformers.pytorch_utils import Conv1D

    return [
        Case("linear-2d", _sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,), opacus=True),
        Case("linear-2d-no-bias", _sequence(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)), (6,), opacus=True),
        Case("linear-3d", _sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (4, 6), opacus=True),
        Case("linear-3d-long", _sequence(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), (9, 3), opacus=True),
        Case("linear-4d", _sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (2, 3, 6), opacus=True),
        Case("linear-5d", _sequence(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (2, 1, 3, 6)),
        Case("linear-transposed-input", lambda: Wrap(lambda m, x: m.a(x.transpose(1, 2)), a=nn.Linear(4, 3)), (4, 5)),
        Case("linear-keyword", lambda: Wrap(lambda m, x: m.b(input=m.a(input=x)), a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (6,)),
        Case("linear-alone", lambda: nn.Linear(6, 5), (6,), opacus=True),
        Case("linear-scalar-output", _sequence(nn.Linear(6, 1), nn.Flatten(0)), (6,), opacus=True),
        Case("linear-relu-in-place", _sequence(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (6,)),
        Case("linear-add-in-place", lambda: Wrap(lambda m, x: m.b(m.a(x).add_(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 3)), (4, 6)),
        Case("hf-conv1d", lambda: nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(3, 5)), (4, 6)),
        Case("hf-conv1d-2d", lambda: nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(3, 5)), (6,)),
        Case("bitfit", _freeze(_sequence(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "0.weight", "1.weight", "2.weight"), (4, 6)),
        Case("bitfit-2d", _freeze(_sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "2.weight"), (6,)),
        Case("biases-frozen", _freeze(_sequence(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "0.bias", "1.bias", "2.bias"), (4, 6)),
    ]  # fmt: skip


def _convolution_cases() -> list[Case]:
    def conv(name: str, layer: nn.Module, shape: tuple[int, ...], opacus: bool = False) -> Case:
        return Case(name, _sequence(layer, nn.Tanh()), shape, opacus=opacus)

    image = (4, 7, 6)
    modes = ("reflect", "replicate", "circular")
    return [
        conv("conv1d", nn.Conv1d(3, 5, 3), (3, 8), opacus=True),
        conv("conv1d-groups-stride-dilation", nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1), (4, 9), opacus=True),
        conv("conv1d-circular-same", nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (4, 9)),
        conv("conv2d", nn.Conv2d(4, 5, 3, padding=1), image, opacus=True),
        conv("conv2d-no-bias-stride", nn.Conv2d(4, 5, (3, 2), stride=(2, 3), bias=False), image, opacus=True),
        conv("conv2d-uneven-stride", nn.Conv2d(4, 5, 2, stride=4), image),
        conv("conv2d-groups", nn.Conv2d(4, 6, 3, groups=2, padding=(0, 2)), image, opacus=True),
        conv("conv2d-depthwise", nn.Conv2d(4, 8, 3, groups=4, padding=1), image, opacus=True),
        conv("conv2d-dilation", nn.Conv2d(4, 5, 2, dilation=(2, 3)), image, opacus=True),
        conv("conv2d-same", nn.Conv2d(4, 5, 3, padding="same"), image, opacus=True),
        conv("conv2d-same-even-dilation", nn.Conv2d(4, 5, (2, 4), padding="same", dilation=(1, 2)), image),
        conv("conv2d-valid", nn.Conv2d(4, 5, 3, padding="valid"), image),
        *(conv(f"conv2d-{mode}", nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode=mode), image) for mode in modes),
        conv("conv2d-reflect-groups-stride", nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, padding_mode="reflect"), image),
        conv("conv2d-1x1", nn.Conv2d(4, 5, 1), image),
        conv("conv2d-patches", nn.Conv2d(4, 5, 2, stride=2), (4, 4, 4)),
        conv("conv3d", nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3), opacus=True),
        conv("conv3d-groups-stride", nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1), groups=2), (2, 3, 4, 3)),
        conv("conv3d-replicate", nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 3, 4, 3)),
        Case("bitfit-conv", _freeze(_sequence(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2)), "0.weight", "1.weight", "2.weight"), image),
        Case("conv-relu-in-place", _sequence(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2)), image),
        Case("conv-channels-last", lambda: Wrap(lambda m, x: m.b(m.a(x.contiguous(memory_format=torch.channels_last)).tanh()), a=nn.Conv2d(4, 5, 3), b=nn.Conv2d(5, 2, 2)), image),
    ]  # fmt: skip


def _embedding_cases() -> list[Case]:
    def position_ids(m: Any, x: Tensor) -> Tensor:
        return m.word(x) + m.position(torch.arange(x.shape[1]).unsqueeze(0))

    def flat_ids(m: Any, x: Tensor) -> Tensor:
        return m.word(x) + m.position(torch.arange(x.shape[1]))

    def table(rows: int = VOCABULARY, **settings: Any) -> nn.Embedding:
        return nn.Embedding(rows, 5, **settings)

    linear = nn.Linear(5, 3)
    return [
        Case("embedding", _sequence(table(), nn.Linear(5, 3)), (6,), tokens=True, opacus=True),
        Case("embedding-alone", lambda: nn.Embedding(VOCABULARY, 5), (6,), tokens=True),
        Case("embedding-one-id", _sequence(table(), nn.Linear(5, 3)), (), tokens=True),
        Case("embedding-2d-ids", _sequence(table(), nn.Linear(5, 3)), (4, 3), tokens=True),
        Case("embedding-padding", _sequence(table(padding_idx=2), nn.Linear(5, 3)), (7,), tokens=True),
        Case("embedding-negative-padding", _sequence(table(padding_idx=-1), nn.Linear(5, 3)), (30,), tokens=True),
        Case("embedding-repeated", _sequence(table(), nn.Linear(5, 3)), (40,), tokens=True, opacus=True),
        Case("embedding-frequency-scaled-off", _sequence(table(scale_grad_by_freq=False), nn.Linear(5, 3)), (6,), tokens=True),
        Case("positions-broadcast", lambda: Wrap(lambda m, x: m.head(position_ids(m, x)), word=table(), position=table(9), head=deepcopy(linear)), (6,), tokens=True),
        Case("positions-broadcast-square", lambda: Wrap(lambda m, x: m.head(position_ids(m, x)), word=table(), position=table(9), head=deepcopy(linear)), (4,), tokens=True),
        Case("positions-without-batch-square", lambda: Wrap(lambda m, x: m.head(flat_ids(m, x)), word=table(), position=table(9), head=deepcopy(linear)), (4,), tokens=True),
        Case("positions-without-batch", lambda: Wrap(lambda m, x: m.head(flat_ids(m, x)), word=table(), position=table(9), head=deepcopy(linear)), (6,), tokens=True),
    ]  # fmt: skip


def _norm_cases() -> list[Case]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    single = {torch.float32: 1e-5, torch.float64: 2e-6}
    return [
        Case("layernorm", _sandwich(lambda: nn.LayerNorm(6)), (4, 6), opacus=True),
        Case("layernorm-2d-input", _sandwich(lambda: nn.LayerNorm(6)), (6,), opacus=True),
        Case("layernorm-two-dims", _sandwich(lambda: nn.LayerNorm((3, 6))), (3, 6), opacus=True),
        Case("layernorm-two-dims-positions", _sandwich(lambda: nn.LayerNorm((3, 6))), (2, 3, 6)),
        Case("layernorm-no-bias", _sandwich(lambda: nn.LayerNorm(6, bias=False)), (4, 6)),
        Case("layernorm-not-affine", _sandwich(lambda: nn.LayerNorm(6, elementwise_affine=False)), (4, 6)),
        Case("layernorm-first", _sequence(nn.LayerNorm(6), nn.Linear(6, 3)), (4, 6), opacus=True),
        Case("groupnorm", _sequence(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Tanh()), (2, 3, 4), opacus=True),
        Case("groupnorm-2d-input", _sandwich(lambda: nn.GroupNorm(2, 6)), (6,)),
        Case("groupnorm-not-affine", _sandwich(lambda: nn.GroupNorm(2, 6, affine=False)), (6,)),
        Case("instancenorm1d", _sequence(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True)), (2, 5), opacus=True),
        Case("instancenorm2d", _sequence(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.Tanh()), (2, 3, 4), opacus=True),
        Case("instancenorm3d", _sequence(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.Tanh()), (2, 2, 3, 2)),
        Case("rmsnorm", _sandwich(lambda: nn.RMSNorm(6)), (4, 6), opacus=True),
        Case("rmsnorm-two-dims", _sandwich(lambda: nn.RMSNorm((3, 6), eps=1e-5)), (3, 6)),
        Case("rmsnorm-llama", _sandwich(lambda: LlamaRMSNorm(6)), (4, 6), tolerance=single),
        Case("rmsnorm-gemma", _sandwich(lambda: GemmaRMSNorm(6)), (4, 6), tolerance=single),
        Case("rmsnorm-t5", _sandwich(lambda: T5LayerNorm(6)), (4, 6), tolerance=single),
    ]  # fmt: skip


def _parameter_cases() -> list[Case]:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    def class_token(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1) + m.position)

    def linear() -> nn.Linear:
        return nn.Linear(6, 6)

    return [
        Case("class-token", lambda: Wrap(class_token, token=parameter(1, 1, 5), position=parameter(1, 5, 5), embed=nn.Linear(6, 5), head=nn.Linear(5, 3)), (4, 6)),
        Case("class-token-repeat", lambda: Wrap(lambda m, x: m.a(torch.cat([m.token.repeat(len(x), 1, 1), x], 1)), token=parameter(1, 2, 6), a=linear()), (4, 6)),
        Case("positions-square", lambda: Wrap(lambda m, x: m.a(x + m.position), position=parameter(4, 6), a=linear()), (4, 6)),
        Case("positions-sliced", lambda: Wrap(lambda m, x: m.a(x + m.position[:, : x.shape[1]]), position=parameter(1, 9, 6), a=linear()), (4, 6)),
        Case("layer-scale", lambda: Wrap(lambda m, x: x + m.gamma * m.a(x), gamma=parameter(6), a=linear()), (4, 6)),
        Case("layer-scale-in-place", lambda: Wrap(lambda m, x: m.b(m.a(x).mul_(m.gamma)), gamma=parameter(6), a=linear(), b=linear()), (4, 6)),
        Case("channel-scale", lambda: Wrap(lambda m, x: m.a(x) * m.scale, scale=parameter(4, 1, 1), a=nn.Conv2d(2, 4, 1)), (2, 3, 4)),
        Case("temperature", lambda: Wrap(lambda m, x: m.a(x) * m.log_temperature.exp(), log_temperature=parameter(), a=linear()), (6,)),
        Case("parameter-used-twice", lambda: Wrap(lambda m, x: m.a(x * m.scale).tanh() + m.scale, scale=parameter(6), a=linear()), (4, 6), whole=("scale",)),
        Case("parameter-used-three-ways", lambda: Wrap(lambda m, x: m.a(x * m.scale.exp()) @ torch.diag(m.scale) + m.scale, scale=parameter(6), a=linear()), (4, 6), whole=("scale",)),
        Case("parameter-last", lambda: Wrap(lambda m, x: m.a(x).tanh() + m.bias, bias=parameter(6), a=linear()), (6,)),
        Case("parameter-in-layer", lambda: nn.Sequential(Wrap(lambda m, x: x * m.scale, scale=parameter(6)), linear()), (4, 6)),
        Case("two-parameters", lambda: Wrap(lambda m, x: m.a(x) * m.scale + m.shift, scale=parameter(6), shift=parameter(6), a=linear()), (4, 6)),
        Case("parameter-only", lambda: Wrap(lambda m, x: x * m.scale, scale=parameter(6)), (6,)),
    ]  # fmt: skip


def _function_cases() -> list[Case]:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    return [
        Case("prelu", _sandwich(nn.PReLU), (6,)),
        Case("prelu-channels", _sequence(nn.Conv1d(2, 4, 1), nn.PReLU(4), nn.Conv1d(4, 2, 2)), (2, 5)),
        Case("prelu-functional", lambda: Wrap(lambda m, x: F.prelu(m.a(x), m.slope), slope=parameter(1), a=nn.Linear(6, 5)), (6,)),
        Case("conv-transpose1d", _sequence(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.Tanh()), (3, 5)),
        Case("conv-transpose2d", _sequence(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.Tanh()), (4, 3, 2)),
        Case("bilinear", lambda: Wrap(lambda m, x: m.b(m.a(x), x), a=nn.Linear(6, 4), b=nn.Bilinear(4, 6, 3)), (6,)),
        Case("bare-linear", lambda: Wrap(lambda m, x: F.linear(m.a(x).tanh(), m.weight), weight=parameter(3, 5), a=nn.Linear(6, 5)), (4, 6)),
        Case("bare-matmul", lambda: Wrap(lambda m, x: m.a(x).tanh() @ m.weight, weight=parameter(5, 3), a=nn.Linear(6, 5)), (4, 6)),
        Case("bare-matmul-square", lambda: Wrap(lambda m, x: m.weight @ m.a(x).tanh(), weight=parameter(4, 4), a=nn.Linear(6, 5)), (4, 6)),
        Case("bare-einsum", lambda: nn.Sequential(nn.Linear(4, 4), EinsumExperts(), nn.Tanh()), (3, 4)),
        Case("two-outputs", lambda: Wrap(lambda m, x: m.a(m.pair(x, power=2)[0]), pair=PairOut(), a=nn.Linear(5, 3)), (4, 6)),
        Case("two-outputs-both", lambda: Wrap(lambda m, x: m.pair(x, 3)[0].sum(-1) + m.pair(x)[1], pair=PairOut()), (4, 6)),
    ]  # fmt: skip


def _shared_cases() -> list[Case]:
    def three_times(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(m.a(x))
        return m.head(x)

    def tied(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.mid(m.embed(x))))

    language_model = _tie(
        lambda: Wrap(tied, embed=nn.Embedding(VOCABULARY, 5), mid=nn.Linear(5, 5), head=nn.Linear(5, VOCABULARY, bias=False)),
        "embed", "head",
    )  # fmt: skip
    return [
        Case("reused-linear", lambda: Wrap(three_times, a=nn.Linear(6, 6), head=nn.Linear(6, 3)), (6,), opacus=True),
        Case("reused-linear-3d", lambda: Wrap(three_times, a=nn.Linear(6, 6), head=nn.Linear(6, 3)), (4, 6)),
        Case("reused-conv", lambda: Wrap(three_times, a=nn.Conv1d(4, 4, 3, padding=1), head=nn.Conv1d(4, 2, 1)), (4, 5)),
        Case("reused-layernorm", lambda: Wrap(lambda m, x: m.norm(m.a(m.norm(x))), norm=nn.LayerNorm(6), a=nn.Linear(6, 6)), (4, 6)),
        Case("reused-embedding", lambda: Wrap(lambda m, x: m.a(m.embed(x) * m.embed(x.flip(1))), embed=nn.Embedding(VOCABULARY, 5), a=nn.Linear(5, 3)), (6,), tokens=True),
        Case("reused-parameter", lambda: Wrap(lambda m, x: m.s(m.a(m.s(x))), s=Wrap(lambda m, x: x * m.scale, scale=nn.Parameter(torch.randn(6))), a=nn.Linear(6, 6)), (4, 6)),
        Case("reused-function", lambda: Wrap(lambda m, x: m.p(m.a(m.p(x))), p=nn.PReLU(), a=nn.Linear(6, 6)), (4, 6)),
        Case("reused-other-length", lambda: Wrap(lambda m, x: m.a(x).sum(1) + m.a(x[:, 0]), a=nn.Linear(6, 5)), (4, 6)),
        Case("tied-embedding-head", language_model, (6,), tokens=True),
        Case("tied-embedding-head-square", language_model, (4,), tokens=True),
        Case("tied-linears", _tie(_sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "0", "2"), (4, 6)),
        Case("tied-linears-2d", _tie(_sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False)), "0", "2"), (6,)),
        Case("tied-three-ways", _tie(_tie(_sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6)), "0", "2"), "0", "3"), (4, 6)),
    ]  # fmt: skip


def _network_cases() -> list[Case]:
    def branches(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.left(x).tanh(), m.right(x).sigmoid()], -1)) + m.skip(x)

    def chain(kind: str, blocks: int = 3) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(
            nn.Linear(5, 6), *(Checkpointed(Residual(6), kind) for _ in range(blocks)), nn.Linear(6, 3)
        )

    def shared(kind: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            block = Checkpointed(Residual(6), kind)
            return Wrap(lambda m, x: m.head(m.block(m.block(m.block(m.stem(x))))), stem=nn.Linear(5, 6), block=block, head=nn.Linear(6, 3))  # fmt: skip

        return make

    def lora() -> nn.Module:
        frozen = nn.LayerNorm(6).requires_grad_(False)
        return nn.Sequential(LoRA(6, 8), nn.GELU(), LoRA(8, 6), frozen, nn.Linear(6, 3))

    def tied(kind: str) -> Callable[[], nn.Module]:
        return _tie(
            lambda: Wrap(lambda m, x: m.head(m.block(m.embed(x))), embed=nn.Embedding(VOCABULARY, 6), block=Checkpointed(Residual(6), kind), head=nn.Linear(6, VOCABULARY)),
            "embed", "head",
        )  # fmt: skip

    kinds = ("reentrant", "non-reentrant")
    return [
        Case("residual-mlp", chain("none"), (5,), opacus=True),
        Case("residual-mlp-3d", chain("none"), (4, 5), opacus=True),
        Case("frozen-first-half", _freeze(chain("none"), "0.", "1.", "2.module.norm"), (4, 5)),
        Case("frozen-last-half", _freeze(chain("none"), "2.", "3.", "4."), (4, 5)),
        Case("lora", lora, (4, 6)),
        Case("lora-after-frozen", lambda: nn.Sequential(nn.Linear(6, 6).requires_grad_(False), lora()), (6,)),
        Case("branches", lambda: Wrap(branches, left=nn.Linear(6, 4), right=nn.Linear(6, 5), head=nn.Linear(9, 3), skip=nn.Linear(6, 3)), (4, 6), opacus=True),
        Case("attention", lambda: nn.Sequential(nn.Linear(5, 6), Attention(6), nn.Linear(6, 3)), (4, 5), opacus=True),
        Case("unregistered-order", lambda: Wrap(lambda m, x: m.head(m.body(x).tanh()), head=nn.Linear(5, 3), body=nn.Linear(6, 5)), (6,), opacus=True),
        *(Case(f"checkpoint-{kind}", chain(kind), (4, 5)) for kind in kinds),
        *(Case(f"checkpoint-shared-block-{kind}", shared(kind), (4, 5)) for kind in kinds),
        *(Case(f"checkpoint-tied-{kind}", tied(kind), (6,), tokens=True) for kind in kinds),
        Case("checkpoint-frozen-reentrant", _freeze(chain("reentrant"), "1.", "2.module.norm"), (4, 5)),
        Case("checkpoint-frozen-non-reentrant", _freeze(chain("non-reentrant"), "0.", "1."), (4, 5)),
    ]  # fmt: skip


def _may_refuse() -> list[Case]:
    """Ways of using parameters that no rule need cover; the engine is exact or says no, never wrong."""

    def parameters(m: Any, x: Tensor) -> Tensor:
        return m.head(x * m.scales[0] + m.scales[1])

    def in_halves(m: Any, x: Tensor) -> Tensor:
        first, second = x[: len(x) // 2], x[len(x) // 2 :]
        return torch.cat([m.a(first), m.a(second)]) if len(first) else m.a(second)

    def attend(m: Any, x: Tensor) -> Tensor:
        return m.attention(x, x, x, need_weights=False)[0]

    grid = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(1, 4, 6)
    mask = torch.tensor([True, False, False, True])

    def mixed(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("ts,bsd,de->bte", grid[0, :, :4].to(x), m.a(x), m.weight)

    def constant_first(m: Any, x: Tensor) -> Tensor:
        constant = grid[0].to(x) * m.scale  # (T, d) with T = B: not a batch
        return m.a(x + constant)

    def across(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y - y.mean(0))

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    return [
        Case("weight-of-another-layer", lambda: Wrap(lambda m, x: F.linear(m.embed(x), m.embed.weight), embed=nn.Embedding(VOCABULARY, 5)), (6,), tokens=True),
        Case("weight-norm", lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh()), (6,)),
        Case("parameter-list", lambda: Wrap(parameters, scales=nn.ParameterList([torch.randn(6), torch.randn(6)]), head=nn.Linear(6, 3)), (6,)),
        Case("multihead-attention", lambda: Wrap(attend, attention=nn.MultiheadAttention(6, 2, batch_first=True)), (4, 6)),
        Case("multihead-attention-time-first", lambda: Wrap(lambda m, x: attend(m, x.transpose(0, 1)).transpose(0, 1), attention=nn.MultiheadAttention(6, 2)), (4, 6)),
        Case("gru", lambda: Wrap(lambda m, x: m.gru(x)[0], gru=nn.GRU(6, 3, batch_first=True)), (4, 6)),
        Case("lstm-time-first", lambda: Wrap(lambda m, x: m.lstm(x.transpose(0, 1))[0][-1], lstm=nn.LSTM(6, 3)), (4, 6)),
        Case("embedding-bag", _sequence(nn.EmbeddingBag(VOCABULARY, 5), nn.Linear(5, 3)), (6,), tokens=True),
        Case("embedding-max-norm", _sequence(nn.Embedding(VOCABULARY, 5, scale_grad_by_freq=True), nn.Linear(5, 3)), (6,), tokens=True),
        Case("unused-layer", lambda: Wrap(lambda m, x: m.a(x), a=nn.Linear(6, 5), unused=nn.Linear(2, 2)), (6,)),
        Case("dead-branch", lambda: Wrap(lambda m, x: (m.a(x), m.dead(x))[0], a=nn.Linear(6, 5), dead=nn.Linear(6, 5)), (6,)),
        Case("dead-end", lambda: Wrap(lambda m, x: (m.a(x), m.dead(m.a(x)))[0], a=nn.Linear(6, 5), dead=nn.LayerNorm(5)), (6,)),
        Case("detached-branch", lambda: Wrap(lambda m, x: m.b(m.a(x).detach()) + m.c(x), a=nn.Linear(6, 5), b=nn.Linear(5, 3), c=nn.Linear(6, 3)), (6,)),
        Case("tied-transposed", lambda: Wrap(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=nn.Linear(6, 4)), (6,)),
        Case("batch-flattened", lambda: Wrap(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Linear(6, 5)), (4, 6)),
        Case("batch-second", lambda: Wrap(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(6, 5)), (3, 6)),
        Case("batch-second-square", lambda: Wrap(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(6, 5)), (4, 6)),
        Case("batch-reversed", lambda: Wrap(lambda m, x: m.b(m.a(x.flip(0)).flip(0).tanh()), a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (6,)),
        Case("batch-centred", lambda: Wrap(across, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (6,)),
        Case("batch-in-halves", lambda: Wrap(in_halves, a=nn.Linear(6, 5)), (6,)),
        Case("linear-of-broadcast", lambda: Wrap(lambda m, x: x + m.a(grid.to(x)), a=nn.Linear(6, 6)), (4, 6)),
        Case("linear-of-constant-square", lambda: Wrap(lambda m, x: x + m.a(grid[0].to(x)), a=nn.Linear(6, 6)), (4, 6)),
        Case("where-mask-square", lambda: Wrap(lambda m, x: torch.where(mask, m.a(x), m.fill), fill=parameter(4), a=nn.Linear(6, 4)), (6,)),
        Case("addcmul-square", lambda: Wrap(lambda m, x: torch.addcmul(m.a(x), mask.to(x), m.scale), scale=parameter(4), a=nn.Linear(6, 4)), (6,)),
        Case("einsum-constant-square", lambda: Wrap(mixed, weight=parameter(5, 3), a=nn.Linear(6, 5)), (4, 6)),
        Case("scaled-constant-square", lambda: Wrap(constant_first, scale=parameter(6), a=nn.Linear(6, 3)), (4, 6)),
        Case("scaled-constant", lambda: Wrap(lambda m, x: x + m.scale * grid.to(x), scale=parameter(6)), (4, 6)),
        Case("parameter-as-output", lambda: Wrap(lambda m, x: m.a(x) + m.norm(m.p * m.p).sum(), p=parameter(6), a=nn.Linear(6, 4), norm=nn.LayerNorm(6)), (6,)),
        Case("parameter-stacked", lambda: Wrap(lambda m, x: m.a(torch.stack([m.p * row for row in x])), p=parameter(6), a=nn.Linear(6, 4)), (6,)),
        Case("parameter-indexed", lambda: Wrap(lambda m, x: m.p[x].sum(1), p=parameter(VOCABULARY, 5)), (6,), tokens=True),
        Case("parameter-embedded", lambda: Wrap(lambda m, x: F.embedding(x, m.p).sum(1), p=parameter(VOCABULARY, 5)), (6,), tokens=True),
        Case("parameter-softmax", lambda: Wrap(lambda m, x: m.a(x) @ m.p.softmax(0), p=parameter(4, 3), a=nn.Linear(6, 4)), (4, 6)),
        Case("parameter-in-place", lambda: Wrap(lambda m, x: m.a(x).add_(m.p).mul_(m.p), p=parameter(4), a=nn.Linear(6, 4)), (6,)),
        Case("parameter-data", lambda: Wrap(lambda m, x: m.a(x) * m.p.data + m.p, p=parameter(4), a=nn.Linear(6, 4)), (6,)),
        Case("functional-layernorm", lambda: Wrap(lambda m, x: F.layer_norm(m.a(x), (4,), m.p, m.q), p=parameter(4), q=parameter(4), a=nn.Linear(6, 4)), (4, 6)),
        Case("functional-groupnorm", lambda: Wrap(lambda m, x: F.group_norm(m.a(x), 2, m.p), p=parameter(4), a=nn.Conv1d(2, 4, 1)), (2, 5)),
        Case("functional-dropout-free-attention", lambda: Wrap(lambda m, x: F.scaled_dot_product_attention(m.a(x), m.p.expand(len(x), -1, -1), m.p.expand(len(x), -1, -1)), p=parameter(3, 6), a=nn.Linear(6, 6)), (4, 6)),
        Case("layernorm-of-parameter", lambda: Wrap(lambda m, x: x + m.norm(m.position), position=nn.Parameter(torch.randn(1, 4, 6)), norm=nn.LayerNorm(6)), (4, 6)),
    ]  # fmt: skip


class Experts(nn.Module):
    """Each position goes to one of several small networks, so that their rows have left the examples."""

    def __init__(self, width: int, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.networks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, d) to the experts' answers, and to those plus one, which are made from them."""
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for index, network in enumerate(self.networks):
            mine = (chosen == index).nonzero().squeeze(1)
            out = out.index_add(0, mine, network(rows[mine]) * weights[mine, None])
        out = out.view_as(x)
        return out, out + 1


def _layout_cases() -> list[Case]:
    """The examples elsewhere than in the first dimension: folded into it, or in the second; or lost inside a module."""

    def folded(*modules: nn.Module) -> Callable[[], nn.Module]:
        """(B, 3, ...) seen by the modules as (B * 3, ...)."""
        return lambda: Wrap(
            lambda m, x: m.inner(x.flatten(0, 1)).unflatten(0, (len(x), 3)), inner=nn.Sequential(*deepcopy(modules))
        )

    def second(*modules: nn.Module) -> Callable[[], nn.Module]:
        return lambda: Wrap(
            lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=nn.Sequential(*deepcopy(modules))
        )

    def bare(function: Callable[[Any, Tensor], Tensor], *shape: int) -> nn.Module:
        return Wrap(function, p=nn.Parameter(torch.randn(shape)))

    def routed(m: Any, x: Tensor) -> Tensor:
        one, other = m.experts(m.a(x))
        return m.b(one) * other.tanh()

    def kept(x: Tensor, token: Tensor) -> Tensor:
        return torch.cat([token.expand(len(x), -1, -1), x], 1)

    linear, table, frames = nn.Linear(6, 6), nn.Embedding(VOCABULARY, 5), (3, 4, 8)
    return [
        Case("folded-linear", folded(linear, nn.Tanh(), nn.Linear(6, 5)), (3, 4, 6)),
        Case("folded-linear-2d", folded(linear, nn.Tanh(), nn.Linear(6, 5, bias=False)), (3, 6)),
        Case("folded-bitfit", _freeze(folded(linear, nn.LayerNorm(6), linear), "inner.0.weight", "inner.1.weight", "inner.2.weight"), (3, 4, 6)),
        Case("folded-conv1d", folded(nn.Conv1d(4, 6, 3, groups=2, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv1d(6, 2, 2)), frames),
        Case("folded-conv2d", folded(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Tanh()), (3, 2, 4, 3)),
        Case("folded-bitfit-conv", _freeze(folded(nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 2, 2)), "inner.0.weight", "inner.2.weight"), frames),
        Case("folded-norms", folded(linear, nn.LayerNorm(6), linear, nn.RMSNorm(6)), (3, 4, 6)),
        Case("folded-embedding", folded(table, nn.Linear(5, 3)), (3, 4), tokens=True),
        Case("folded-scale", folded(linear, bare(lambda m, x: x * m.p, 6), linear), (3, 4, 6)),
        Case("folded-positions", folded(linear, bare(lambda m, x: x + m.p, 1, 4, 6), linear), (3, 4, 6)),
        Case("folded-token", folded(linear, bare(lambda m, x: kept(x, m.p), 1, 1, 6), linear), (3, 4, 6)),
        Case("folded-matmul", folded(linear, bare(lambda m, x: x @ m.p, 6, 3)), (3, 4, 6)),
        Case("folded-functional-linear", folded(linear, bare(lambda m, x: F.linear(x, m.p), 3, 6)), (3, 4, 6)),
        Case("second-linear", second(linear, nn.Tanh(), nn.Linear(6, 5)), (3, 6)),
        Case("second-linear-square", second(linear, nn.Tanh(), nn.Linear(6, 5)), (4, 6)),
        Case("second-linear-4d", second(linear, nn.Tanh(), nn.Linear(6, 5)), (3, 2, 6)),
        Case("second-bitfit", _freeze(second(linear, nn.LayerNorm(6), linear), "inner.0.weight", "inner.1.weight", "inner.2.weight"), (3, 6)),
        Case("second-norms", second(linear, nn.LayerNorm(6), linear, nn.RMSNorm(6)), (3, 6)),
        Case("second-embedding", second(table, nn.Linear(5, 3)), (7,), tokens=True),
        Case("second-scale", second(linear, bare(lambda m, x: x * m.p, 6), linear), (3, 6)),
        Case("second-positions", second(linear, bare(lambda m, x: x + m.p, 3, 1, 6), linear), (3, 6)),
        Case("second-positions-square", second(linear, bare(lambda m, x: x + m.p, 4, 1, 6), linear), (4, 6)),
        Case("second-matmul", second(linear, bare(lambda m, x: x @ m.p, 6, 3)), (3, 6)),
        Case("second-functional-linear", second(linear, bare(lambda m, x: F.linear(x, m.p), 3, 6)), (3, 6)),
        Case("experts-of-linears", lambda: Wrap(routed, a=nn.Linear(6, 6), experts=Experts(6), b=nn.Linear(6, 6)), (5, 6)),
        Case("experts-first", lambda: Wrap(lambda m, x: m.b(m.experts(x)[1]), experts=Experts(6), b=nn.Linear(6, 3)), (4, 6)),
    ]  # fmt: skip


def _named(*catalogues: Callable[[], list[Case]]) -> dict[str, Case]:
    """The cases by name; what they hold is made here, the same for every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {case.name: case for cases in catalogues for case in cases()}


LAYER_CASES = _named(
    _linear_cases, _convolution_cases, _embedding_cases, _norm_cases, _parameter_cases, _function_cases, _shared_cases, _network_cases, _layout_cases
)  # fmt: skip


EVERY_CASE = {**LAYER_CASES, **MODEL_CASES}
EXACT_OR_REFUSED = _named(_may_refuse)
