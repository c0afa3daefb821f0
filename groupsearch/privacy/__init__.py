"""What is stated of a private training: one value and its words, and whether what is seen fits them. No torch."""

from groupsearch.privacy.statement import NOT_PRIVATE, PrivacyStatement, SelectionCost, not_private_sentence

__all__ = ["NOT_PRIVATE", "PrivacyStatement", "SelectionCost", "not_private_sentence"]
