"""Where a layer keeps the examples of a batch, and how to see its tensors example by example.

``first``: (B, ...). ``folded``: (B k, ...), the k rows of an example side by side, as windows of
an image or frames of a film are. ``second``: (T, B, ...), as recurrent layers have it. ``whole``:
inside the module rows have left their examples (routed tokens); only what goes in and out is
first or folded.

The model itself may be called with several rows of every example (augmented views, triplets): then all of
this is of K B rows, side by side or apart (:class:`~groupsearch.plan.trace.Rows`), and belongs to B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.trace import Rows, Site

ONE_ROW = Rows()


@dataclass(frozen=True)
class Layouts:
    """Where the layers of a model keep the examples.

    Attributes:
        of: by the layer's name, if not in the first dimension.
        rows: what the model itself is called with.
        lent: layers whose parameters are used outside of their own forward, too.
        expansions: see :class:`~groupsearch.engine.layout.Expansions`.
    """

    of: Mapping[str, str] = field(default_factory=dict)
    rows: Rows = ONE_ROW
    lent: frozenset[str] = frozenset()
    expansions: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @classmethod
    def of_sites(cls, sites: Sequence[Site]) -> Layouts:
        """What a trace found."""
        of = {site.layer: site.layout for site in sites if site.layout != "first"}
        lent = frozenset(site.layer for site in sites if site.lent)
        expansions = {x.name.partition("#")[0]: x.expansions for x in sites if x.expansions is not None}
        return cls(of, sites[0].rows if sites else ONE_ROW, lent, expansions)


def rows_per_example(tensor: Tensor, layout: str, batch_size: int, rows: Rows = ONE_ROW) -> int | None:
    """K of a tensor that keeps ``batch_size`` examples in this layout, None of one that does not.

    1 for ``first``, and for ``second`` unless the model is called with several rows of an example.
    """
    shape = tensor.shape
    if layout == "second":
        return rows.count if len(shape) > 1 and shape[1] == batch_size * rows.count else None
    if not shape or (layout == "first" and shape[0] != batch_size):
        return None
    if batch_size == 0:
        return 1 if shape[0] == 0 else None
    if rows.apart and shape[0] != batch_size and shape[0] % (batch_size * rows.count):
        return None
    return shape[0] // batch_size if shape[0] and shape[0] % batch_size == 0 else None


def by_example(tensor: Tensor, layout: str, batch_size: int, rows: Rows = ONE_ROW) -> Tensor:
    """The tensor with the examples in the first dimension: (B, ...), for several rows of an example (B, k, ...)."""
    if layout == "second":
        moved = tensor.transpose(0, 1)
        return moved if rows.count == 1 else unfold_rows(moved, batch_size, rows)
    if layout == "folded":
        return unfold_rows(tensor, batch_size, rows)
    return tensor


def unfold_rows(tensor: Tensor, batch_size: int, rows: Rows = ONE_ROW) -> Tensor:
    """(B k, ...) as (B, k, ...); of rows that lie apart, (K B k, ...) as (B, K k, ...)."""
    each = tensor.shape[0] // batch_size if batch_size else 1
    if not rows.apart or each == 1:
        return tensor.unflatten(0, (batch_size, each))
    inner = each // rows.count
    if inner == 1:
        return tensor.unflatten(0, (each, batch_size)).transpose(0, 1)
    return tensor.unflatten(0, (rows.count, batch_size, inner)).transpose(0, 1).flatten(1, 2)


def fold_rows(tensor: Tensor, rows: Rows = ONE_ROW) -> Tensor:
    """(B, k, ...) in the order that the model has them: the inverse of :func:`unfold_rows`."""
    if not rows.apart or tensor.shape[1] == 1:
        return tensor.flatten(0, 1)
    return tensor.unflatten(1, (rows.count, -1)).transpose(0, 1).flatten(0, 2)


# -- What functions of parameters are expanded to: the examples of a batch, or a number of the model's own
#
# A size alone does not tell, for in some batch the number of examples is the other number. So a trace, whose batches
# have two sizes, notes which expansions grow with the batch, and the engine goes by that.

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
