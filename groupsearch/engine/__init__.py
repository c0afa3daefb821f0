"""The Book-Keeping engine: per-example clipping by groups in one backward pass."""

from groupsearch.engine.private import PrivateEngine, make_private

__all__ = ["PrivateEngine", "make_private"]
