"""Every Python snippet of the documentation runs, prints what the page says, and every link leads somewhere."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.running import run
from tests.support import notebook

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "text", "bash", "json"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def snippets(page: Path) -> Iterator[tuple[str, str | None]]:
    """Each snippet, where it stands in the page, and the output that follows it; ``...`` there is anything."""
    text = page.read_text(encoding="utf-8")
    for found in SNIPPET.finditer(text):
        yield "\n" * text[: found.start(1)].count("\n") + found[1], found[2]


@pytest.fixture
def accelerate_forgotten() -> Iterator[None]:
    """How often a page's accelerator accumulates is nothing to the tests after it in the same process."""
    yield
    state: Any = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning's doing
@pytest.mark.parametrize("page", [page for page in PAGES if list(snippets(page))], ids=relative)
@pytest.mark.usefixtures("accelerate_forgotten")
def test_snippets_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for code, expected in snippets(page):
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), names)
            if expected is not None:
                matches = doctest.OutputChecker().check_output(expected, printed.getvalue(), doctest.ELLIPSIS)
                assert matches, f"{code.strip()}\nprinted:\n{printed.getvalue()}\nthe page says:\n{expected}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_output_belongs_to_a_snippet(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    languages = [language for language, _ in FENCE.findall(text)]
    assert set(languages) <= LANGUAGES
    assert languages.count("text") == sum(expected is not None for _, expected in snippets(page))
    assert languages.count("python") == len(list(snippets(page)))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


def commands(page: str) -> list[list[str]]:
    """The command lines of a page, without the name of the program."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (groupsearch .*)$", text, re.MULTILINE)]


def test_the_page_of_ones_own_task_shows_the_whole_example() -> None:
    first, _ = next(snippets(ROOT / "docs" / "your-task.md"))
    assert first.lstrip("\n") == (ROOT / "examples" / "own_task.py").read_text(encoding="utf-8")


OF_OWN_TASK = commands("your-task.md")
SHORTER = {
    "profile": [],
    "train": ["--steps", "2"],
    "optimize": ["--steps", "2", "--trials", "2", "--seeds", "1", "--rungs", "full", "--verify", "none"],
}


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=c[0], marks=[pytest.mark.slow] * (c[0] == "optimize")) for c in OF_OWN_TASK],
)
def test_commands_on_ones_own_task_run(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # from where the page names the file
    place = tmp_path / "result.json"
    result = run(*command, *SHORTER[command[0]], "-o", place)
    assert result.exit_code == 0, result.output
    document = json.loads(place.read_text(encoding="utf-8"))
    assert document["model"]["name"] == "examples/own_task.py:factory"


OF_A_FOLDER = commands("train-with-it.md")
SHORTER_ON_A_FOLDER = {
    "fit": ["--batch-size", "4"],
    "optimize": ["--steps", "2", "--trials", "1", "--seeds", "1", "--rungs", "full", "--verify", "none"],
    "train": ["--steps", "2", "--batch-size", "4"],
}


def test_commands_from_a_folder_to_private_weights_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    datasets, _ = pytest.importorskip("datasets"), pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    config = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 1}
    transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**config)).save_pretrained("roberta")
    rows = {"input_ids": [[2 + i % 90, 5, 7] for i in range(60)], "label": [i % 2 for i in range(60)]}
    datasets.Dataset.from_dict(rows).save_to_disk("reviews")
    assert [command[0] for command in OF_A_FOLDER] == ["fit", "optimize", "train", "train", "train"]
    for asked in OF_A_FOLDER:
        if any(part.startswith("tensorboard:") for part in asked) and not find_spec("tensorboard"):
            continue
        result = run(*asked, *SHORTER_ON_A_FOLDER[asked[0]])
        assert result.exit_code == 0, result.output
    for folder in ("private", "again"):
        assert {path.name for path in Path(folder).iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "privacy.json",
        }


def test_the_page_of_ones_own_task_has_every_command() -> None:
    assert [command[0] for command in OF_OWN_TASK] == ["profile", "train", "optimize"]


def test_the_notebook_shows_what_its_cells_show_now() -> None:
    written = json.loads(notebook.PAGE.read_text(encoding="utf-8"))
    again = notebook.with_outputs(written)
    shown = [output for cell in written["cells"] for output in cell.get("outputs", ())]
    assert [list(output["data"]) for output in shown] == [["text/plain", "text/html"]] * 3
    for before, after in zip(written["cells"], again["cells"], strict=True):
        exact = "gs.profile(" in "".join(after["source"])  # what trains is rounded otherwise by another processor
        assert before == after if exact else _without_digits(before) == _without_digits(after)


def _without_digits(cell: Any) -> str:
    return re.sub(r"[ -]*\d[\d.,e-]*", "#", json.dumps(cell))
