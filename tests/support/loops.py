"""A language model with LoRA, its data, and the plain loop whose weights every integration must end with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch import Grouping, make_private, trace_model
from groupsearch.engine.loading import PoissonBatches
from groupsearch.integrations import Privacy
from groupsearch.plan.clipping import ClipPlan
from groupsearch.randomness import Streams

SIZE, WIDTH, EXPECTED, PHYSICAL, STEPS = 48, 8, 8, 2, 6
"""48 examples; 8 in a batch in the mean, in pieces of 2 at most: 6 steps, which are one epoch."""
RATE = 1e-2


def lora() -> nn.Module:
    """A Llama of two layers with LoRA on its attention, always the same; in evaluation mode, as ``from_pretrained``."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=24, num_hidden_layers=2, max_position_embeddings=16, pad_token_id=0, **sizes)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's doing
        torch.manual_seed(0)
        adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)  # zeros would hide a wrong gradient of the other half
    return adapted.eval()


@cache
def rows() -> list[dict[str, Tensor]]:
    """Padded texts of different lengths: ``input_ids``, ``attention_mask``, and ``labels`` with -100 for padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in torch.randint(3, WIDTH + 1, (SIZE,), generator=generator).tolist():
        mask = (torch.arange(WIDTH) < length).long()
        ids = torch.randint(1, 24, (WIDTH,), generator=generator) * mask
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens of an example that are predicted, (B,): written apart from the one in use."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)


@cache
def privacy() -> Privacy:
    """Seeded, without a watch, and with a grouping that is traced once."""
    batch = {name: torch.stack([row[name] for row in rows()[:PHYSICAL]]) for name in rows()[0]}
    grouping = Grouping.parse(trace_model(lora().train(), batch, loss), "best:2")
    return Privacy(grouping, noise_multiplier=1.0, seed=3, watch=0.0)


def batches() -> PoissonBatches:
    """What all loops draw."""
    return privacy().batches(rows(), expected_batch_size=EXPECTED, steps=STEPS, physical_batch=PHYSICAL)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@cache
def plainly_trained(steps: int = STEPS) -> dict[str, Tensor]:
    """The weights of the plain loop, with AdamW at a constant rate."""
    model, said, drawn = lora().train(), privacy(), batches()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    assert isinstance(said.grouping, Grouping)
    plan = ClipPlan(said.grouping, rule="auto-s")
    noise = Streams(3).generator("noise")
    settings = {"noise_multiplier": 1.0, "generator": noise}
    # nothing is divided here, whatever accelerate does elsewhere in the process
    engine = make_private(model, optimizer, plan, batches=drawn, loss_divisor=1.0, **settings)
    while engine.steps < steps:
        for logical in drawn:
            for batch in logical:
                loss(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if engine.steps == steps:
                break
    return trained(model)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same weights, to what the order of sums changes; they have moved much further."""
    start = trained(lora())
    assert found.keys() == expected.keys() == start.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0.0, atol=1e-6)
        assert (weight - start[name]).abs().max() > RATE


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same weights, bit for bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
