"""Where people's loops are: transformers' Trainer, TRL, accelerate and Lightning, made private.

``transformers``, ``trl``, ``accelerate`` and ``lightning`` import the library of their name; nothing else here does.
"""

from groupsearch.integrations.privacy import MicroBatches, Privacy

__all__ = ["MicroBatches", "Privacy"]
