"""The sentences about a profile: they name the moment and the parts, and their remedies do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from groupsearch.documents.rows import Joint
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import PeakEstimate, peak_memory
from groupsearch.plan.partition import floor_bytes, front
from groupsearch.plan.trace import Trace
from groupsearch.report.finding import WORTH_NAMING, Part, finding, growing_share, joint_finding, parts
from groupsearch.units import format_bytes
from groupsearch.verify import Setup
from tests.report.synthetic import joint_document, transformer_trace

GPT = {"model_type": "gpt2", "n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 64}
MLP = "benchmarks.networks:mlp"


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory):
    """Traces of a small GPT-2 whose logits are large, by vocabulary, batch size and checkpointing."""
    folder = tmp_path_factory.mktemp("gpt")

    @cache
    def traced(vocabulary: int = 8000, batch_size: int = 8, checkpoint: str = "none") -> Trace:
        place = Path(folder / str(vocabulary))
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(
            json.dumps({**GPT, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2})
        )
        settings = {"batch_size": batch_size, "sequence_length": 64}
        return Setup(f"hf:{place}", settings, checkpoint=checkpoint).trace()

    return traced


@cache
def mlp(batch_size: int = 2, optimizer: str = "adam") -> Trace:
    settings = {"layers": 5, "width": 512, "batch_size": batch_size}
    return Setup(MLP, settings, optimizer=optimizer).trace()


def whole(trace: Trace) -> PeakEstimate:
    return peak_memory(trace, Grouping.all_layer(trace))


def part(trace: Trace, words: str) -> Part:
    return next(part for part in parts(trace, whole(trace)) if words in part.name)


def test_a_peak_at_the_logits_is_told_as_such(gpt) -> None:
    trace = gpt()
    text = finding(trace)
    assert text.startswith("Grouping saves nothing here: all-layer peaks at")
    assert "in the forward pass and the loss, before any group holds anything" in text
    assert f"{format_bytes(part(trace, 'logits of lm_head').size_bytes)} logits of lm_head" in text
    assert part(trace, "logits").size_bytes >= 3 * 4 * 8 * 64 * 8000  # logits, their logarithms, the gradient


def test_a_small_head_is_not_said_to_make_logits(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 90, "intermediate_size": 64}))
    trace = Setup(f"hf:{tmp_path}", {"batch_size": 8, "sequence_length": 64}).trace()
    assert trace.sites[-1].outputs == 2
    found = parts(trace, replace(whole(trace), where="forward and loss", site=-1))
    assert not any("logits" in part.name for part in found)


def test_logits_above_adapters_are_told_as_what_lies_above_them(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "config.json").write_text(json.dumps({**GPT, "vocab_size": 8000, "bos_token_id": 1, "eos_token_id": 2}))
    trace = Setup(f"hf:{tmp_path}", {"batch_size": 8, "sequence_length": 64, "lora": 2}).trace()
    found = part(trace, "what lies above")
    assert found.name.startswith(f"what lies above {trace.sites[-1].name}, the last that is trained")
    assert found.size_bytes >= 3 * 4 * 8 * 64 * 8000  # logits, their logarithms, the gradient
    assert "logits of a vocabulary" in found.remedy


def test_a_smaller_head_saves_what_the_logits_are_said_to_take(gpt) -> None:
    large, small = gpt(), gpt(vocabulary=800)
    saved = whole(large).peak_bytes - whole(small).peak_bytes - large.static.total + small.static.total
    assert saved == pytest.approx(0.9 * part(large, "logits").size_bytes, rel=0.1)


def test_checkpointing_saves_what_the_blocks_are_said_to_take(gpt) -> None:
    plain, again = gpt(), gpt(checkpoint="blocks")
    inputs = 6 * 4 * 8 * 64 * 64
    saved = plain.nonprivate_peak_bytes - again.nonprivate_peak_bytes
    assert part(plain, "activations of 6 blocks").size_bytes == pytest.approx(saved + inputs, rel=0.1)
    assert "--checkpoint blocks keeps" in part(plain, "activations of 6 blocks").remedy
    assert "--checkpoint" not in finding(again)


def test_checkpointing_the_other_blocks_saves_what_they_are_said_to_take(gpt) -> None:
    some, every = gpt(checkpoint="every:2"), gpt(checkpoint="blocks")
    told, inputs = part(some, "activations of 6 blocks"), 6 * 4 * 8 * 64 * 64
    saved = some.nonprivate_peak_bytes - every.nonprivate_peak_bytes
    assert told.size_bytes == pytest.approx(saved + inputs, rel=0.1)
    assert "--checkpoint blocks keeps" in told.remedy
    assert "--checkpoint blocks keeps" in finding(gpt(vocabulary=800, checkpoint="every:2"))


def test_where_grouping_saves_nothing_what_would_is_named_with_its_bytes(gpt) -> None:
    """Chunks of the loss and a smaller head for logits, checkpointing for blocks, an optimizer for its state."""
    text = finding(gpt(vocabulary=2000))
    assert text.startswith("Grouping saves nothing here")
    logits, blocks = part(gpt(vocabulary=2000), "logits"), part(gpt(vocabulary=2000), "activations of 6 blocks")
    assert f"{format_bytes(logits.size_bytes)} {logits.name} (a loss taken in chunks, a smaller head)" in text
    assert f"{format_bytes(blocks.size_bytes)} {blocks.name} (--checkpoint blocks keeps" in text
    assert "(an optimizer that keeps less)" in finding(mlp())


def test_a_joint_choice_is_told_with_how_exact_it_is() -> None:
    document = joint_document()
    trace, joint = Trace.from_json(document["trace"]), document["joint"]
    text = joint_finding(trace, Joint.from_json(joint))
    assert "the fewest operations within 16.0 MiB: 3 groups, norms of weights 5 by ghost and 13 by instantiate" in text
    assert f"peak at {format_bytes(joint['peak_bytes'])}" in text
    assert "0.50x the operations of mixed, which needs 1.00 MiB all-layer and 512 KiB at the least" in text
    assert "no choice takes fewer operations within it" in text
    assert format_bytes(peak_memory(trace, tuple(joint["boundaries"])).breakdown.book) in text
    loose = {**joint, "bound": {"of": "operations", "least": 400_000, "gap": 0.25}}
    told = joint_finding(trace, Joint.from_json(loose))
    assert "at most 25.00 % more operations than the best choice may take" in told
    for gap in (float("inf"), None):
        unknown = {**joint, "bound": {"of": "operations", "least": 0, "gap": gap}}
        assert "how few operations might do is not known" in joint_finding(trace, Joint.from_json(unknown))
    least = {**joint, "budget_bytes": None, "bound": {"of": "peak_bytes", "least": 1, "gap": 0.0}}
    assert "for the least peak: 3 groups" in joint_finding(trace, Joint.from_json(least))
    assert "no choice takes fewer bytes." in joint_finding(trace, Joint.from_json(least))


def test_the_share_that_grows_with_the_batch_does(gpt) -> None:
    full, half = gpt(), gpt(batch_size=4)
    fallen = 1 - whole(half).peak_bytes / whole(full).peak_bytes
    assert fallen == pytest.approx(growing_share(full, whole(full)) / 2, abs=0.01)


def test_a_checkpointed_vit_is_told_what_few_groups_save() -> None:
    trace = Setup("digits-vit", {"batch_size": 256}, checkpoint="blocks").trace()
    text = finding(trace)
    few = int(text.split()[0])
    assert text[len(str(few)) :].startswith(" groups need")
    assert whole(trace).peak_bytes > 1.3 * floor_bytes(trace)
    assert f"{format_bytes(whole(trace).breakdown.book)} of it book" in text
    assert "--checkpoint" not in text


def test_convolutions_are_told_where_and_what() -> None:
    trace = Setup("digits-cnn", {"batch_size": 64}).trace()
    text = finding(trace)
    first = max(parts(trace, peak_memory(trace, _named_cuts(trace))), key=lambda part: part.size_bytes)
    assert f"{format_bytes(first.size_bytes)} {first.name}" in text
    assert "logits" not in text


def test_blocks_that_are_not_in_a_row_are_counted_once() -> None:
    settings = {"batch_size": 16, "sequence_length": 128}
    trace = Setup("hf:t5-small", settings, optimizer="sgd").trace()
    assert any("activations of 12 blocks" in found.name for found in parts(trace, whole(trace)))


def test_an_optimizer_step_that_is_the_peak_is_no_matter_of_groups_or_batch() -> None:
    text = finding(mlp())
    assert "Grouping saves nothing here" in text
    assert "in the optimizer's step, after every group is closed" in text
    assert "the batch is no lever" in text
    assert "Before that step the most is" in text
    assert mlp(batch_size=4).batch_size == 2 * mlp().batch_size
    assert whole(mlp(batch_size=4)).peak_bytes == pytest.approx(whole(mlp()).peak_bytes, rel=0.02)


def test_an_optimizer_that_keeps_less_saves_its_state() -> None:
    state = part(mlp(), "optimizer state")
    assert state.remedy == "an optimizer that keeps less"
    assert whole(mlp()).peak_bytes - whole(mlp(optimizer="sgd")).peak_bytes >= state.size_bytes


@pytest.mark.parametrize("kind", ["synthetic", "gpt", "checkpointed", "mlp"])
def test_parts_sum_to_the_peak_and_none_is_negative(kind: str, gpt) -> None:
    trace = {
        "synthetic": transformer_trace,
        "gpt": gpt,
        "checkpointed": lambda: gpt(checkpoint="blocks"),
        "mlp": mlp,
    }[kind]()
    for boundary in range(1, trace.length):
        peak = peak_memory(trace, (boundary,))
        found = parts(trace, peak)
        assert sum(part.size_bytes for part in found) == peak.peak_bytes
        assert min(part.size_bytes for part in found) >= 0
        assert found == sorted(found, key=lambda part: -part.size_bytes)


def test_what_is_less_than_a_tenth_is_not_named() -> None:
    trace = transformer_trace()
    small = replace(trace, static=replace(trace.static, buffers=0))
    left = peak_memory(small, _named_cuts(small))
    for found in parts(small, left):
        assert (found.name in finding(small)) == (found.size_bytes >= WORTH_NAMING * left.peak_bytes)


def _named_cuts(trace: Trace) -> tuple[int, ...]:
    return next(cuts for cuts, peak in front(trace) if peak <= 1.01 * floor_bytes(trace))
