"""The statement: one value, the same words wherever it is shown, and nothing private left unmarked."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html import escape
from typing import Any

import pytest
import torch
from torch import nn

from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.privacy import PrivacyStatement, SelectionCost, not_private_sentence
from groupsearch.privacy.accounting import Accountant, epsilon
from groupsearch.report import render_page
from groupsearch.search.selection import adaptive_selection_cost, repeated_selection_cost
from groupsearch.tracer.sites import observe_sites
from groupsearch.units import format_at_most
from tests.cli.running import run

STATED = PrivacyStatement(7.9812, 6.9589e-6, 1437, "poisson", ((1.234, 0.2, 50),), "pld")
SELECTED = repeated_selection_cost(20, 8.0, 1e-5, 14.25, 17.5)


def test_it_says_what_it_is_about() -> None:
    text = str(STATED)
    for part in (
        *("Epsilon 7.99 at delta 6.96e-06", "1,437 examples", "zero-out", "public number of examples"),
        *("50 steps of noise multiplier 1.23", "Poisson sample", "probability 0.2, 287.4 expected", "accountant pld"),
        *("Covered: the weights after every step", "Not covered: exact numbers", "in secret"),
    ):
        assert part in text, part
    assert (STATED.steps, STATED.whole) == (50, 7.9812)


@pytest.mark.parametrize(
    ("selection", "whole", "brief"),
    [
        (None, 7.9812, "epsilon 7.99 at delta 6.96e-06"),
        (adaptive_selection_cost("public"), 7.9812, "epsilon 7.99 at delta 6.96e-06"),
        (adaptive_selection_cost("private"), None, "of one training alone, choosing left out"),
        (SELECTED, 17.5, "epsilon 17.5 at delta 6.96e-06 of the whole (7.99 of one training)"),
    ],
)
def test_the_whole_comes_first(selection: SelectionCost | None, whole: float | None, brief: str) -> None:
    stated = dataclasses.replace(STATED, selection=selection)
    assert stated.whole == whole
    assert brief in stated.brief
    assert stated.sentences[0].lower().startswith(stated.brief)
    if selection is not None:
        assert stated.sentences[1] == selection.statement


def test_a_known_seed_is_an_experiment() -> None:
    stated = dataclasses.replace(STATED, seeded=True)
    assert "in an experiment with a known seed" in stated.sentences[0]
    assert "holds for nobody who knows it" in str(stated)
    assert "in secret" not in str(stated)


@pytest.mark.parametrize("sampling", ["poisson", "fixed-size", "shuffled"])
def test_it_goes_through_json_as_it_is(sampling: str) -> None:
    for each in (
        dataclasses.replace(STATED, sampling=sampling, phases=((1.0, 0.1, 5), (2.0, 0.1, 1)), given_up=2, seeded=True),
        dataclasses.replace(STATED, sampling=sampling, selection=SELECTED),
    ):
        again = PrivacyStatement.from_json(json.loads(json.dumps(each.to_json())))
        assert again == each
        assert each.to_json()["sentences"] == list(again.sentences)
    endless = dataclasses.replace(STATED, epsilon=math.inf)
    assert PrivacyStatement.from_json({**endless.to_json(), "epsilon": None}) == endless
    assert endless.sentences[0].startswith("No privacy")


@pytest.mark.parametrize("value", [7.9812, 7.9799999, 8.0, 0.0012341, 123.4, 9.995, 9.999, 1e-5, 6.9589e-6])
def test_numbers_are_never_stated_lower_than_they_are(value: float) -> None:
    assert value <= float(format_at_most(value)) * (1 + 1e-12)
    assert float(format_at_most(value)) <= value * 1.01


@pytest.mark.parametrize("sampling", ["poisson", "shuffled", "fixed-size"])
def test_the_engine_states_what_its_steps_cost(sampling: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(40, 3)
    plan = ClipPlan(Grouping((), observe_sites(model, x[:3], lambda model, x: model(x).flatten())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"expected_batch_size": 4, "sampling_rate": 0.1, "sampling": sampling}
    if sampling == "poisson":
        settings = {"batches": PoissonBatches({"x": x}, expected_batch_size=4, steps=3)}
    engine = make_private(model, optimizer, plan, noise_multiplier=2.0, **settings)
    for logical in settings.get("batches", [[{"x": x[:4]}]] * 3):
        for batch in logical:
            model(batch["x"]).mean().backward()
        optimizer.step()
    stated = engine.statement(1e-4)
    expected = Accountant(2.0, 0.1, sampling)
    expected.step(3)
    assert stated == expected.statement(1e-4, 40)
    assert stated.epsilon == engine.epsilon(1e-4) == epsilon(2.0, 0.1, 3, 1e-4, sampling=sampling)
    assert stated.accountant == ("rdp" if sampling == "fixed-size" else "pld")
    assert (stated.examples, stated.seeded) == (40, False)


def test_a_generator_of_the_callers_may_have_a_known_seed() -> None:
    model, x = nn.Linear(3, 1), torch.randn(40, 3)
    plan = ClipPlan(Grouping((), observe_sites(model, x[:3], lambda model, x: model(x).flatten())))
    generator = torch.Generator().manual_seed(0)
    of_batches = PoissonBatches({"x": x}, expected_batch_size=4, steps=3, generator=generator)
    for settings in (
        {"batches": of_batches},
        {"expected_batch_size": 4, "sampling_rate": 0.1, "generator": torch.Generator()},
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = make_private(model, optimizer, plan, noise_multiplier=2.0, **settings)
        assert engine.statement(1e-4).seeded
        engine.detach()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path = tmp_path_factory.mktemp("trained") / "a.json"
    result = run("train", "digits-cnn", "--grouping", "best:2", "--steps", "3", "--evaluate-every", "1", "-o", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text(encoding="utf-8")), result.stderr


def test_training_document_terminal_and_page_say_the_same(trained: tuple[dict[str, Any], str]) -> None:
    document, told = trained
    stated = PrivacyStatement.from_json(document["privacy"])
    assert stated.epsilon == document["epsilon"] == epsilon(document["noise_multiplier"], 0.2, 3, document["delta"])
    assert (stated.examples, stated.steps, stated.delta) == (1437, 3, pytest.approx(1e-2 / 1437))
    assert document["privacy"]["sentences"] == list(stated.sentences)
    page = render_page(document)
    assert str(stated) in told
    assert all(escape(sentence) in page for sentence in stated.sentences)
    assert escape(stated.brief) in page.replace("\N{NO-BREAK SPACE}", " "), "in the headline"


def test_what_a_training_document_holds_of_private_data_is_marked(trained: tuple[dict[str, Any], str]) -> None:
    document, told = trained
    assert "examples" not in document, "the exact total of batch sizes, which are private"
    assert document["expected_examples"] == pytest.approx(3 * 0.2 * 1437)
    assert document["not_private"].keys() == {"metric", "curve", "step_seconds"} <= document.keys()
    sentence = not_private_sentence(document["not_private"])
    assert sentence in told
    assert escape(sentence) in render_page(document)


def test_a_search_states_what_is_left_out_and_marks_what_is_exact(tmp_path: Any) -> None:
    path = tmp_path / "a.json"
    args = ("--setting", "blocks=1", "--setting", "width=8", "--steps", "2", "--trials", "2", "--seeds", "1")
    result = run("optimize", *args, "--rungs", "full", "--verify", "none", "-o", path)
    assert result.exit_code == 0, result.output
    document, page = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".html").read_text(encoding="utf-8")
    stated = PrivacyStatement.from_json(document["privacy"])
    assert stated.whole is None
    assert str(stated) in result.stderr
    assert all(escape(sentence) in page for sentence in stated.sentences)
    for name in re.findall(r"[\w.]+", ",".join(key.replace(" and ", ",") for key in document["not_private"])):
        part: Any = document
        for key in name.split("."):
            part = part[key]


def test_reading_it_needs_no_torch() -> None:
    code = "import sys; import groupsearch.privacy.accounting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_large_delta_is_named() -> None:
    assert "Delta is large" not in str(STATED)
    assert "0.483/n" in str(dataclasses.replace(STATED, delta=1437**-1.1))
    assert "Delta is large" not in str(dataclasses.replace(STATED, delta=1e-2 / 1437))
