"""Who works on a study, and who has died doing so.

Optuna's heartbeat is for its databases and for its own loop (``Study.optimize``) only. Here a worker
says that it lives by changing a user attribute of the study, which every storage has, and no clock is
compared with another machine's: what counts is how long the attribute has stood still where it is read.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from groupsearch.errors import GroupSearchError

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


class Watch:
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
