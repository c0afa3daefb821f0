"""What functions of parameters are expanded to: the examples of a batch, or a number of the model's own.

A size alone does not tell, for in some batch the number of examples is the other number. So a trace, whose batches
have two sizes, notes which expansions grow with the batch, and the engine goes by that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from groupsearch.errors import UnsupportedModelError

Sizes = tuple[tuple[int, int], ...]
EXAMPLES = 0


class Expansions:
    """Tells expansions over the examples from others.

    Args:
        known: by the key of a parameter's site, the rank of what it was expanded to and its size in the dimension of
            the examples, 0 where that was their number. Of a parameter that is not in it, sizes decide.
    """

    def __init__(self, known: Mapping[str, Sizes]) -> None:
        self._known = known
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def seen(self, key: str) -> Sizes:
        """What a parameter was expanded to since :meth:`forget`."""
        return tuple(sorted(self._seen.get(key, ())))

    def forget(self) -> None:
        """A pass is over."""
        self._seen.clear()

    def over_examples(self, keys: Sequence[str], rank: int, size: int, fits: bool) -> bool:
        """Whether an expansion of a function of some parameters, whose size fits the examples or not, is over them.

        Raises:
            UnsupportedModelError: where it may be either.
        """
        known = [self._known[key] for key in keys if key in self._known]
        if fits and known:
            over = all((rank, EXAMPLES) in sizes for sizes in known)
            if over and size > 1 and all((rank, size) in sizes for sizes in known):
                raise UnsupportedModelError(
                    f"Parameter {keys[0]!r} is expanded over the examples and elsewhere to a size of {size}, which is "
                    "that of this batch, too: these cannot be told apart. Leave the second to broadcasting, or never "
                    f"take {size} examples in one physical batch."
                )
            fits = over
        for key in keys:
            if fits or size > 1:
                self._seen.setdefault(key, set()).add((rank, EXAMPLES if fits else size))
        return fits
