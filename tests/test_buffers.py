"""The formula for fastDP's buffers against what was measured of fastDP, and its parts against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.buffers import ONE_HOT_BYTES, Held, held_by, peak_bytes
from groupsearch.plan.trace import Trace
from groupsearch.verify import Setup

VOCABULARY, POSITIONS, BATCH = 8192, 128, 8
CONFIGURATION = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Found = tuple[Trace, list[Held]]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """The GPT-2 that fastDP was measured on, plain and checkpointed."""
    folder = Path(tmp_path_factory.mktemp("gpt"))
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    found = {}
    for checkpoint in ("none", "blocks"):
        settings = {"batch_size": BATCH, "sequence_length": POSITIONS, "attn_implementation": "eager"}
        setup = Setup(f"hf:{folder}", settings, optimizer="sgd", checkpoint=checkpoint)
        trace = setup.trace()
        found[checkpoint] = (trace, held_by(setup.loaded, trace))
    return found


def test_inputs_and_copies_are_those_measured_of_fastdp_at_its_first_clip(gpt: dict[str, Found]) -> None:
    """All-layer, MiB: activations 38, backprops 79 (measured of its commit 3d5cc56)."""
    _, held = gpt["none"]
    inputs = {site.storage: site.input_bytes for site in held}
    assert round(sum(inputs.values()) / 2**20) == 38
    positions = (BATCH - 1) * POSITIONS * 256 * 4  # were embedded for every example, here they are for one
    assert round((sum(site.gradient_bytes for site in held) + positions) / 2**20) == 79


def test_an_embedding_is_summed_by_a_one_hot(gpt: dict[str, Found]) -> None:
    trace, held = gpt["none"]
    of = {site.name: found.one_hot_bytes for site, found in zip(trace.sites, held, strict=True)}
    assert of["transformer.wte"] == BATCH * POSITIONS * VOCABULARY * ONE_HOT_BYTES
    assert max(size for name, size in of.items() if "wte" not in name) <= POSITIONS * BATCH * POSITIONS * ONE_HOT_BYTES


def test_every_parameter_leaves_a_gradient_once(gpt: dict[str, Found]) -> None:
    trace, held = gpt["none"]
    assert sum(site.parameter_bytes for site in held) == trace.static.weights


def test_peaks_are_near_those_measured_of_fastdp(gpt: dict[str, Found]) -> None:
    """MiB above the weights: non-private 218, all-layer 244, layer-wise 259, one group for each block 218."""
    trace, held = gpt["none"]
    blocks = [b for b in trace.block_boundaries if trace.sites[b].block != trace.sites[b].layer][1:]
    cuts = {244: (), 259: tuple(range(1, trace.length)), 218: blocks}
    assert _above_weights(trace, trace.nonprivate_peak_bytes) == pytest.approx(218, abs=0.5)
    for measured, boundaries in cuts.items():
        assert _above_weights(trace, peak_bytes(trace, held, boundaries)) == pytest.approx(measured, rel=0.1)


def _above_weights(trace: Trace, size_bytes: int) -> float:
    return (size_bytes - trace.static.weights) / 2**20


def test_a_one_hot_only_adds(gpt: dict[str, Found]) -> None:
    trace, held = gpt["none"]
    for boundaries in ((), (7,), tuple(range(1, trace.length))):
        assert peak_bytes(trace, held, boundaries) >= peak_bytes(trace, held, boundaries, one_hot=False)


def test_checkpointing_gains_nothing_all_layer(gpt: dict[str, Found]) -> None:
    """Hooks keep every input, as was measured of fastDP; the engine here gains."""
    (plain, held), (again, held_again) = gpt["none"], gpt["blocks"]
    assert held == held_again
    close = [peak_bytes(trace, held, (), one_hot=True) for trace in (plain, again)]
    assert close[1] == pytest.approx(close[0], rel=0.01)
    assert again.nonprivate_peak_bytes < 0.95 * plain.nonprivate_peak_bytes
