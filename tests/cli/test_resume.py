"""``train --resume`` after a kill at any instant: the weights of a training that nobody stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Advanced, Event, Interrupted, Said
from groupsearch.training.checkpoints import frozen_digest
from tests.cli.running import refused, run

DROPOUT = """
import torch
from torch import nn
from groupsearch.workloads import Data, TrainingDefaults, Workload

def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 2))
    model[3].requires_grad_(False)
    return model

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def metric(model, batch):
    return (model(batch["x"]).argmax(1) == batch["y"]).float()

def rows(count, seed):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x[:, 0] > 0).long()}

def factory(shape=16):
    data = Data(rows(200, 0), rows(50, 1))
    first = lambda count: {name: each[:count] for name, each in data.train.items()}
    training = TrainingDefaults(steps=6, learning_rate=0.01)
    return Workload("mine", build, first, loss, metric, data=data, batch_size=40, training=training)

def other(shape=16):
    def wider(seed=0):
        return nn.Sequential(build(seed), nn.Linear(2, 2))

    return Workload(**{**vars(factory()), "build": wider})
"""


class Stopped(Exception):
    """As a kill would, between two steps."""


def stopping(after: int) -> Callable[[Event], None]:
    def notify(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == after:
            raise Stopped

    return notify


def stopped(after: int, **asked: Any) -> None:
    with pytest.raises(Stopped):
        gs.train(**asked, notify=stopping(after))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(DROPOUT)
    return f"{tmp_path / 'mine.py'}:factory"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"optimizer": "momentum", "rule": "auto-s"},
        {"thresholds": "adaptive", "batch_size": 16},
        {"autocast": "float16", "watch": 1.0},
    ],
    ids=lambda how: ", ".join(how) or "plain",
)
def test_what_goes_on_is_what_was_never_stopped_bit_for_bit(how: dict[str, Any], file: str, tmp_path: Path) -> None:
    asked = {"model": file, "grouping": "all-layer", "seed": 3, "evaluate_every": 2, **how}
    whole = gs.train(**asked, save=tmp_path / "whole")
    place = tmp_path / "weights"
    stopped(3, **asked, save=place, checkpoint_every=2)
    assert not place.exists()
    told: list[Event] = []
    found = gs.train(**asked, save=place, checkpoint_every=2, resume=True, notify=told.append)
    assert [event.done for event in told if isinstance(event, Advanced)][-4:] == [3, 4, 5, 6], "from step 3 on"
    assert weights(place) == weights(tmp_path / "whole")
    assert (found.curve, found.thresholds, found.metric) == (whole.curve, whole.thresholds, whole.metric)
    assert found.privacy == whole.privacy
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py", "weights", "whole"}


def test_a_stop_after_the_last_checkpoint_and_before_the_first(file: str, tmp_path: Path) -> None:
    asked = {"model": file, "grouping": "all-layer", "seed": 3}
    gs.train(**asked, save=tmp_path / "whole")
    place, told = tmp_path / "weights", []
    stopped(1, **asked, save=place, checkpoint_every=6)
    asked |= {"save": place, "checkpoint_every": 3, "resume": True}
    stopped(2, **asked)
    with pytest.raises(KeyboardInterrupt):  # within the last evaluation's word: step 6 is in no checkpoint yet
        gs.train(**asked, notify=_interrupting(6))
    gs.train(**asked, notify=told.append)
    assert not [event for event in told if isinstance(event, Said)]
    assert weights(place) == weights(tmp_path / "whole")


def _interrupting(at: int) -> Callable[[Event], None]:
    def notify(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == at:
            raise KeyboardInterrupt

    return notify


def test_an_interrupted_document_says_how_to_go_on_and_is_replaced(file: str, tmp_path: Path) -> None:
    def interrupting(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == 4:
            raise KeyboardInterrupt

    place, asked = tmp_path / "it.json", {"save": tmp_path / "weights", "checkpoint_every": 2, "steps": 6}
    with pytest.raises(Interrupted) as interrupt:
        gs.train(file, grouping="all-layer", **asked, notify=interrupting)
    document = interrupt.value.document
    assert document is not None
    following = document.following(place)
    assert following is not None
    assert following.command is not None
    document.save(place)
    words = shlex.split(following.command)[1:]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert json.loads(place.read_text())["steps"] == 6
    shutil.rmtree(tmp_path / "weights")
    assert "exists already" in refused(*words), "a finished one is not"


def test_without_a_seed_it_goes_on_with_fresh_noise_and_tells_nothing_of_the_old(file: str, tmp_path: Path) -> None:
    asked = {"model": file, "grouping": "all-layer", "save": tmp_path / "weights", "checkpoint_every": 2}
    stopped(3, **asked)
    state = torch.load(tmp_path / "weights.checkpoint", weights_only=True)
    assert "generator" not in state["engine"]["mechanism"]
    assert "generator" not in state["batches"]
    assert state["dropout"] == []
    found = gs.train(**asked, resume=True)
    assert found.steps == 6
    assert (found.randomness.secret, found.randomness.seed) == (True, None)


def test_what_does_not_belong_to_the_training_is_refused(file: str, tmp_path: Path) -> None:
    place = tmp_path / "weights"
    asked = {"model": file, "grouping": "all-layer", "seed": 3, "save": place, "checkpoint_every": 2}
    stopped(3, **asked)
    for change, message in (
        ({"learning_rate": 0.5}, r"other settings: learning_rate 0\.01, here 0\.5.*--force"),
        ({"seed": 4}, "seed 3, here 4"),
        ({"seed": None}, "seed 3, here None"),
        ({"grouping": "layer-wise"}, "grouping all-layer, here 1"),
        ({"steps": 7}, "steps 6, here 7"),
        ({"setting": {"shape": 3}}, "setting shape None, here 3"),
        ({"model": file.replace("factory", "other")}, "model .*factory, here .*other"),
    ):
        with pytest.raises(GroupSearchError, match=message):
            gs.train(**{**asked, **change}, resume=True)
    text = (tmp_path / "mine.py").read_text()
    for old, new, message in (
        ("Linear(16, 2)", "Linear(16, 3)", r"of another model: it has other weights to train, such as 4\.weight"),
        (
            "model[3].requires_grad_(False)",
            "model[3].requires_grad_(False).weight.data.zero_()",
            "other frozen weights",
        ),
    ):
        assert old in text
        (tmp_path / "mine.py").write_text(text.replace(old, new))
        with pytest.raises(GroupSearchError, match=message):
            gs.train(**asked, resume=True)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(GroupSearchError, match=r"checkpoint of a training that did not end.*--resume.*--force"):
        gs.train(**asked)
    (tmp_path / "weights.checkpoint").write_bytes(b"PK")
    with pytest.raises(GroupSearchError, match="found another file"):
        gs.train(**asked, resume=True)
    gs.train(**asked, force=True)
    with pytest.raises(GroupSearchError, match="weights of a finished training"):
        gs.train(**asked, resume=True)


def test_checkpoints_lie_beside_weights_that_are_saved() -> None:
    for more in (["--resume"], ["--checkpoint-every", 2]):
        assert "Give --save FOLDER, too" in refused("train", "digits-vit", "--grouping", "best:2", *more, "--json")


def test_frozen_weights_are_told_apart() -> None:
    def model(value: float, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
        made = torch.nn.Linear(2, 2).to(dtype).requires_grad_(False)
        torch.nn.init.constant_(made.weight, value)
        torch.nn.init.constant_(made.bias, 0.0)
        return made

    assert frozen_digest(model(1.0)) == frozen_digest(model(1.0))
    assert len({frozen_digest(model(1.0)), frozen_digest(model(1.5)), frozen_digest(model(1.0, torch.float32))}) == 3


def _train(place: str) -> None:
    """In a process that is killed: the command as a user starts it, its words into a file."""
    with open(f"{place}.log", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        result = run(*command(place))
        file.write(result.output)
    os._exit(result.exit_code)


def command(place: str) -> list[object]:
    settings = [part for key in ("blocks=1", "width=8") for part in ("--setting", key)]
    options = ("--grouping", "best:2", "--steps", 20, "--seed", 7, "--checkpoint-every", 1)
    return ["train", "digits-vit", *settings, *options, "--save", place, "--resume", "--json"]


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Path], BaseProcess]]:
    """Starts a training in a process of its own, with everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["groupsearch.jobs.train", "groupsearch.cli.train", "tests.cli.test_resume"])
    started: list[BaseProcess] = []

    def begin(place: Path) -> BaseProcess:
        process = context.Process(target=_train, args=(str(place),))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_instants_the_weights_are_the_same(
    kills: int, start: Callable[[Path], BaseProcess], tmp_path: Path
) -> None:
    whole = start(tmp_path / "warm")  # until its server has imported everything, and the disk has what it reads
    whole.join(120)
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join(120)
    seconds = time.monotonic() - began
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    assert weights(tmp_path / "warm") == weights(tmp_path / "whole")
    seed = random.SystemRandom().randrange(2**32)
    instants, place, happened = random.Random(seed), tmp_path / "weights", []
    while happened.count(-signal.SIGKILL) < kills:
        process = start(place)
        process.join(instants.random() * seconds)
        process.kill()
        process.join()
        happened.append(process.exitcode)
        assert len(happened) < 6 * kills, (seed, happened)
        if place.exists():  # it has ended, or almost: the next one begins anew
            assert weights(place) == weights(tmp_path / "whole"), (seed, happened)
            shutil.rmtree(place)
            (tmp_path / "weights.checkpoint").unlink(missing_ok=True)
    last = start(place)
    last.join(120)
    assert last.exitcode == 0, (seed, happened, (tmp_path / "weights.log").read_text())
    assert weights(place) == weights(tmp_path / "whole"), (seed, happened)
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not hidden, "the last one has cleared up after those that were killed"
    cards = [json.loads((tmp_path / name / "privacy.json").read_text()) for name in ("weights", "whole")]
    assert cards[0]["privacy"] == cards[1]["privacy"]
