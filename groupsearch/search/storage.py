"""Where a study lives, and that a killed process leaves one that can be opened again."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from groupsearch.errors import GroupSearchError

# The lock is held while one line is written; what a killed process leaves is broken after this long.
_LOCK_GRACE_SECONDS = 5
_JOURNAL_START = b'{"op_code":'


def open_storage(storage: str | Path | None) -> BaseStorage:
    """A storage in a journal file, in a database (anything with ``://``), or in memory (None).

    Raises:
        GroupSearchError: when it cannot be opened, or the file is not a journal; it is then untouched.
    """
    if storage is None:
        return InMemoryStorage()
    if "://" in str(storage):
        return _open_database(str(storage))
    path = Path(storage)
    if not path.parent.is_dir():
        raise GroupSearchError(
            f"Expected the folder {path.parent} to keep the study in, found none. "
            f"Create it with `mkdir -p {path.parent}`, or name another file with --storage."
        )
    try:
        lock = JournalFileOpenLock(str(path), grace_period=_LOCK_GRACE_SECONDS)
        if path.exists():
            _cut_torn_line(path, lock)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise GroupSearchError(
            f"Expected to keep the study in {path}, found: {error.strerror or error}. "
            f"Name a file in a folder that can be written with --storage."
        ) from error
    except (ValueError, KeyError, AssertionError) as error:
        raise GroupSearchError(
            f"Expected a journal of studies in {path}, found a line that is none ({type(error).__name__}: {error}). "
            f"Restore the file from a copy, or begin another one with --storage."
        ) from error


def _open_database(url: str) -> BaseStorage:
    try:
        return RDBStorage(url)
    except Exception as error:  # each database driver has exceptions of its own
        shown = re.sub(r"//[^/]*@", "//***@", url)
        reason = str(error).replace(url, shown).partition("\n")[0]
        raise GroupSearchError(
            f"Expected a database of studies at {shown}, found: {type(error).__name__}: {reason}. Check the URL and "
            f"that the driver is installed, or name a file with --storage."
        ) from error


def _cut_torn_line(path: Path, lock: JournalFileOpenLock) -> None:
    """Drop a last line that was not written to its end.

    Optuna reads past such a line but appends to it, and from then on the journal is unreadable.
    """
    with path.open("rb") as file:
        start = file.read(len(_JOURNAL_START))
    if start != _JOURNAL_START[: len(start)]:
        raise GroupSearchError(
            f"Expected a journal of studies in {path}, found another kind of file, and left it as it is. "
            f"Name another file with --storage."
        )
    if path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock.acquire()  # what looks torn may be a line that another process is writing
    try:
        whole = path.read_bytes().rfind(b"\n") + 1
        with path.open("r+b") as file:
            file.truncate(whole)
    finally:
        lock.release()


def study_names(storage: BaseStorage) -> list[str]:
    """The names of the studies in a storage."""
    return optuna.get_all_study_names(storage)
