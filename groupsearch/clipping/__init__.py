"""What clips an example's gradient: groups, thresholds, rule, noise, and the sensitivity they leave."""

from groupsearch.clipping.adaptive import AdaptiveQuantile, gradient_noise_multiplier
from groupsearch.clipping.plan import ALLOCATIONS, AUTO_S_GAMMA, NOISE_ALLOCATIONS, RULES, ClipPlan

__all__ = [
    "ALLOCATIONS",
    "AUTO_S_GAMMA",
    "NOISE_ALLOCATIONS",
    "RULES",
    "AdaptiveQuantile",
    "ClipPlan",
    "gradient_noise_multiplier",
]
