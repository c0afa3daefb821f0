"""Where a study lives: in a journal file, in a database, or in memory."""

from __future__ import annotations

import re
import time
import weakref
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage

from groupsearch.errors import GroupSearchError
from groupsearch.search.journal import Journal
from groupsearch.search.patience import SharedStorage, is_outage, share

_ATTEMPTS = 10
_PATIENCE_SECONDS, _PAUSE_SECONDS = 600.0, 1.0
_USED: set[str] = set()  # databases that were opened


def open_storage(storage: str | Path | None) -> SharedStorage:
    """A storage in a journal file, in a database (anything with ``://``), or in memory (None).

    Raises:
        GroupSearchError: when it cannot be opened, or the file is not a journal; it is then untouched.
    """
    if storage is None:
        return share(InMemoryStorage())
    where = shown(storage)
    if "://" in str(storage):
        return share(_open_database(str(storage)), where)
    return share(_open_journal(Path(storage)), where)


def shown(storage: str | Path | None) -> str:
    """A storage as it may be shown to anybody: a database without user and password.

    >>> shown("postgresql://user:secret@host/base")
    'postgresql://***@host/base'
    """
    return "memory" if storage is None else re.sub(r"//[^/]*@", "//***@", str(storage))


def study_names(storage: BaseStorage) -> list[str]:
    """The names of the studies in a storage."""
    return optuna.get_all_study_names(storage)


def _open_journal(path: Path) -> BaseStorage:
    if not path.parent.is_dir():
        raise GroupSearchError(
            f"Expected the folder {path.parent} to keep the study in, found none. "
            f"Create it with `mkdir -p {path.parent}`, or name another file with --storage."
        )
    try:
        return JournalStorage(Journal(path))
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
    begun = time.monotonic()
    while True:
        try:
            return _database(url)
        except Exception as error:  # each database driver has exceptions of its own
            # What this process has used before is away for a while; what it has not may be a wrong name.
            if url not in _USED or not is_outage(error) or time.monotonic() - begun > _PATIENCE_SECONDS:
                raise _refusal(url, error) from error
            time.sleep(_PAUSE_SECONDS)


def _database(url: str) -> BaseStorage:
    if url not in _USED:  # looking for tables takes longer than all else
        _make_tables(url)
    database = RDBStorage(url, skip_table_creation=True)
    _USED.add(url)
    weakref.finalize(database, database.engine.dispose)  # else its connections stay open
    return optuna.storages.get_storage(database)  # adds Optuna's cache of finished trials


def _refusal(url: str, error: Exception) -> GroupSearchError:
    reason = str(error).replace(url, shown(url)).partition("\n")[0]
    return GroupSearchError(
        f"Expected a database of studies at {shown(url)}, found: {type(error).__name__}: {reason}. Check the URL "
        f"and that the driver is installed (for postgresql://: `pip install 'groupsearch[postgresql]'`), or name "
        f"a file with --storage."
    )


def _make_tables(url: str) -> None:
    """Make the tables that are missing; several workers may try at once, and all but one fail."""
    from sqlalchemy.pool import NullPool  # only here: a journal does without

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            RDBStorage(url, engine_kwargs={"poolclass": NullPool})
            return
        except Exception as error:
            if attempt == _ATTEMPTS or not _made_by_another(error):
                raise
            time.sleep(0.1 * attempt)


def _made_by_another(error: Exception) -> bool:
    """Whether tables could not be made because another worker made them at the same time."""
    from sqlalchemy.exc import DBAPIError  # only here: a journal does without

    return isinstance(error, DBAPIError) and any(word in str(error) for word in ("already exists", "duplicate key"))
