"""The commands that documents carry are the requests that made them, and what they say to do next can be done."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import groupsearch as gs
from groupsearch.cli import COMMANDS, main
from groupsearch.documents import Fit, Profile, Search, Train
from groupsearch.documents.commands import STEP, TRAINING, Next, command_line
from groupsearch.jobs.fit import FitRequest
from groupsearch.jobs.profile import ProfileRequest
from groupsearch.jobs.request import Request, SearchRequest, asked
from groupsearch.jobs.train import TrainRequest
from groupsearch.plan.clipping import AdaptiveQuantile
from groupsearch.report import render_page
from tests.cli.running import ROOT, run

SEARCH = ROOT / "reports" / "digits-vit-checkpointed.json"
PROFILE = ROOT / "profiles" / "hf-gpt2-b16-cpu-checkpoint-blocks.json"


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The command of a line and its parameters, as click reads them."""
    program, name, *words = shlex.split(line)
    assert program == "groupsearch"
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return name, dict(command.make_context(name, words).params)


REQUESTS = [
    ("profile", ProfileRequest("digits-vit", budget="2500MiB", grouping=["best:2", "3,17"], norm_method="joint")),
    ("profile", ProfileRequest("hf:gpt2", batch_size=4, setting={"lora": "8", "data": "a b"}, verify="all", random=3)),
    (
        "fit",
        FitRequest("hf:gpt2", memory=24 * 2**30, device="cuda:h100", measure=True, margin=0.25, checkpoint="blocks"),
    ),
    ("optimize", SearchRequest("digits-cnn", budget=12345, rungs="full", vary={"rule": ["auto-s", "abadi"]}, seed=7)),
    (
        "optimize",
        SearchRequest(vary={"checkpoint": []}, private_selection=True, score_noise=2.0, allow_state=["a", "b"]),
    ),
    ("train", TrainRequest("digits-vit", grouping=(3, 9), thresholds=[0.5, 1.0, 2.0], secure=True, save=Path("a b"))),
    ("train", TrainRequest("digits-vit", grouping="best:4", thresholds=AdaptiveQuantile(0.7), pick="12GiB", seed=0)),
]


def same(field: str, value: object) -> object:
    """One form of what may be written in several."""
    if field == "setting":
        return dict(value)  # type: ignore[call-overload]
    if field in ("budget", "memory", "pick") and isinstance(value, str):
        return gs.units.parse_bytes(value)
    if field == "rungs" and isinstance(value, str):
        return tuple(value.split(","))
    if field == "grouping" and not isinstance(value, str):
        return ",".join(map(str, value))  # type: ignore[call-overload]
    if field == "vary":
        return {name: list(values) or None for name, values in dict(value).items()}  # type: ignore[call-overload]
    if isinstance(value, Path):
        return str(value)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(("name", "request_"), REQUESTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(REQUESTS)])
def test_a_request_is_read_back_from_its_command(name: str, request_: Request) -> None:
    options = asked(request_)
    assert options is not None
    model = request_.model  # type: ignore[attr-defined]
    read, given = parsed(command_line(name, model, options))
    assert read == name
    assert given.pop("model") == model
    for field in given.keys() & {each for each in vars(request_)} - {"notify", "force", "resume"}:
        value = getattr(request_, field)
        if field == "vary" and given[field]:
            value = {key: values or given[field][key] for key, values in value.items()}
        if field == "trials" and value is None:
            continue
        assert same(field, given[field]) == same(field, value), field


def test_what_has_no_text_has_no_command() -> None:
    assert asked(TrainRequest("digits-vit", grouping=Search.load(SEARCH))) is None


def test_shared_options_are_those_of_the_commands() -> None:
    options = {
        name: {o for p in main.get_command(click.Context(main), name).params for o in p.opts} for name in COMMANDS
    }  # type: ignore[union-attr]
    assert {f"--{name}" for name in STEP} <= options["profile"] & options["fit"] & options["optimize"] & options[
        "train"
    ]
    assert {f"--{name}" for name in TRAINING} <= options["optimize"] & options["train"]


def test_the_recommendation_is_trained_by_the_name_of_the_document() -> None:
    found = replace(Search.load(SEARCH), asked={"checkpoint": ("blocks",), "seed": ("3",), "trials": ("9",)})
    following = found.following("a b.json")
    assert following is not None
    assert following.command == (
        "groupsearch train digits-vit --checkpoint blocks --grouping 'a b.json' --save digits-vit-private"
    )
    parsed(following.command)
    assert found.command == "groupsearch optimize digits-vit --checkpoint blocks --seed 3 --trials 9"


def test_a_search_without_a_recommendation_goes_on() -> None:
    found = replace(Search.load(SEARCH), asked={"epsilon": ("3",)}, recommended=None)
    following, elsewhere = found.following(), found.following("elsewhere.json")
    assert following is not None
    assert elsewhere is not None
    assert following.command == "groupsearch optimize digits-vit --epsilon 3 --resume"
    assert elsewhere.command == f"{following.command} --output elsewhere.json"


def loop() -> dict[str, Any]:
    workload = gs.load_workload("digits-vit", width=8, blocks=2, batch_size=16)
    model = workload.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "optimizer": optimizer, "batch": workload.make_batch(16), "loss": workload.loss}
    return names | {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10}


def test_the_lines_make_a_loop_private() -> None:
    found = gs.profile("digits-vit", setting={"width": 8, "blocks": 2}, batch_size=16, grouping="all-layer")
    assert found.next is not None
    names = loop()
    exec("\n".join(found.next.python), names)
    assert names["plan"].grouping.groups > 1
    before = [p.detach().clone() for p in names["model"].parameters()]
    names["loss"](names["model"], names["batch"]).mean().backward()
    names["optimizer"].step()
    assert all(not torch.equal(a, b) for a, b in zip(before, names["model"].parameters(), strict=True))


def test_those_of_a_search_say_how_it_was_trained() -> None:
    found = Search.load(SEARCH)
    following = found.following()
    assert following is not None
    assert following.command is None  # the document was written before commands were kept
    assert found.recommended is not None
    *_, plan, private = following.python
    assert f"{found.recommended.boundaries}), max_grad_norm=1.0, rule='abadi')" in plan
    assert f"noise_multiplier={found.training.noise_multiplier!r}, expected_batch_size=287.4)" in private


def test_a_profile_without_data_is_checked_and_then_has_its_lines_alone() -> None:
    found = replace(Profile.load(PROFILE), asked={"batch-size": ("16",), "max-groups": ("4",)}, simulations=())
    following = found.following()
    assert following is not None
    assert following.command is not None
    name, given = parsed(following.command)
    assert (name, given["batch_size"], given["verify"]) == ("profile", 16, "measure")
    beside = found.following("out dir/p.json")
    assert beside is not None
    assert str(beside.command).endswith("--output 'out dir/p-checked.json'"), "p.json is not overwritten"
    assert Next(command=None, python=following.python) == replace(found, measurements=(MEASURED,)).following()


MEASURED = gs.documents.rows.Measurement(
    grouping="all-layer", boundaries=(), groups=1, peak_bytes=1, relative_error=0.0, step_seconds=0.1, metric="m"
)


def test_the_lines_of_a_joint_choice_train_the_model_that_was_profiled(tmp_path: Path) -> None:
    asked = {"setting": {"width": 8, "blocks": 1}, "batch_size": 16}
    found = gs.profile("digits-vit", norm_method="joint", budget="1GiB", **asked)
    place = found.save(tmp_path / "joint.json")
    following = found.following(place)
    assert following is not None
    names: dict[str, Any] = {}
    exec("\n".join(following.python).replace("grouping=", "steps=1, grouping="), names)
    assert names["found"].model.parameters == found.model.parameters
    assert names["found"].model.batch_size == 16


def test_a_fit_goes_on_with_what_fits_and_no_more_than_there_is() -> None:
    given = {"setting": {"width": 8, "blocks": 2}, "grouping": ["all-layer", "layer-wise"], "checkpoint": "blocks"}
    found = gs.fit("digits-vit", memory="2MiB", **given)
    assert isinstance(found, Fit)
    assert found.next is not None
    assert found.next.command is not None
    name, options = parsed(found.next.command)
    best = max((row for row in found.fit.rows if row.boundaries is not None), key=lambda row: row.size)
    assert (name, options["batch_size"], options["checkpoint"]) == ("optimize", best.size, "blocks")
    assert f"expected_batch_size={best.size})" in found.next.python[-1]
    most = replace(found, fit=replace(found.fit, rows=tuple(replace(row, size=10**6) for row in found.fit.rows)))
    assert "--batch-size 1437 " in f"{most.following().command} "  # type: ignore[union-attr]


def test_an_estimate_for_a_card_goes_on_where_the_card_is() -> None:
    found = gs.profile("digits-vit", device="cuda:h100", grouping="all-layer", setting={"width": 8, "blocks": 1})
    assert found.next is not None
    assert found.next.command == "groupsearch optimize digits-vit --setting width=8 --setting blocks=1 --device cuda"
    assert found.next.note == "To be run where that card is."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Train, str, Path]:
    """A training whose weights were not kept; what was said of it; and its folder."""
    folder = tmp_path_factory.mktemp("train")
    place = folder / "train.json"
    settings = ("--setting", "width=8", "--setting", "blocks=1")
    result = run("train", "digits-vit", *settings, "--steps", 1, "--grouping", "best:2", "-o", place)
    assert result.exit_code == 0, result.output
    return Train.load(place), result.stderr, folder


def test_weights_that_were_not_kept_are_trained_anew_and_loaded(
    trained: tuple[Train, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said, folder = trained
    assert found.next is not None
    assert found.next.command is not None
    assert found.next.command in said
    assert "a second time" in said
    monkeypatch.chdir(folder)
    result = run(*shlex.split(found.next.command)[1:])
    assert result.exit_code == 0, result.output
    again = Train.load("train-saved.json")
    assert again.next is not None
    assert all(line in result.stderr for line in again.next.python)
    names: dict[str, Any] = {}
    exec("\n".join(again.next.python), names)
    assert sum(p.numel() for p in names["model"].parameters()) == found.model.parameters


def test_the_page_has_them() -> None:
    found = replace(Search.load(SEARCH), asked={"setting": ("a=<b>",)}).followed("x.json")
    page = render_page(json.loads(json.dumps(found.to_json())))
    assert "What to do next" in page
    assert "--setting &#x27;a=&lt;b&gt;&#x27; --grouping x.json" in page
    assert "What to do next" not in render_page(Search.load(SEARCH).to_json())
