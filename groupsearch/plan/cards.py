"""CUDA devices by name: what is known of a card without having one."""

from __future__ import annotations

from dataclasses import dataclass

from groupsearch.errors import GroupSearchError

KIB, GIB = 2**10, 2**30
NOT_MEASURED = (
    "Not measured on a GPU: one step was traced without one, as it would be taken on {card}. What cuDNN and other "
    "libraries need inside their kernels is not known, and not counted."
)


@dataclass(frozen=True)
class Card:
    """One kind of CUDA device.

    Attributes:
        name: as in ``cuda:h100``.
        title: its maker's name.
        memory_gib: what torch reports as its total capacity, at the lower end of what is seen, in GiB.
        capability: compute capability (major, minor).
    """

    name: str
    title: str
    memory_gib: float
    capability: tuple[int, int]

    @property
    def memory_bytes(self) -> int:
        """Its total capacity."""
        return int(self.memory_gib * GIB)

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS keeps for the thread of the forward pass and for that of the backward pass.

        By torch's defaults 32 MiB each on Hopper and ``:4096:2:16:8`` elsewhere; cuBLASLt shares them.
        """
        one = 8 * 4096 * KIB if self.capability == (9, 0) else (2 * 4096 + 8 * 16) * KIB
        return 2 * one

    @property
    def not_measured(self) -> str:
        """In a sentence or two what an estimate for it rests on."""
        return NOT_MEASURED.format(card=f"an NVIDIA {self.title}")


CARDS = {
    card.name: card
    for card in (
        Card("h100", "H100 80GB", 79.1, (9, 0)),
        Card("h200", "H200 141GB", 139.8, (9, 0)),
        Card("a100", "A100 80GB", 79.1, (8, 0)),
        Card("a100-40gb", "A100 40GB", 39.3, (8, 0)),
        Card("l40s", "L40S 48GB", 44.3, (8, 9)),
        Card("l4", "L4 24GB", 21.9, (8, 9)),
        Card("a10g", "A10G 24GB", 21.9, (8, 6)),
        Card("rtx4090", "GeForce RTX 4090 24GB", 23.6, (8, 9)),
        Card("rtx3090", "GeForce RTX 3090 24GB", 23.6, (8, 6)),
        Card("t4", "T4 16GB", 14.5, (7, 5)),
    )
}


def card_of(device: str | None) -> Card | None:
    """The card that a device text names, as ``cuda:h100`` does; None for ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        GroupSearchError: for a name that is of no card.

    >>> card_of("cuda:h100").title, card_of("cuda:1"), card_of("cpu")
    ('H100 80GB', None, None)
    """
    kind, _, name = (device or "cpu").lower().partition(":")
    if kind != "cuda" or not name or name.isdigit():
        return None
    if name not in CARDS:
        raise GroupSearchError(
            f"Expected a device such as cpu, cuda, cuda:1, or a card to estimate for: {', '.join(named_cards())}; "
            f"found {device!r}."
        )
    return CARDS[name]


def named_cards() -> tuple[str, ...]:
    """Every device text that names a card."""
    return tuple(f"cuda:{name}" for name in CARDS)
