"""docs/clip21.md says what the committed study says, and that says what the page concludes."""

from __future__ import annotations

from groupsearch.jobs.study import ENTRIES, Plan, StudyRequest
from tests.support.clip21_page import BLOCKS, PAGE, cells, medians, study, with_numbers
from tests.support.memory_page import BLOCK


def test_the_page_has_the_numbers_of_the_document() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_numbers(text)
    assert {name for _, name, _ in BLOCK.findall(text)} == set(BLOCKS)


def test_the_document_is_the_whole_study() -> None:
    plan = Plan.of(StudyRequest())
    found, asked = study(), list(plan.jobs())
    assert found.settings["quick"] is False
    assert (found.thresholds, found.records) == (plan.thresholds, plan.records)
    assert sum(cell.steps == "tuned" for cell in found.cells) == len(asked)
    assert {cell.method for cell in found.cells} == {entry.name for entry in ENTRIES}


def test_error_feedback_mends_clipping_at_small_thresholds() -> None:
    clipped, mended = medians("clip-gd"), medians("clip21-gd")
    assert all(a > 10 * b for a, b in zip(clipped[:3], mended[:3], strict=True))
    one_by_one = zip(cells("clip-gd"), cells("clip21-gd"), strict=True)
    assert all(a.squared[k] > b.squared[k] for a, b in one_by_one for k in range(3))


def test_momentum_helps_stochastic_clip21_at_small_thresholds() -> None:
    assert all(a > b for a, b in zip(medians("clip21-sgd")[:2], medians("clip21-sgd2m")[:2], strict=True))


def test_clipping_ends_later_for_smaller_thresholds() -> None:
    for cell in cells("clip21-gd"):
        known = [step for step in cell.inactive_from if step is not None]
        if "logistic" in cell.problem:
            assert known == sorted(known, reverse=True)
            assert len(known) >= 4


def test_noise_keeps_what_it_promises() -> None:
    for row in study().guarantees:
        assert row.of_weights <= row.epsilon < row.of_messages
