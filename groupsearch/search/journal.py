"""A journal file that stays readable whatever happens to those who write it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from groupsearch.errors import GroupSearchError

# The lock is held while a few lines are written; what a killed process leaves is broken after this long.
LOCK_GRACE_SECONDS = 5
_JOURNAL_START = b'{"op_code":'
_TAIL_BYTES = 1 << 16


class Journal(JournalFileBackend):
    """Optuna's journal file; a line that was not written to its end is cut off before the next is added.

    A kill in the middle of a write, or a full disk, leaves such a line. Optuna reads past it but adds to
    it, and from then on the file is unreadable. Here a write is whole or taken back, under the lock, and
    a file that is gone is waited for, never begun anew.

    Raises:
        GroupSearchError: when there is a file at this path that is no journal; it is left as it is.
    """

    def __init__(self, path: Path) -> None:
        lock = JournalFileOpenLock(str(path), grace_period=LOCK_GRACE_SECONDS)
        _check_kind(path)
        super().__init__(str(path), lock_obj=lock)
        self._path, self._writing = path, lock
        with _held(lock):
            _append(path, b"")  # cuts what a kill left, and says now rather than later that nothing can be written

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines to the end, all or none.

        Raises:
            OSError: when they cannot be written; the file is then as it was.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with _held(self._writing):
            _append(self._path, lines.encode())


def _check_kind(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(len(_JOURNAL_START))
    if start != _JOURNAL_START[: len(start)]:
        raise GroupSearchError(
            f"Expected a journal of studies in {path}, found another kind of file, and left it as it is. "
            f"Name another file with --storage."
        )


@contextmanager
def _held(lock: JournalFileOpenLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # it was held for so long that another process broke it
            lock.release()


def _append(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        # Optuna's lock can be taken by two when it is broken; the kernel's cannot, where the file system has it.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        whole = _end_of_last_line(file, size)
        if whole < size:
            os.ftruncate(file, whole)
        if not data:
            return
        try:
            written = os.write(file, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, whole)
            raise
    finally:
        os.close(file)


def _end_of_last_line(file: int, size: int) -> int:
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
