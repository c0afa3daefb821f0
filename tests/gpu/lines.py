"""A document that grows line by line: what is written stays when the time is over, and is not done again."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

Key = tuple[Any, ...]


def where(device: str) -> dict[str, Any]:
    """Device, torch and allocator: what numbers may be compared within."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


class Lines:
    """Rows as JSON, one a line, each with where it comes from.

    Args:
        path: goes on where it ends; rows of another device, torch or allocator do not count as done.
        keys: names of what tells rows apart.
        device: a torch device.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], device: str) -> None:
        self._path = path
        self._keys = keys
        self._where = where(device)
        found = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = [row for row in map(json.loads, found) if row["where"] == self._where]

    def has(self, **key: Any) -> bool:
        """Whether a row is there and came to its end."""
        wanted = tuple(key[name] for name in self._keys)
        return any(tuple(row[name] for name in self._keys) == wanted and "failed" not in row for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        self.rows.append({**row, "where": self._where})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
