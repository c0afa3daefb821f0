"""Worker processes that search together, log what they evaluate, and may be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from groupsearch.search import Choice, Outcome, SearchResult, SearchSettings
from groupsearch.search import shared as journal
from groupsearch.search import shared as workers
from groupsearch.search.run import await_study, run_together
from groupsearch.search.shared import SharedStorage
from tests.search.problem import Boundaries, Problem

_FORK = multiprocessing.get_context("forkserver")  # a new process in milliseconds, without this one's threads
_FORK.set_forkserver_preload(["tests.search.crew"])


@dataclass
class Sleeper:
    """Evaluates a synthetic problem, slowly, and writes down when it begins and ends."""

    problem: Problem
    log: Path
    seconds: float = 0.0

    def __call__(self, choice: Choice, seed: int) -> Outcome:
        self._note("begin", choice.boundaries, seed)
        time.sleep(self.seconds)
        outcome = self.problem.evaluate(choice, seed)
        self._note("end", choice.boundaries, seed)
        return outcome

    def _note(self, word: str, boundaries: Boundaries, seed: int) -> None:
        line = f"{word} {os.getpid()} {seed} {','.join(map(str, boundaries))} {time.monotonic()}\n"
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(file, line.encode())
        os.close(file)


@dataclass
class Crew:
    """Processes that work on one study."""

    sleeper: Sleeper
    settings: SearchSettings
    grace_seconds: float = 60.0
    members: list[BaseProcess] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)

    def hire(self, *, wait: bool = False, user: int | None = None, fatal: int | None = None) -> BaseProcess:
        """Start one more worker; at its storage operation ``fatal``, just before or just after it, it kills itself."""
        arguments = (self.sleeper, self.settings, self.grace_seconds, wait, user)
        target, arguments = (_work, arguments) if fatal is None else (_work_until, (fatal, *arguments))
        member = _FORK.Process(target=target, args=arguments, daemon=True)
        member.start()
        self.members.append(member)
        return member

    def kill(self, member: BaseProcess) -> None:
        """End a worker with kill -9."""
        assert member.pid is not None
        os.kill(member.pid, signal.SIGKILL)
        member.join()
        assert member.exitcode == -signal.SIGKILL
        self.members.remove(member)
        self.killed.append(member.pid)

    def bury(self, member: BaseProcess, timeout: float = 60) -> None:
        """Wait until a worker has killed itself."""
        member.join(timeout)
        assert member.exitcode == -signal.SIGKILL
        assert member.pid is not None
        self.members.remove(member)
        self.killed.append(member.pid)

    def finish(self, timeout: float = 120) -> None:
        """Wait until all that are left have ended the study, without error."""
        end = time.monotonic() + timeout
        for member in self.members:
            member.join(end - time.monotonic())
            assert member.exitcode == 0, f"worker ended with {member.exitcode}"

    def notes(self) -> list[list[str]]:
        """What began and ended, in order: the word, who, the seed, the boundaries."""
        return [line[:4] for line in self._lines()]

    def begun(self) -> dict[str, list[float]]:
        """When each worker began its evaluations, by the clock that all processes of a machine share."""
        moments: dict[str, list[float]] = {}
        for word, worker, _, _, moment in self._lines():
            if word == "begin":
                moments.setdefault(worker, []).append(float(moment))
        return moments

    def ended(self) -> Counter[tuple[str, str]]:
        """How often an evaluation was made to its end."""
        return Counter((seed, cuts) for word, _, seed, cuts in self.notes() if word == "end")

    def _lines(self) -> list[list[str]]:
        text = self.sleeper.log.read_text() if self.sleeper.log.exists() else ""
        return [line.split(" ") for line in text.splitlines()]

    def wait_for(self, word: str, count: int, timeout: float = 60) -> None:
        """Wait until so many evaluations have begun or ended."""
        end = time.monotonic() + timeout
        while sum(note[0] == word for note in self.notes()) < count:
            assert time.monotonic() < end, f"fewer than {count} evaluations {word} in {timeout} s"
            ended = [member.exitcode for member in self.members if member.exitcode]
            assert not ended, f"a worker ended with {ended[0]}"
            time.sleep(0.01)

    def wait_for_all(self, timeout: float = 60) -> None:
        """Wait until every worker is at an evaluation, or has been."""
        end = time.monotonic() + timeout
        while len(self.begun()) < len(self.members):
            assert time.monotonic() < end, f"only {len(self.begun())} workers began in {timeout} s"
            time.sleep(0.01)

    def spared(self) -> set[tuple[str, str]]:
        """What killed workers were at: all that may have been begun, or ended unsaid, and be made again."""
        last = {note[1]: (note[2], note[3]) for note in self.notes()}
        return {last[str(pid)] for pid in self.killed if str(pid) in last}

    def check(self, result: SearchResult) -> None:
        """Hold that nothing finished was lost and nothing was evaluated twice but what a kill interrupted."""
        ended, spared = self.ended(), self.spared()
        kept = Counter((str(e.seed), ",".join(map(str, e.boundaries))) for e in result.evaluations)
        assert set(ended) - spared <= set(kept)
        assert set(kept) <= set(ended)
        assert set(kept.values()) == {1}
        assert {key: times for key, times in ended.items() if times > 1 and key not in spared} == {}


def _work(sleeper: Sleeper, settings: SearchSettings, grace_seconds: float, wait: bool, user: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    journal.LOCK_GRACE_SECONDS = 3
    workers.GRACE_SECONDS, workers.BEAT_SECONDS = grace_seconds, min(workers.BEAT_SECONDS, grace_seconds / 6)
    if user is not None:
        # Modules are loaded while they may be read.
        run_together(sleeper.problem.trace, sleeper.problem.evaluate, replace(settings, storage=None, trials=12))
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if wait:
        await_study(settings, 30)
    run_together(sleeper.problem.trace, sleeper, settings)


def _work_until(fatal: int, *arguments: Any) -> None:
    """Work to the storage operation of this number: odd ones are not made, even ones are."""
    patiently, count = SharedStorage.patiently, itertools.count(1)

    def mortal(self: SharedStorage, name: str, *given: Any, **named: Any) -> Any:
        number = next(count)
        answer = None if number == fatal and fatal % 2 else patiently(self, name, *given, **named)
        if number == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    SharedStorage.patiently = mortal  # type: ignore[method-assign]
    _work(*arguments)


def result_of(crew: Crew) -> SearchResult:
    """What the study gives when it is opened again; evaluating anything more is an error."""

    def evaluate(*arguments: Any) -> Outcome:
        raise AssertionError(f"evaluated again: {arguments}")

    return run_together(crew.sleeper.problem.trace, evaluate, crew.settings)
