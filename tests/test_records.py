from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.records import default_path, environment, new_document, read_document, write_document


@pytest.fixture
def document() -> dict[str, Any]:
    model = {"name": "digits-vit", "batch_size": 64}
    return new_document("profile", model, environment("cpu"), {"seed": 0}, floor_bytes=17, front=[{"groups": 1}])


def test_read_gives_back_what_was_written(tmp_path: Path, document: dict[str, Any]) -> None:
    assert read_document(write_document(tmp_path / "a.json", document)) == document


def test_unknown_keys_are_kept(tmp_path: Path, document: dict[str, Any]) -> None:
    document["later"] = {"new": [1, None]}
    assert read_document(write_document(tmp_path / "a.json", document), "profile")["later"] == {"new": [1, None]}


def test_equal_documents_are_equal_files(tmp_path: Path, document: dict[str, Any]) -> None:
    first = write_document(tmp_path / "a.json", document).read_bytes()
    second = write_document(tmp_path / "b.json", dict(reversed(document.items()))).read_bytes()
    assert first == second
    assert first.endswith(b"}\n")


def test_numpy_and_tuples_become_plain_and_a_diverged_number_null(tmp_path: Path, document: dict[str, Any]) -> None:
    document |= {"a": np.int64(3), "b": np.array([1.5, np.nan]), "c": (1, 2), "d": float("inf"), "e": np.bool_(True)}
    found = read_document(write_document(tmp_path / "a.json", document))
    assert [found[key] for key in "abcde"] == [3, [1.5, None], [1, 2], None, True]


@pytest.mark.parametrize("value", [{1, 2}, object(), {1: "int key"}], ids=["set", "object", "key"])
def test_a_value_without_json_form_writes_nothing(tmp_path: Path, document: dict[str, Any], value: Any) -> None:
    with pytest.raises(GroupSearchError, match="Convert the value"):
        write_document(tmp_path / "a.json", {**document, "odd": value})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text("precious")
    with pytest.raises(GroupSearchError, match="--force"):
        write_document(path, document)
    assert path.read_text() == "precious"
    write_document(path, document, force=True)
    assert read_document(path) == document


def test_a_missing_folder_a_file_as_folder_and_a_folder_as_file_are_refused(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GroupSearchError, match="mkdir -p"):
        write_document(tmp_path / "none" / "a.json", document)
    with pytest.raises(GroupSearchError, match="folder"):
        write_document(tmp_path / "file" / "a.json", document)
    with pytest.raises(GroupSearchError, match="Name a file in it"):
        write_document(tmp_path, document, force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(GroupSearchError, match="writable"):
        write_document(tmp_path / "a.json", document)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = write_document(tmp_path / "a.json", document)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((GroupSearchError, KeyboardInterrupt)):
        write_document(path, {**document, "floor_bytes": 18}, force=True)
    assert list(tmp_path.iterdir()) == [path]
    assert read_document(path)["floor_bytes"] == 17


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_document_says_where_it_ends(tmp_path: Path, document: dict[str, Any], share: float) -> None:
    path = write_document(tmp_path / "a.json", document)
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(DocumentError, match=r"cut short at line \d+, column \d+"):
        read_document(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "found other JSON"),
        (b'{"a": 1}', "found other JSON"),
        (b"hello", "found no JSON at line 1, column 1"),
        (b"\xff\xfe\x00", "no UTF-8 text at byte 0"),
        (b"[" * 100_000, "nested too deep|cut short"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        read_document(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "newer than schema 1.*Upgrade"),
        ({"schema_version": 0}, "older than schema 1.*groupsearch profile"),
        ({"schema_version": "1"}, "whole number"),
        ({"schema_version": True}, "whole number"),
        ({"kind": "recipe"}, "'recipe'"),
        ({"kind": ["profile"]}, "kind one of"),
        ({"model": None}, "no usable model"),
    ],
)
def test_another_schema_or_a_garbled_header_is_refused_by_name(
    tmp_path: Path, document: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    path = write_document(tmp_path / "a.json", {**document, **change})
    with pytest.raises(DocumentError, match=message):
        read_document(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="No such file"):
        read_document(tmp_path / "none.json")
    with pytest.raises(DocumentError, match="directory"):
        read_document(tmp_path)


def test_another_kind_than_asked_for_is_refused_with_the_command(tmp_path: Path, document: dict[str, Any]) -> None:
    path = write_document(tmp_path / "a.json", document)
    assert read_document(path, ("search", "profile"))["kind"] == "profile"
    with pytest.raises(DocumentError, match=r"kind search.*kind profile.*`groupsearch optimize`"):
        read_document(path, "search")


def test_new_document_refuses_an_unknown_kind_and_a_part_of_the_header() -> None:
    with pytest.raises(GroupSearchError, match="profile, search, verify, train"):
        new_document("recipe", {}, {}, {})
    with pytest.raises(GroupSearchError, match="schema_version"):
        new_document("train", {}, {}, {}, schema_version=3)


@pytest.mark.parametrize(
    ("kind", "name", "device", "settings", "expected"),
    [
        ("profile", "gpt2", "cpu", {}, "profiles/gpt2-b8-cpu.json"),
        ("search", "gpt2", "cpu", {}, "reports/gpt2-b8-cpu-search.json"),
        ("profile", "gpt2", "cpu", {"checkpoint": "blocks"}, "profiles/gpt2-b8-cpu-checkpoint-blocks.json"),
        ("profile", "../etc/passwd", "NVIDIA H100", {}, "profiles/etc-passwd-b8-NVIDIA-H100.json"),
        ("profile", "file.py:make<b>", "cpu", {"checkpoint": "none"}, "profiles/file.py-make-b-b8-cpu.json"),
        ("profile", "gpt2", "cpu", {"micro_batches": 4}, "profiles/gpt2-b8-cpu-micro-batches-4.json"),
        ("profile", "gpt2", "cpu", {"autocast": "bfloat16"}, "profiles/gpt2-b8-cpu-autocast-bfloat16.json"),
        ("train", "gpt2", "cpu", {"norm_method": "ghost"}, "reports/gpt2-b8-cpu-norms-ghost-train.json"),
        (
            "profile",
            "gpt2",
            "cpu",
            {"checkpoint": "every:2", "micro_batches": 2, "autocast": "float16", "norm_method": "joint"},
            "profiles/gpt2-b8-cpu-checkpoint-every-2-micro-batches-2-autocast-float16-norms-joint.json",
        ),
        (
            "profile",
            "gpt2",
            "cpu",
            {"checkpoint": "none", "micro_batches": 1, "autocast": "none", "norm_method": "mixed"},
            "profiles/gpt2-b8-cpu.json",
        ),
    ],
)
def test_default_path(kind: str, name: str, device: str, settings: dict[str, Any], expected: str) -> None:
    document = new_document(kind, {"name": name, "batch_size": 8}, {"device": device}, settings)
    assert default_path(document) == Path(expected)


def test_environment_names_versions_and_needs_no_torch() -> None:
    code = (
        "import json, sys; from groupsearch.records import environment; e = environment('cuda: X');"
        "assert 'torch' not in sys.modules; print(json.dumps(e))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["device"] == "cuda: X"
    assert found["torch"] == found["packages"]["torch"]
    assert found["cpu_count"] == os.cpu_count()
    assert found["python"] == sys.version.split()[0]
