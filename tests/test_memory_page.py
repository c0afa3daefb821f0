"""docs/memory.md says what the committed documents say, and those say what the page concludes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.evidence import MODELS, figures, wanted
from benchmarks.reserved import MODELS as REPLAYED
from benchmarks.sweep import MODELS as SWEPT
from benchmarks.sweep import curve
from tests.support.memory_page import (
    BLOCK,
    BLOCKS,
    CARD,
    GRIDS,
    PAGE,
    ROOT,
    document,
    sweep_curves,
    with_numbers,
    without_card,
)

GIB = 2**30


def curves() -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(c["model"], c["attention"], c["checkpoint"]): c for c in sweep_curves()}


def test_the_page_has_the_numbers_of_the_documents() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_numbers(text)
    assert {name for _, name, _ in BLOCK.findall(text)} == set(BLOCKS)


def test_every_model_of_the_evidence_is_there_or_listed_as_left_out() -> None:
    rows = {(row["model"], row["autocast"], row["checkpoint"]) for row in document("evidence")["rows"]}
    missing = {(row["model"], row["autocast"], row["checkpoint"]) for row in document("evidence")["left_out"]}
    assert rows | missing == set(wanted())
    assert not rows & missing
    assert {(name, "none", again) for name in MODELS for again in ("none", "blocks")} <= rows


def test_more_groups_allowed_never_need_more_and_the_floor_is_below_all() -> None:
    for row in document("evidence")["rows"]:
        two, four, eight = (row["at_most_groups_bytes"][key] for key in ("2", "4", "8"))
        assert row["all_layer_bytes"] >= two >= four >= eight >= row["floor_bytes"]
        assert row["layer_wise_bytes"] >= row["floor_bytes"]


def test_checkpointing_is_where_grouping_buys_most() -> None:
    """What the page concludes: with it all-layer clipping gives the saving away again."""
    rows = {(row["model"], row["autocast"], row["checkpoint"]): row for row in document("evidence")["rows"]}
    for name in ("RoBERTa base", "ViT-B/16", "ViT-L/16"):
        plain, again = rows[name, "none", "none"], rows[name, "none", "blocks"]
        assert plain["all_layer_bytes"] < 1.05 * plain["nonprivate_peak_bytes"]
        assert again["all_layer_bytes"] > 3 * again["floor_bytes"]
    for row in rows.values():
        assert row["at_most_groups_bytes"]["8"] < 1.25 * row["nonprivate_peak_bytes"]


def test_without_checkpointing_all_layer_costs_a_few_percent() -> None:
    for row in document("evidence")["rows"]:
        if row["checkpoint"] == "none":
            assert row["all_layer_bytes"] < 1.06 * row["nonprivate_peak_bytes"]


def test_where_language_models_peak_with_checkpointing() -> None:
    """What the page concludes of GPT-2 and T5, and of Llama."""
    rows = {row["model"]: row for row in document("evidence")["rows"] if row["checkpoint"] == "blocks"}
    for name in ("GPT-2 small", "GPT-2 medium", "T5 base"):
        assert rows[name]["where"]["floor"] == "forward and loss"
        assert any(part.startswith("logits of lm_head") for part in rows[name]["largest_at_floor"])
    assert rows["Llama 3.2 1B"]["where"]["floor"] == "optimizer step"


@pytest.mark.slow
def test_a_row_of_the_evidence_is_found_again() -> None:
    found = document("evidence")
    if found["environment"]["torch"] != torch.__version__:
        pytest.skip(f"the document is of torch {found['environment']['torch']}")
    row = next(row for row in found["rows"] if (row["model"], row["checkpoint"]) == ("GPT-2 small", "none"))
    again = figures(MODELS["GPT-2 small"].setup(row["autocast"], "none").trace())
    assert again == {key: row[key] for key in again}


@pytest.mark.slow
def test_a_curve_of_the_sweep_is_found_again() -> None:
    found = document("sweep")
    if found["environment"]["torch"] != torch.__version__:
        pytest.skip(f"the document is of torch {found['environment']['torch']}")
    sites = found["sites"]["RoBERTa base"]
    assert curve("RoBERTa base", "sdpa", "none") == (sites, curves()["RoBERTa base", "sdpa", "none"])


def test_every_position_of_every_model_is_swept() -> None:
    assert set(curves()) == {(name, how, c) for name in SWEPT for how in ("sdpa", "eager") for c in ("none", "blocks")}
    for found in curves().values():
        keys = ("ours_bytes", "fastdp_bytes", "fastdp_without_one_hot_bytes")
        assert {len(found[key]) for key in keys} == {len(document("sweep")["sites"][found["model"]]) - 1}


def test_the_row_of_roberta_base_rises_by_its_one_hot_and_by_nothing_else() -> None:
    """What the page concludes of fastDP's buffers, plain as checkpointed, fused attention or not."""
    for attention in ("sdpa", "eager"):
        for checkpoint in ("none", "blocks"):
            base = curves()["RoBERTa base", attention, checkpoint]
            at = [b - 1 for b in base["block_boundaries"][2:]]
            row = [base["fastdp_bytes"][b] for b in at]
            assert row == sorted(row)
            assert row[-1] > row[0] + 4 * GIB
            falling = [base["fastdp_without_one_hot_bytes"][b] for b in at]
            assert min(falling) < falling[0]
            assert falling.index(min(falling)) >= 5
            assert row[-1] - falling[-1] == pytest.approx(base["one_hot_bytes"], rel=0.05)


def test_the_rows_of_the_other_models_fall_first() -> None:
    for name in ("RoBERTa large", "ViT-B/16", "ViT-L/16"):
        found = curves()[name, "sdpa", "none"]
        row = [found["fastdp_bytes"][b - 1] for b in found["block_boundaries"][1:]]
        lowest = row.index(min(row))
        assert lowest >= len(row) // 2 - 1
        assert row[: lowest + 1] == sorted(row[: lowest + 1], reverse=True)


def test_the_curves_of_this_engine_are_flat_or_have_a_minimum_in_the_middle() -> None:
    for (_, _, checkpoint), found in curves().items():
        low, high = min(found["ours_bytes"]), max(found["ours_bytes"])
        if checkpoint == "none":
            assert high < 1.03 * low
        else:
            place = found["ours_bytes"].index(low) / len(found["ours_bytes"])
            assert 0.4 < place < 0.6
            assert high > 1.4 * low
            assert found["floor_bytes"] < 0.7 * low


def test_with_expandable_segments_what_is_allocated_is_the_estimate_and_without_it_is_more() -> None:
    rows = document("reserved")["rows"]
    assert [row["model"] for row in rows] == list(REPLAYED)
    for row in rows:
        for found in row["groupings"]:
            estimate = found["estimate_bytes"]
            assert estimate <= found["expandable_allocated_bytes"] < 1.0001 * estimate
            assert estimate <= found["segments_allocated_bytes"] < 1.01 * estimate
            assert found["segments_allocated_bytes"] <= found["segments_reserved_bytes"]
            assert found["expandable_reserved_bytes"] < 1.1 * estimate


def test_on_the_card_what_was_asked_for_is_the_estimate_and_what_it_does_not_split_is_allocated_too() -> None:
    for kind, stem in GRIDS.items():
        rows = document(stem, "")["rows"]
        assert {row["checkpoint"] for row in rows} == {"blocks"}
        for row in rows:
            assert row["estimate_bytes"] < row["requested_bytes"] < 1.0001 * row["estimate_bytes"]
            missed = row["measured_bytes"] - row["estimate_bytes"]
            left = {"ViT-B/16": 41_472, "ResNet-50 with GroupNorm": 160_256}[row["model"]]
            if kind == "expandable":
                assert missed - left in range(0, 8 * 512, 512)
            else:
                assert left < missed < 0.007 * row["estimate_bytes"]


def test_the_card_allocated_what_was_foretold_without_it() -> None:
    for kind, stem in GRIDS.items():
        seen = {row["grouping"]: row for row in document(stem, "")["rows"] if row["model"] == "ViT-B/16"}
        for grouping in ("non-private", "all-layer", "layer-wise"):
            allocated, reserved = without_card()[kind, grouping]
            assert 0.998 < allocated / seen[grouping]["measured_bytes"] < 1
            assert 0.93 < reserved / seen[grouping]["reserved_bytes"] < 1


def test_every_check_on_the_card_passed() -> None:
    lines = (ROOT / "profiles" / f"checks-{CARD}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 73
    assert all("passed" in row and row["where"]["device"] == "NVIDIA H100 80GB HBM3" for row in rows)
