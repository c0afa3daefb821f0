"""The step that train and optimize trace is the step that is trained: pieces, autocast, and what contradicts itself."""

from __future__ import annotations

import json

import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.jobs.evaluation import FINGERPRINT
from groupsearch.jobs.request import TrainingRequest
from groupsearch.jobs.stages import training_setup
from tests.cli.running import refused, run

EXAMPLES = 1437  # training images of the digits


@pytest.mark.parametrize(
    ("given", "micro_batches", "physical", "rate"),
    [
        ({}, 1, None, 0.2),
        ({"batch_size": 100}, 3, 100, 0.2),
        ({"sampling_rate": 0.5}, 3, 288, 0.5),
        ({"batch_size": 100, "sampling_rate": 0.05}, 1, 100, 0.05),
        ({"micro_batches": 2}, 2, 288, 2 * 288 / EXAMPLES),
        ({"micro_batches": 4, "batch_size": 50}, 4, 50, 4 * 50 / EXAMPLES),
        ({"micro_batches": 3, "batch_size": 100, "sampling_rate": 0.2}, 3, 100, 0.2),
    ],
    ids=str,
)
def test_micro_batches_are_the_pieces_that_training_takes(given, micro_batches, physical, rate):
    setup, training = training_setup(TrainingRequest("digits-cnn", seed=0, **given))
    assert (setup.micro_batches, training.physical_batch) == (micro_batches, physical)
    assert training.sampling_rate == pytest.approx(rate)
    assert setup.loaded.batch_size == (physical or 288)


def test_a_rate_that_takes_less_than_one_example_in_a_step_is_refused():
    with pytest.raises(GroupSearchError, match=r"at least one example in a step, found 0\.0006.*at least 1/1437"):
        training_setup(TrainingRequest("digits-cnn", seed=0, sampling_rate=6e-4))


@pytest.mark.parametrize("given", [{"micro_batches": 2, "sampling_rate": 0.5}, {"micro_batches": 6}], ids=str)
def test_micro_batches_that_contradict_the_rate_or_the_data_are_refused(given):
    with pytest.raises(GroupSearchError, match=r"Expected --micro-batches [13], .*Leave it away"):
        training_setup(TrainingRequest("digits-cnn", seed=0, **given))


def test_autocast_is_traced_and_trained():
    setup, training = training_setup(TrainingRequest("digits-cnn", seed=0, autocast="bfloat16"))
    assert setup.autocast == training.autocast == "bfloat16"
    assert {"micro_batches", "autocast"} <= set(FINGERPRINT)


def test_a_training_says_its_pieces_and_its_autocast():
    small = ("digits-vit", "--setting", "blocks=1", "--setting", "width=8", "--batch-size", 100)
    how = ("--grouping", "uniform:3", "--steps", 2, "--autocast", "bfloat16", "--json")
    result = run("train", *small, *how)
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert (settings["micro_batches"], settings["autocast"]) == (3, "bfloat16")


@pytest.mark.parametrize("command", ["train", "optimize", "fit", "profile"])
def test_an_autocast_that_is_none_is_refused(command):
    assert "--autocast" in refused(command, "digits-cnn", "--autocast", "int8")
