"""What fits into a memory: the largest batch, or the longest sequence, of every grouping.

A peak is a maximum of moments, each of them affine in the batch, and the best grouping changes with
the batch: interpolation only says where to look next, and what is named was traced.
"""

from groupsearch.fit.largest import largest_within
from groupsearch.fit.rates import add_rates
from groupsearch.fit.rows import MARGIN, QUANTILE, Room, fit_rows, largest_expected, poisson_part, summarise
from groupsearch.fit.sizes import BATCH, LIMIT, Sizes, length_setting

__all__ = [
    "BATCH",
    "LIMIT",
    "MARGIN",
    "QUANTILE",
    "Room",
    "Sizes",
    "add_rates",
    "fit_rows",
    "largest_expected",
    "largest_within",
    "length_setting",
    "poisson_part",
    "summarise",
]
