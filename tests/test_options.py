"""Norm methods per weight: which holds where, what is refused, and that documents keep them."""

from __future__ import annotations

import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.options import SITE_METHODS, EngineOptions
from groupsearch.tracer.step import StepSettings


def test_a_weight_goes_by_its_own_method_and_the_others_by_the_default() -> None:
    options = EngineOptions("mixed", {"a.weight": "recompute"})
    assert options.method_of("a.weight", 2, 100, 100) == "recompute"
    # T (d + p) = 400 < d p = 10,000; then 20,000 > 10,000.
    assert [options.method_of("b.weight", positions, 100, 100) for positions in (2, 100)] == ["ghost", "instantiate"]
    assert [EngineOptions(m).method_of("b.weight", 2, 100, 100) for m in SITE_METHODS] == list(SITE_METHODS)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(GroupSearchError, match="norm_method to be one of mixed, ghost, instantiate, recompute"):
        EngineOptions("fast")
    with pytest.raises(GroupSearchError, match=r"a\.weight to be one of ghost, instantiate, recompute, found 'mixed'"):
        EngineOptions("ghost", {"a.weight": "mixed"})


def test_methods_of_weights_that_have_no_choice_are_refused_by_name() -> None:
    options = EngineOptions("ghost", {"a.weight": "recompute", "b.weight": "ghost"})
    options.check_weights({"a.weight", "b.weight", "c.weight"})
    with pytest.raises(GroupSearchError, match=r"such as a\.weight, found one for b\.weight"):
        options.check_weights({"a.weight"})
    with pytest.raises(GroupSearchError, match=r"has none, found one for a\.weight, b\.weight"):
        options.check_weights(())


def test_options_of_equal_methods_are_equal_and_can_be_keys() -> None:
    one, same, other = (EngineOptions("ghost", m) for m in ({"a": "recompute"}, {"a": "recompute"}, {"a": "ghost"}))
    assert {one: 1}[same] == 1
    assert one != other


@pytest.mark.parametrize("methods", [{}, {"a.weight": "recompute", "b.weight": "instantiate"}])
def test_documents_keep_methods(methods: dict[str, str]) -> None:
    settings = StepSettings(EngineOptions("ghost", methods), "sgd")
    assert StepSettings.from_json(settings.to_json()) == settings
    assert ("methods" in settings.to_json()) == bool(methods)
