"""Grouping and norm methods chosen together."""

from groupsearch.joint.alternatives import Alternatives, operations
from groupsearch.joint.choice import JOINT, Choice, fewest_operations, least_peak_choice

__all__ = ["JOINT", "Alternatives", "Choice", "fewest_operations", "least_peak_choice", "operations"]
