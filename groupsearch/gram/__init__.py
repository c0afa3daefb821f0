"""Gram matrices of per-example gradients, from which the effect of any clip plan follows without a model."""

from groupsearch.gram.matrices import Grams, clip_factors, sharing_pairs
from groupsearch.gram.score import Expectations, Moments, ProxyScore
from groupsearch.gram.storage import read_grams, write_grams

__all__ = [
    "Expectations",
    "Grams",
    "Moments",
    "ProxyScore",
    "clip_factors",
    "read_grams",
    "sharing_pairs",
    "write_grams",
]
