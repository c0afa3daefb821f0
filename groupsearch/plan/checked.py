"""What was checked of a model before it is trained privately, and what the watch saw; no torch.

Frozen values that travel with a trace, a grouping and an engine, and into documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Checked:
    """The engine's gradients were compared with plain autograd's, one example at a time, and agreed.

    Attributes:
        mode: ``training``, ``evaluation`` or which part of the modules was in training.
        dtype: of the weights.
        device: where the passes ran.
        batches: the batches that were tried, as ``row 0``, ``rows 1 0``, ...
        rows: where the rows came from.
        draws: what random draws were meanwhile.
        worst: the largest difference of an example's gradient from the truth, relative to the example's own.
        skipped: what was not checked, and why.
        state: what a forward pass leaves behind, and what that gives away.
    """

    mode: str
    dtype: str
    device: str
    batches: tuple[str, ...]
    rows: str
    draws: str
    worst: float
    skipped: tuple[str, ...] = ()
    state: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain structure; :meth:`from_json` is its inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Checked:
        """What :meth:`to_json` wrote.

        Raises:
            TypeError: when a part is missing.
        """
        known: dict[str, Any] = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        for key in ("batches", "skipped", "state"):
            known[key] = tuple(known.get(key, ()))
        return cls(**known)

    def __str__(self) -> str:
        lines = [
            f"Every example's gradient compared with plain autograd on that example alone, in {self.mode} mode, in "
            f"{self.dtype} on {self.device}: largest difference {self.worst:.0e} of the example's gradient.",
            f"Batches tried: {'; '.join(self.batches)} ({self.rows}). Random draws: {self.draws}.",
            *(f"Left behind: {text}." for text in self.state),
            *(f"Not checked: {text}." for text in self.skipped),
        ]
        return "\n".join(lines)


def merged(checks: Sequence[Checked]) -> Checked:
    """Checks of one model at different draws as one."""
    first = checks[0]
    return replace(
        first,
        draws=", then ".join(check.draws for check in checks),
        worst=max(check.worst for check in checks),
        skipped=tuple(dict.fromkeys(text for check in checks for text in check.skipped)),
        state=tuple(dict.fromkeys(text for check in checks for text in check.state)),
    )


@dataclass(frozen=True)
class Watched:
    """What the watch in training has done.

    Attributes:
        rate: probability with which a physical batch is looked at.
        batches: physical batches that were handed out.
        runs: how many of them were looked at.
        seconds: what that took.
        worst: the largest difference found, relative to the example's own gradient.
        skipped: batches that were to be looked at, when the device had no memory left.
    """

    rate: float
    batches: int = 0
    runs: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """A plain structure."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"Watch: {self.runs} of {self.batches} physical batches looked at (rate {self.rate:g}), "
            f"{self.seconds:.3g} s, largest difference {self.worst:.0e}"
            + (f"; {self.skipped} passed over for want of memory." if self.skipped else ".")
        )
