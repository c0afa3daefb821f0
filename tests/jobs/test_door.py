"""The work of every command as one call from Python: typed documents, nothing printed, refusals by name."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import groupsearch as gs
from groupsearch.cli import main
from groupsearch.jobs.events import Advanced, Begun, Evaluated, Interrupted, Profiled, Said
from groupsearch.search import Choice
from groupsearch.workloads import Workload

SMALL = {"blocks": 1, "width": 8}
MINE = """
import torch
from torch import nn
from groupsearch.workloads import Data, TrainingDefaults, Workload

def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def metric(model, batch):
    return (model(batch["x"]).argmax(1) == batch["y"]).float()

def rows(count, seed):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x[:, 0] > 0).long()}

def factory():
    data = Data(rows(200, 0), rows(50, 1))
    first = lambda count: {name: each[:count] for name, each in data.train.items()}
    training = TrainingDefaults(steps=3, learning_rate=0.01)
    return Workload("mine", build, first, loss, metric, data=data, batch_size=40, training=training)
"""


def test_a_model_of_ones_own_from_profile_to_report(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE, encoding="utf-8")

    profile = gs.profile("mine.py:factory", grouping=["all-layer", "best:2"])
    found = gs.search("mine.py:factory", rungs="full", trials=3, seeds=1, verify="none")
    trained = gs.train("mine.py:factory", grouping=found.recommended.boundaries, epsilon=4, seed=1)
    verified = gs.verify(profile, tolerance=0.1)
    pages = [gs.report(each, f"{each.KIND}.html") for each in (profile, found, trained, verified)]

    assert [row.grouping for row in verified.rows] == ["all-layer", "best:2"]
    assert verified.outside == ()
    assert trained.boundaries == found.recommended.boundaries
    assert (trained.steps, len(trained.curve)) == (3, 3)
    assert trained.privacy.epsilon <= 4
    assert found.candidates
    assert all(page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") for page in pages)
    for each in (profile, found, trained, verified):
        assert type(each).load(each.save(f"{each.KIND}.json")).to_json() == each.to_json()
        assert each.model.name in repr(each)
        assert len(each.to_dataframe()) > 0
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".html"] * 4 + [".json"] * 4 + [
        ".py"
    ]
    assert capfd.readouterr() == ("", "")


def test_what_fits_and_what_goes_on(capfd):
    told = []
    found = gs.fit("digits-vit", memory="2MiB", setting=SMALL, max_groups=2, notify=told.append)
    assert isinstance(found, gs.Fit)
    assert found.fit.memory_bytes == 2 * 2**20
    assert found.fit.rows[0].grouping == "non-private"
    assert isinstance(told[0], Begun)
    assert {type(event) for event in told} == {Begun, Said, Advanced}
    assert len([event for event in told if isinstance(event, Advanced)]) == 1 + len(found.fit.rows)
    assert all(str(event) for event in told)
    assert capfd.readouterr() == ("", "")


def small_workload() -> Workload:
    names: dict[str, object] = {}
    exec(MINE, names)
    made = names["factory"]()
    return made


def test_a_workload_itself_does_all_that_needs_no_fresh_process(capfd):
    workload, told = small_workload(), []
    profile = gs.profile(workload, verify="simulate", batch_size=20)
    assert (profile.model.name, profile.model.batch_size) == ("mine", 20)
    assert len(profile.simulations) == len(profile.estimates)
    assert gs.fit(workload, memory="40KiB", max_groups=1).fit.rows[0].size > 0
    assert gs.train(workload, grouping="all-layer", seed=0).metric.name == "accuracy"
    how = {"rungs": "full", "trials": 2, "seeds": 1, "verify": "simulate", "notify": told.append}
    assert gs.search(workload, **how).recommended is not None
    assert next(type(event) for event in told if isinstance(event, (Profiled, Evaluated))) is Profiled
    evaluated = [event for event in told if isinstance(event, Evaluated)]
    assert isinstance(evaluated[0].event.choice, Choice)
    assert "accuracy" in str(evaluated[0])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "ask",
    [
        lambda workload: gs.profile(workload, verify="measure"),
        lambda workload: gs.search(workload),
        lambda workload: gs.fit(workload, memory="1MiB", measure=True),
    ],
    ids=["profile", "search", "fit"],
)
def test_of_a_workload_itself_nothing_is_measured(ask):
    with pytest.raises(gs.GroupSearchError, match=r"'mine' to measure with.*path/to/file\.py:function"):
        ask(small_workload())


def test_a_workload_that_is_made_takes_no_settings():
    with pytest.raises(gs.GroupSearchError, match="settings width of a Workload that is made already"):
        gs.profile(small_workload(), setting={"width": 3})


def test_a_function_of_a_module_is_named_by_its_file_and_another_one_is_called(tmp_path, monkeypatch):
    (tmp_path / "mine_in_a_module.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import mine_in_a_module

    assert gs.profile(mine_in_a_module.factory).model.name == "mine_in_a_module.py:factory"
    assert gs.profile(lambda: small_workload()).model.name == "<lambda>"
    linear, x = nn.Linear(3, 2), torch.ones(4, 3)
    triple = gs.profile(lambda: (linear, x, lambda model, batch: model(batch).sum(1)), grouping="all-layer")
    assert triple.model.parameters == 8
    del sys.modules["mine_in_a_module"]


def test_a_joint_choice_is_trained_with():
    profile = gs.profile("digits-vit", setting=SMALL, norm_method="joint", grouping="all-layer")
    trained = gs.train("digits-vit", setting=SMALL, grouping=profile, steps=1, seed=0)
    assert trained.boundaries == profile.joint.boundaries
    assert trained.settings["methods"] == profile.settings["methods"]


def interrupt_at(kind: type, item: str = ""):
    """A notify that is interrupted by the third event of a kind."""
    seen = []

    def notify(event: object) -> None:
        seen.append(isinstance(event, kind) and item in str(event))
        if sum(seen) == 3:
            raise KeyboardInterrupt

    return notify


def test_an_interrupt_leaves_what_is_done():
    with pytest.raises(Interrupted, match="2 checks") as stopped:
        gs.profile("digits-vit", setting=SMALL, verify="simulate", notify=interrupt_at(Advanced))
    assert (len(stopped.value.document.simulations), type(stopped.value.document)) == (2, gs.Profile)
    assert len(stopped.value.document.estimates) > 2
    with pytest.raises(Interrupted, match="3 of 9 steps") as stopped:
        gs.train("digits-vit", setting=SMALL, grouping="best:2", steps=9, seed=0, notify=interrupt_at(Advanced))
    assert (stopped.value.document.steps, stopped.value.document.privacy.steps) == (3, 3)
    assert stopped.value.document.metric is None
    with pytest.raises(Interrupted, match="2 rows") as stopped:
        gs.fit("digits-vit", setting=SMALL, memory="2MiB", notify=interrupt_at(Advanced))
    assert len(stopped.value.document.fit.rows) == 2
    assert isinstance(stopped.value, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: gs.profile("digits-vit", verify="maybe"), "verify to be one of none, simulate"),
        (lambda: gs.profile("digits-vit", max_groups=0), "max_groups to be at least 1"),
        (lambda: gs.profile("digits-vit", checkpoint="some"), "checkpoint to be none"),
        (lambda: gs.profile("digits-vit", norm_method="none"), "norm_method to be one of"),
        (lambda: gs.profile("digits-vit", optimizer="speed"), "speed"),
        (lambda: gs.profile("digits-vitt"), "no workload named"),
        (lambda: gs.fit("digits-vit", memory="much"), "size such as 12GiB"),
        (lambda: gs.fit("digits-vit"), "what a step may take"),
        (lambda: gs.train("digits-vit", grouping="all-layer", epsilon=0.0), "epsilon to be a number above zero"),
        (lambda: gs.train("digits-vit", grouping="all-layer", thresholds="some"), "uniform, dimension"),
        (lambda: gs.search("digits-vit", rungs="proxy"), "Expected full"),
        (lambda: gs.search("digits-vit", vary=["colour"]), "rule, thresholds"),
        (lambda: gs.search("digits-vit", private_selection=True, seeds=5, vary=["checkpoint"]), "--seeds, --vary chec"),
        (lambda: gs.report(gs.profile("digits-vit", setting=SMALL, grouping="all-layer")), "file to write the page"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(ask, said):
    with pytest.raises(gs.GroupSearchError, match=said):
        ask()


OF_THE_COMMAND_ALONE = {"output", "as_json", "help", "open_page"}


@pytest.mark.parametrize("name", ["profile", "fit", "search", "train", "verify"])
def test_arguments_and_defaults_are_those_of_the_command(name):
    command = main.get_command(None, {"search": "optimize"}.get(name, name))
    alone = OF_THE_COMMAND_ALONE | {
        "search": {"worker", "report"},
        "train": set(),
        "profile": {"force", "fail_over"},
    }.get(name, {"force"})
    required = ["one", "--grouping", "all-layer"] if name == "train" else ["one"]
    context = command.make_context(name, required)
    given = {option: value for option, value in context.params.items() if option not in alone}
    known = dict(inspect.signature(getattr(gs, name)).parameters)
    assert given.keys() == known.keys() - {"notify"}
    for option in given.keys() - {"model", "document", "grouping"}:
        assert (given[option] or None) == (known[option].default or None), option


def test_a_package_and_the_function_of_its_name_are_one():
    from groupsearch import fit, report, search, verify
    from groupsearch.search import SearchSettings

    assert gs.search.SearchSettings is SearchSettings
    for module in (fit, report, search, verify):
        assert sys.modules[module.__name__] is module is getattr(gs, module.__name__.rpartition(".")[2])
        assert callable(module)
        assert inspect.signature(module).parameters
    assert not callable(gs.search.settings)


def test_requests_are_values():
    from groupsearch.jobs.profile import ProfileRequest

    request = ProfileRequest("digits-vit", budget="1GiB", notify=print)
    assert request == replace(request, notify=warnings.warn)
    assert request != replace(request, seed=1)


@pytest.mark.parametrize("name", ["profile", "fit", "search", "train", "verify"])
def test_no_job_needs_plotly(name):
    code = (
        f"import sys; sys.modules['plotly'] = None; from groupsearch.jobs.{name} import {name}; assert callable({name})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_page_needs_plotly():
    code = "import sys; sys.modules['plotly'] = None; from groupsearch.report import render_page"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "plotly" in found.stderr
