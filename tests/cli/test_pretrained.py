"""Every command on every kind of pretrained model works or refuses by name, as docs/hub-models.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pretrained_table import COMMANDS, ROWS, make, outcome, written

pytest.importorskip("datasets")
pytest.importorskip("peft")
BY_DEFAULT = {"optimize": ("LoRA",), "verify": ("LoRA",), "fit": ("LoRA", "sequence to sequence, LoRA")}
CELLS = [
    pytest.param(name, command, marks=() if name in BY_DEFAULT.get(command, ROWS) else pytest.mark.slow)
    for name in ROWS
    for command in COMMANDS
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pretrained")
    make(place)
    return place


@pytest.mark.parametrize(("name", "command"), CELLS)
def test_the_matrix_is_what_happens(name: str, command: str, folder: Path) -> None:
    assert outcome(folder, name, command) == written()[name][command]


def test_the_matrix_has_these_rows() -> None:
    assert list(written()) == list(ROWS)


@pytest.mark.parametrize("command", ["profile", "fit", "train"])
def test_a_model_with_values_is_built_once_for_its_shapes_and_once_to_train(command: str, folder: Path) -> None:
    (folder / "built").unlink(missing_ok=True)
    assert outcome(folder, "`from_pretrained` in a task file, frozen below its head", command) == "works"
    assert len((folder / "built").read_text()) == 1 + (command == "train")
