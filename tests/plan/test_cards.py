"""Cards by name, and what of their memory torch's libraries keep."""

from __future__ import annotations

import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.plan.cards import CARDS, GIB, card_of, named_cards


def test_devices_of_this_machine_are_no_cards_and_names_are_found():
    assert [card_of(text) for text in (None, "cpu", "cuda", "cuda:0", "cuda:12", "meta")] == [None] * 6
    assert [card_of(text) for text in named_cards()] == list(CARDS.values())
    assert card_of("CUDA:H100") is CARDS["h100"]


def test_a_card_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(GroupSearchError, match=r"cuda:h100, .*cuda:rtx4090.*found 'cuda:h1000'"):
        card_of("cuda:h1000")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_has_less_than_its_maker_says(card):
    sold = int(card.title.split()[-1].removesuffix("GB"))
    assert 0.88 * sold * 10**9 < card.memory_bytes < sold * GIB


def test_cublas_keeps_32_mib_for_each_of_two_threads_on_hopper_and_8320_kib_elsewhere():
    assert {c.workspace_bytes for c in CARDS.values() if c.capability == (9, 0)} == {64 * 2**20}
    assert {c.workspace_bytes for c in CARDS.values() if c.capability != (9, 0)} == {2 * 8320 * 2**10}
