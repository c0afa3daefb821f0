"""load_workload: every kind of text, and an answer with a remedy to each that is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads import Data, Workload, check_loss, list_workloads, load_workload

FILE = """
import torch
import torch.nn.functional as F
from torch import nn
from sibling import WIDTH
from groupsearch.workloads import Workload, load_workload

def _loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def triple(outputs=3, bias: bool = True):
    first = nn.Linear(WIDTH, WIDTH)
    second = nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(WIDTH, outputs, bias=bias))
    batch = {"x": torch.randn(4, WIDTH), "y": torch.arange(4) % outputs}
    return model, batch, _loss

def sized(batch_size):
    return nn.Linear(2, 2), (torch.zeros(batch_size, 2), torch.ones(batch_size)), lambda m, b: m(b[0]).sum(1)

def workload(width=8):
    return load_workload("digits-vit", width=width)

def failing():
    raise ValueError("no such data set")

def wrong():
    return nn.Linear(2, 2), torch.zeros(2)

def ragged():
    return nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(4)), _loss

not_a_function = 3
"""


_MODELS = """
from groupsearch.workloads import load_workload

def make(name, **settings):
    return load_workload(name, **settings)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("WIDTH = 5\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_built_in_and_listed_names_agree() -> None:
    names = [info.name for info in list_workloads()]
    assert names[:3] == ["digits-vit", "digits-cnn", "stdlib-gpt"]
    assert len(set(names)) == len(names)
    for info in list_workloads()[:3]:
        workload = load_workload(info.name)
        assert workload.name == info.name
        assert dict(workload.settings) == dict(info.settings)
        assert workload.data is not None
        assert workload.training is not None


def test_settings_come_as_text_or_as_values() -> None:
    text, value = load_workload("digits-vit", width="16", blocks="2"), load_workload("digits-vit", width=16, blocks=2)
    assert text.settings == value.settings
    assert text.settings["width"] == 16
    assert len(list(text.model.get_submodule("blocks").children())) == 2


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("digit-vit", {}, "no workload named 'digit-vit'. Did you mean digits-vit.*`groupsearch models`"),
        ("gpt2", {}, "Did you mean hf:gpt2"),
        ("zzz", {}, "no workload named 'zzz'. Run `groupsearch models`"),
        ("digits-vit", {"widht": 3}, "no setting 'widht'. Did you mean width.*batch_size, width, blocks, heads"),
        ("digits-vit", {"width": "wide"}, "width of digits-vit to be a positive integer, found 'wide'"),
        ("digits-vit", {"batch_size": 0}, "batch_size .* positive integer, found 0"),
        ("digits-cnn", {"width": 2.5}, "positive integer, found 2.5"),
        ("digits-vit", {"width": 30}, "width of digits-vit to be a multiple of heads"),
        ("stdlib-gpt", {"heads": 3}, "width of stdlib-gpt to be a multiple of heads"),
        ("digits-cnn", {"width": 6}, "width of digits-cnn to be a multiple of 4"),
    ],
)
def test_wrong_names_and_settings(text: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        load_workload(text, **settings)


def test_triple_of_a_file(file: Path) -> None:
    workload = load_workload(f"{file}:triple", outputs="2", bias="false")
    assert workload.settings == {"outputs": 2, "bias": False}
    assert workload.batch_size == 4
    assert workload.data is None
    assert workload.model.get_submodule("2").out_features == 2
    assert check_loss(workload.model, workload.make_batch(6), workload.loss).shape == (6,)
    assert torch.equal(workload.make_batch(6)["x"][4:], workload.make_batch(4)["x"][:2])


def test_triple_builds_from_the_seed_asked_for(file: Path) -> None:
    workload = load_workload(f"{file}:triple")
    first, second, other = workload.build(1), workload.build(1), workload.build(2)
    assert first is not second
    assert torch.equal(first.get_parameter("0.weight"), second.get_parameter("0.weight"))
    assert not torch.equal(first.get_parameter("0.weight"), other.get_parameter("0.weight"))
    assert torch.equal(workload.make_batch(4)["x"], load_workload(f"{file}:triple").make_batch(4)["x"])


def test_triple_builds_on_meta_with_its_ties(file: Path) -> None:
    workload = load_workload(f"{file}:triple")
    with torch.device("meta"):
        model = workload.build()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_parameter("0.weight") is model.get_parameter("1.weight")
    assert model.get_parameter("0.weight").requires_grad
    assert workload.model.get_parameter("0.weight").device.type == "cpu"


def test_batch_size_goes_to_the_factory_that_takes_it_and_overrides_otherwise(file: Path) -> None:
    sized = load_workload(f"{file}:sized", batch_size="7")
    assert sized.batch_size == 7
    assert [len(part) for part in sized.make_batch(3)] == [3, 3]
    assert load_workload(f"{file}:triple", batch_size="9").batch_size == 9


def test_workload_of_a_file_keeps_its_data_under_the_new_name(file: Path) -> None:
    workload = load_workload(f"{file}:workload", width=16)
    assert workload.name == f"{file}:workload"
    assert workload.settings["width"] == 16
    assert workload.data is not None


def test_factory_of_a_package_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    (tmp_path / "mypackage" / "models.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    workload = load_workload("mypackage.models:make", name="digits-cnn", width="8")
    assert workload.name == "mypackage.models:make"
    assert workload.settings["width"] == 8


@pytest.mark.parametrize(
    ("attribute", "settings", "message"),
    [
        (":missing", {}, "no function 'missing' in .*mine.py. It has triple, sized, workload, failing, wrong, ragged"),
        (":not_a_function", {}, "no function 'not_a_function'"),
        ("", {}, "no function named after .*mine.py.*:triple"),
        (":failing", {}, "failing raised ValueError: no such data set"),
        (":wrong", {}, r"\(model, batch, loss\).*found a tuple of \(Linear, Tensor\)"),
        (":ragged", {}, r"share their first dimension.*\(3, 2\), \(4,\)"),
        (":triple", {"depth": 2}, "no setting 'depth'. The parameters of the function are: outputs, bias"),
        (":sized", {}, "missing a required argument: 'batch_size'"),
        (":triple", {"batch_size": "many"}, "batch_size .* positive integer, found 'many'"),
    ],
)
def test_wrong_factories(file: Path, attribute: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        load_workload(f"{file}{attribute}", **settings)


def test_what_a_factory_raised_is_kept_as_the_cause(file: Path) -> None:
    with pytest.raises(GroupSearchError) as caught:
        load_workload(f"{file}:failing")
    assert isinstance(caught.value.__cause__, ValueError)


def test_missing_and_broken_files_and_modules(tmp_path: Path) -> None:
    with pytest.raises(GroupSearchError, match=r"no file .*nowhere\.py"):
        load_workload(f"{tmp_path / 'nowhere.py'}:factory")
    (tmp_path / "broken.py").write_text("def factory(:\n")
    with pytest.raises(GroupSearchError, match=r"broken\.py could not be run: SyntaxError"):
        load_workload(f"{tmp_path / 'broken.py'}:factory")
    with pytest.raises(
        GroupSearchError, match=r"no_such_package of the workload .* could not be imported: ModuleNotFoundError"
    ):
        load_workload("no_such_package:factory")


LOSSES = {
    "mean": (lambda m, b: m(b).mean(), r"shape \(5,\).*found torch.float32 of shape \(\).*reduction='none'"),
    "unreduced": (lambda m, b: m(b), r"found torch.float32 of shape \(5, 2\).*\.flatten\(1\)\.mean\(1\)"),
    "positions": (lambda m, b: m(b).flatten(), r"shape \(10,\).*\.view\(B, -1\)\.mean\(1\)"),
    "number": (lambda m, b: 3.0, r"found float.*reduction='none'"),
    "integers": (lambda m, b: m(b).argmax(1), r"torch.int64 of shape \(5,\)"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_that_is_not_per_example_is_refused(kind: str) -> None:
    loss, message = LOSSES[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        check_loss(nn.Linear(3, 2), torch.zeros(5, 3), loss)


def test_loss_is_checked_on_fake_tensors_too() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def mean(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()

    with FakeTensorMode():
        model, batch = nn.Linear(3, 2), torch.zeros(5, 3)
        assert check_loss(model, batch, lambda m, b: m(b).sum(1)).shape == (5,)
        with pytest.raises(UnsupportedModelError, match=r"of shape \(\)"):
            check_loss(model, batch, mean)


def test_data_whose_tensors_disagree_are_refused() -> None:
    with pytest.raises(GroupSearchError, match=r"train data .*'x': 3, 'y': 4"):
        Data({"x": torch.zeros(3), "y": torch.zeros(4)}, {"x": torch.zeros(1)})


def test_model_is_built_once() -> None:
    made: list[nn.Module] = []

    def build(seed: int = 0) -> nn.Module:
        made.append(nn.Linear(1, 1))
        return made[-1]

    workload = Workload("x", build, lambda size: torch.zeros(size, 1), lambda m, b: m(b)[:, 0])
    assert workload.model is workload.model
    assert len(made) == 1
