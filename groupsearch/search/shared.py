"""What processes that work on one search share: its storage, patience with it, and who is at work."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
import weakref
from abc import update_abstractmethods
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from groupsearch.errors import GroupSearchError

# -- A journal file that stays readable whatever happens to those who write it ---------------------

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


# -- Who works on a study, and who has died doing so -----------------------------------------------
#
# Optuna's heartbeat is for its databases and for its own loop (``Study.optimize``) only. Here a worker
# says that it lives by changing a user attribute of the study, which every storage has, and no clock is
# compared with another machine's: what counts is how long the attribute has stood still where it is read.

BEAT = "beat:"  # what the user attribute of a living worker begins with
BEAT_SECONDS = 10.0
GRACE_SECONDS = 60.0


def worker_name() -> str:
    """A name that no other worker has: host, machine, process, when that began, and a random part."""
    return "/".join((platform.node(), _machine(), str(os.getpid()), _begun(os.getpid()), uuid.uuid4().hex[:12]))


def is_known_dead(worker: str, me: str) -> bool:
    """Whether a worker was a process of this machine that has ended, or an earlier search of this process.

    False where that cannot be known from here: on another machine, in another container.
    """
    theirs, mine = worker.split("/"), me.split("/")
    if worker == me or len(theirs) != len(mine) or theirs[:2] != mine[:2]:
        return False
    if theirs[2:4] == mine[2:4]:
        return worker not in _EVALUATING
    return not _lives(int(theirs[2]), theirs[3])


@contextmanager
def beating(beat: Callable[[str, int], None], worker: str) -> Iterator[None]:
    """Say every ``BEAT_SECONDS`` that a worker lives, in a thread that ends with the block."""
    ended = threading.Event()

    def say() -> None:
        with suppress(GroupSearchError):  # the storage is gone for good: the evaluation's end will say so
            while not ended.wait(BEAT_SECONDS):
                beat(f"{BEAT}{worker}", time.monotonic_ns())

    thread = threading.Thread(target=say, daemon=True)
    _EVALUATING.add(worker)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        _EVALUATING.discard(worker)


class WorkerWatch:
    """Tells which of other workers have been silent for ``GRACE_SECONDS`` since they were first looked at."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, float]] = {}
        self._outages = 0

    def silent(self, thing: str, worker: str, beats: Mapping[str, Any], outages: int) -> bool:
        """Whether a worker has not said that it lives for all the time that this thing of its was seen.

        ``outages`` of the storage begin the time anew: nobody could say anything then.
        """
        if outages != self._outages:
            self._outages = outages
            self._seen.clear()
        beat, now = beats.get(f"{BEAT}{worker}"), time.monotonic()
        before, since = self._seen.setdefault(thing, (beat, now))
        if beat != before:
            self._seen[thing] = (beat, now)
            return False
        return now - since > GRACE_SECONDS


_EVALUATING: set[str] = set()  # workers of this process that are in an evaluation


def _machine() -> str:
    """What two processes share that can see each other: the boot of the machine and the space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return "unknown"


def _begun(process: int) -> str:
    """When a process began, in ticks since boot: a number that a later process of the same number does not have."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def _lives(process: int, begun: str) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _begun(process) == begun and _state(process) != "Z"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# -- A storage that several processes work on, and that may be out of reach for a while ------------

WORKER = "worker"  # the user attribute that says who runs a trial
_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0


class SharedStorage(BaseStorage):
    """Another storage, whose outages are waited for and where every running trial says who runs it.

    * An operation that fails because the storage is out of reach (a database that is restarted, a full
      disk, a folder that is gone for a moment) is tried again until it succeeds or ``patience_seconds`` passed.
    * A trial begins with the user attribute ``worker``, so that a dead worker's trials are known.
    * What is told of a trial that another worker took for abandoned is dropped: it stays as it was left.

    Attributes:
        worker: the name that trials are signed with, unlike that of any other storage object.
        outages: how often an operation failed and was tried again.
        patience_seconds: how long an outage may last.

    Raises:
        GroupSearchError: by every operation, when an outage lasts longer.
    """

    def __init__(self, inner: BaseStorage, shown: str = "memory", patience_seconds: float = 600.0) -> None:
        self.worker = worker_name()
        self.outages = 0
        self.patience_seconds = patience_seconds
        self._inner = inner
        self._shown = shown

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Begin or add a trial; one that runs is signed."""
        if template_trial is None:
            template_trial = create_trial(state=TrialState.RUNNING)
        if template_trial.state == TrialState.RUNNING:
            template_trial.set_user_attr(WORKER, self.worker)
        trial_id: int = self.patiently("create_new_trial", study_id, template_trial)
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Take a waiting trial, which is then signed, or finish one."""
        changed: bool = self.patiently("set_trial_state_values", trial_id, state, values)
        if changed and state == TrialState.RUNNING:
            self.patiently("set_trial_user_attr", trial_id, WORKER, self.worker)
        return changed

    def patiently(self, name: str, *arguments: Any, **named: Any) -> Any:
        """What the operation of this name gives, after an outage if there is one."""
        pause, begun = _FIRST_PAUSE_SECONDS, time.monotonic()
        while True:
            try:
                return getattr(self._inner, name)(*arguments, **named)
            except UpdateFinishedTrialError:
                if TrialState.RUNNING in arguments:
                    raise  # Optuna takes the next one that waits
                return False
            except Exception as error:  # each database driver has exceptions of its own
                if not is_outage(error):
                    raise
                self._wait(error, pause, time.monotonic() - begun)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _wait(self, error: Exception, pause: float, waited: float) -> None:
        self.outages += 1
        reason = str(error.__cause__ or error).partition("\n")[0]
        if waited > self.patience_seconds:
            raise GroupSearchError(
                f"Expected the storage {self._shown} within {self.patience_seconds:.0f} s, found: {reason}. What was "
                f"evaluated before is kept there. Bring it back, then go on with --resume."
            ) from error
        if _FIRST_PAUSE_SECONDS < pause <= 2 * _FIRST_PAUSE_SECONDS:  # the first may be a connection grown old
            _LOG.warning("The storage %s cannot be used (%s). Waiting for it.", self._shown, reason)
        time.sleep(pause)


def share(inner: BaseStorage, shown: str = "memory") -> SharedStorage:
    """A storage for this worker; ``shown`` is what messages call it."""
    return SharedStorage(inner, shown)  # type: ignore[abstract]  # the rest is added below


def _forward(name: str) -> Callable[..., Any]:
    def operation(self: SharedStorage, *arguments: Any, **named: Any) -> Any:
        return self.patiently(name, *arguments, **named)

    return operation


# The last has a body in the base class, which reads all trials.
for _name in (*SharedStorage.__abstractmethods__, "get_trial_id_from_study_id_trial_number"):
    setattr(SharedStorage, _name, _forward(_name))
update_abstractmethods(SharedStorage)  # type: ignore[type-abstract]


def is_outage(error: Exception) -> bool:
    """Whether an error says that the storage is out of reach, not that it was asked for something wrong."""
    if isinstance(error, OSError):
        return True
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not type(cause).__module__.startswith("sqlalchemy"):
        return False
    from sqlalchemy import exc  # only here: a journal does without

    lost = getattr(cause, "connection_invalidated", False)  # in the middle of an operation
    return bool(lost) or isinstance(cause, exc.InterfaceError | exc.OperationalError | exc.PendingRollbackError)


# -- Where a study lives: in a journal file, in a database, or in memory ---------------------------

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
