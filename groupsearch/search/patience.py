"""A storage that several processes work on, and that may be out of reach for a while."""

from __future__ import annotations

import logging
import time
from abc import update_abstractmethods
from collections.abc import Callable, Sequence
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from groupsearch.errors import GroupSearchError
from groupsearch.search.workers import worker_name

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
