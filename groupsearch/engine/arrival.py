"""What a backward pass delivers: sites, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from groupsearch.engine.entries import Entry
from groupsearch.engine.layers import Layer
from groupsearch.engine.passes import Pass


@dataclass(frozen=True)
class Arrival:
    """A site whose output gradient is there.

    Attributes:
        key: the layer's name, or ``layer.parameter`` for a bare parameter.
        layer: the layer.  kind: of the site.
        make_entry: forms the book entry (this is where norms by instantiation cost memory).
        source_pass: the forward pass it belongs to.
        expansions: what it was expanded to, if it is a parameter or a layer that saw no batch.
    """

    key: str
    layer: Layer
    kind: str
    make_entry: Callable[[], Entry] = field(repr=False)
    source_pass: Pass = field(repr=False)
    expansions: tuple[tuple[int, int], ...] | None = None


Receiver = Callable[[Arrival], None]
