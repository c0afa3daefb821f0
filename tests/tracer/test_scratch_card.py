"""A step traced for a card that is not there: the kernels it would take, and what it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import groupsearch as gs
from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.cards import CARDS
from groupsearch.tracer.allocator import Allocator
from groupsearch.tracer.fake import FakeTensors, attention_kernel, fake_model, kernels_of
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.scratch import card_scratch

HALF, SINGLE, DOUBLE, BRAIN = torch.float16, torch.float32, torch.float64, torch.bfloat16


def heads(dtype: torch.dtype, width: int = 64, count: int = 4, length: int = 128) -> torch.Tensor:
    return torch.empty(2, count, length, width, dtype=dtype, device="meta", requires_grad=True)


@pytest.mark.parametrize(
    ("card", "dtype", "width", "masked", "kernel"),
    [
        ("h100", BRAIN, 64, False, "cudnn"),
        ("h200", HALF, 128, True, "cudnn"),
        ("h100", BRAIN, 160, False, "flash"),
        ("h100", SINGLE, 64, False, "efficient"),
        ("h100", DOUBLE, 64, False, "math"),
        ("a100", BRAIN, 64, False, "flash"),
        ("a100", BRAIN, 256, False, "flash"),
        ("a100", BRAIN, 264, False, "efficient"),
        ("a100", BRAIN, 64, True, "efficient"),
        ("a100", SINGLE, 64, True, "efficient"),
        ("a100", SINGLE, 30, False, "math"),
        ("a100", BRAIN, 60, True, "math"),
        ("a100", BRAIN, 60, False, "flash"),
        ("rtx4090", BRAIN, 200, False, "efficient"),
        ("l4", BRAIN, 256, False, "flash"),
        ("t4", HALF, 64, False, "efficient"),
        ("t4", BRAIN, 64, False, "math"),
    ],
)
def test_the_kernel_is_the_first_that_takes_the_type_the_width_and_the_mask(card, dtype, width, masked, kernel):
    x = heads(dtype, width)
    mask = torch.empty(128, 128, dtype=torch.bool, device="meta") if masked else None

    assert attention_kernel(CARDS[card], x, x, x, mask) == kernel


def test_what_the_user_forbids_is_not_taken():
    x = heads(BRAIN)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        assert attention_kernel(CARDS["a100"], x, x, x, None) == "efficient"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_kernel(CARDS["h100"], x, x, x, None) == "math"


B, H, T, D = 2, 4, 128, 64
OUT = B * H * T * D
ROWS = B * H * T * 4  # one float32 for each row of the scores


@pytest.mark.parametrize(
    ("card", "dtype", "kept"),
    [
        # the result, the logarithm of each row's sum, seed and offset of the random generator (512 bytes each)
        ("a100", BRAIN, 2 * OUT + ROWS + 2 * 512),
        ("a100", SINGLE, 4 * OUT + ROWS + 2 * 512),
        ("h100", BRAIN, 2 * OUT + ROWS + 2 * 512),
        # the step by step one: scaled query and key, softmax in double, the result
        ("a100", DOUBLE, 8 * (3 * OUT + B * H * T * T)),
    ],
)
def test_attention_keeps_what_its_kernel_saves(card, dtype, kept):
    allocator = Allocator.of_card(CARDS[card])
    with FakeTensors(CARDS[card]):
        x = torch.empty(B, H, T, D, dtype=dtype, requires_grad=True)
        live = LiveBytes(card_scratch, allocator)
        live.ignore([x])
        with live:
            out = F.scaled_dot_product_attention(x, x, x, is_causal=False)
            found = live.live_bytes
            out.sum().backward()
    assert found == kept
    assert x.grad is not None


def test_whoever_calls_attention_gets_the_kernel_of_the_card():
    """Modules call the function from C++, from Python and inside a function that torch's modes do not reach into."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with FakeTensors(CARDS["h100"]) as fake:
        x = torch.empty(2, 16, 64, requires_grad=True)
        copy = fake_model(attention, fake.mode, torch.device("cpu"))
        with Names():
            copy(x, x, x, need_weights=False)[0].sum().backward()
    assert "aten::_scaled_dot_product_efficient_attention" in seen
    assert "aten::_scaled_dot_product_efficient_attention_backward" in seen
    seen.clear()
    with FakeTensors():
        x = torch.empty(2, 4, 16, 64)
        with Names():
            F.scaled_dot_product_attention(x, x, x)
    assert not any("efficient" in name for name in seen)  # and outside everything is as it was


def test_kernels_may_be_asked_for_again_inside():
    with kernels_of(CARDS["a100"]), kernels_of(CARDS["a100"]):
        pass
    with kernels_of(CARDS["h100"]):
        pass
    with pytest.raises(AssertionError), kernels_of(CARDS["h100"]), kernels_of(CARDS["t4"]):
        pass
    with FakeTensors(CARDS["t4"]):
        pass


def test_dropout_keeps_a_mask_of_one_byte_for_each_number():
    with FakeTensors(CARDS["a100"]):
        x = torch.empty(1024, 512, requires_grad=True)
        live = LiveBytes(card_scratch, Allocator.of_card(CARDS["a100"]))
        live.ignore([x])
        with live:
            out = F.dropout(x, 0.1)
            assert live.live_bytes == 1024 * 512 * (4 + 1)
            del out


@pytest.mark.parametrize(
    ("work", "on_card", "on_cpu"),
    [
        (lambda x: F.linear(x, x), BRAIN, BRAIN),
        (lambda x: F.layer_norm(x.bfloat16(), (64,)), SINGLE, BRAIN),
        (lambda x: F.group_norm(x.bfloat16(), 4), SINGLE, BRAIN),
        (lambda x: F.softmax(x.bfloat16(), -1), SINGLE, BRAIN),
        (lambda x: F.log_softmax(x.bfloat16(), -1), SINGLE, BRAIN),
        (lambda x: x.bfloat16().exp(), SINGLE, BRAIN),
        (lambda x: x.bfloat16().pow(2), SINGLE, BRAIN),
        (lambda x: x.bfloat16().sum(0), SINGLE, BRAIN),
        (lambda x: x.bfloat16().sum(), SINGLE, BRAIN),
        (lambda x: x.bfloat16().sum(0, dtype=DOUBLE), DOUBLE, DOUBLE),
        (lambda x: F.gelu(x.bfloat16()), BRAIN, BRAIN),
        (lambda x: F.gelu(x), SINGLE, SINGLE),
        (lambda x: F.layer_norm(x.double(), (64,)), DOUBLE, DOUBLE),
        (lambda x: F.scaled_dot_product_attention(*3 * (x[None, None],)), BRAIN, BRAIN),
    ],
)
def test_autocast_casts_what_it_casts_on_cuda(work, on_card, on_cpu):
    """By the lists of torch's documentation: CUDA takes norms, softmax, powers and sums in float32."""
    for device, expected in ((CARDS["h100"], on_card), (None, on_cpu)):
        with FakeTensors(device), torch.autocast("cpu", BRAIN):
            x = torch.empty(64, 64, requires_grad=True)
            out = work(x)
            assert out.dtype is expected
            out.float().sum().backward()


def test_flash_attention_adds_up_the_querys_gradient_in_float32():
    with FakeTensors(CARDS["a100"]):
        x = torch.empty(B, H, 100, 40, dtype=BRAIN, requires_grad=True)
        live = LiveBytes(card_scratch, Allocator.of_card(CARDS["a100"]))
        live.ignore([x])
        with live:
            out = F.scaled_dot_product_attention(x, x, x).sum()
            out.backward()
    # 100 rows as 128, 40 columns as 64, and one number for each row
    assert B * H * 128 * (64 + 1) * 4 in [beyond for _, _, beyond in live.insides]


@pytest.fixture(scope="module")
def gpt():
    return gs.load_workload("stdlib-gpt", batch_size=8, blocks=2)


def traced(workload, device, **how):
    batch = workload.make_batch(workload.batch_size)
    with torch.device("meta"):
        model = workload.build()
    return gs.trace_model(model, batch, workload.loss, device=device, **how)


def test_a_card_counts_blocks_workspaces_and_no_host(gpt):
    trace, cpu = traced(gpt, "cuda:h100"), traced(gpt, None)

    assert trace.settings["device"] == "cuda:h100"
    assert trace.settings["fake"] is True
    assert trace.static.workspaces == 64 * 2**20
    assert trace.static.weights % 512 == 0
    # two moments of every weight; the step counters are on the host
    assert trace.static.optimizer == 2 * trace.static.weights
    assert cpu.static.optimizer > 2 * cpu.static.weights
    fused = traced(gpt, "cuda:h100", optimizer="adam:fused")
    weights = len({name for site in fused.sites for name in site.parameters})
    assert fused.static.optimizer == 2 * fused.static.weights + 512 * weights


def test_an_optimizer_of_no_variant_goes_by_lists_and_needs_another_copy_of_the_weights(gpt):
    plain, lists, one, loop = (
        traced(gpt, "cuda:a100", optimizer=f"adam{v}") for v in ("", ":foreach", ":fused", ":loop")
    )

    assert plain.step_bytes == lists.step_bytes
    assert lists.step_bytes - loop.step_bytes > lists.static.weights / 2
    assert one.step_bytes < lists.step_bytes


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_card_is_simulated_as_it_is_estimated(gpt, autocast):
    how = {"checkpoint": "blocks", "autocast": autocast, "device": "cuda:a100"}
    trace = traced(gpt, **how)
    batch = gpt.make_batch(8)
    for grouping in (gs.Grouping.all_layer(trace), gs.Grouping.block_wise(trace)):
        simulated = gs.simulate_peak(gpt.model, batch, gpt.loss, grouping, **how)
        assert gs.peak_memory(trace, grouping).peak_bytes == pytest.approx(simulated, rel=1e-4)


def test_what_is_not_known_of_a_card_is_named_and_what_it_cannot_be_asked_is_refused(gpt):
    images = gs.load_workload("digits-cnn", batch_size=4)
    assert "aten::convolution" in traced(images, "cuda:h100").unprobed
    assert traced(gpt, "cuda:h100").unprobed == ()

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    chooses = replace(images, build=lambda seed=0: Chooses())
    with pytest.raises(UnsupportedModelError, match="--device cpu"), torch.device("meta"):
        gs.trace_model(chooses.build(), torch.ones(3, 4), lambda m, x: m(x).sum(1), device="cuda:h100")
