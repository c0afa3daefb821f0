"""What is stated of a private training: one value and its words, and whether what is seen fits them. No torch."""

from groupsearch.privacy.statement import PrivacyStatement, SelectionCost

__all__ = ["PrivacyStatement", "SelectionCost"]
