"""hf: models with weights and data of local folders: what is read is what was written, and trains with privacy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from groupsearch import Grouping, trace_model
from groupsearch.errors import GroupSearchError
from groupsearch.training import TrainSettings, train
from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Data
from tests.cli.running import run
from tests.workloads.conftest import CONFIGS

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
GOOD, BAD = textwrap.dedent(str.title.__doc__ or "").split()[:8], (dict.__doc__ or "").split()[-8:]
TEXTS = [" ".join((GOOD, BAD)[i % 2][: 3 + i % 5]) for i in range(60)]
LABELS = [i % 2 for i in range(60)]
CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "vit": transformers.ViTForImageClassification,
    "t5": transformers.T5ForConditionalGeneration,
}
Saved = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved(kind)``: the folder of a tiny model with its tokenizer, or its image processor."""
    place = tmp_path_factory.mktemp("saved")

    def save(kind: str) -> Path:
        folder = place / kind
        if not folder.is_dir():
            config = CONFIGS[kind] | ({} if kind == "vit" else {"bos_token_id": 1, "eos_token_id": 1})
            torch.manual_seed(3)
            CLASSES[kind](transformers.AutoConfig.for_model(kind, **config)).save_pretrained(folder)
            if kind == "vit":
                transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
            else:
                save_tokenizer(folder)
        return folder

    return save


def save_tokenizer(folder: Path, padding: str | None = "[PAD]") -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=90, special_tokens=["[PAD]", "[UNK]"])
    words.train_from_iterator(TEXTS, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token=padding)
    fast.save_pretrained(folder)


def write(folder: Path, **columns: Any) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return str(folder)


def of(text: Path, **settings: Any) -> tuple[Any, Data]:
    workload = load_workload(f"hf:{text}", **settings)
    assert workload.data is not None
    return workload, workload.data


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_are_those_of_the_folder_for_every_seed(kind: str, saved: Saved) -> None:
    written = CLASSES[kind].from_pretrained(saved(kind)).state_dict()
    workload = load_workload(f"hf:{saved(kind)}")
    for seed in (0, 1):
        built = workload.build(seed).state_dict()
        assert built.keys() == written.keys()
        assert all(torch.equal(built[name], written[name]) for name in written)
    assert workload.model.training
    assert not torch.equal(
        load_workload(f"hf:{saved(kind)}", weights="random").model.state_dict()[max(written)], written[max(written)]
    )


def test_nothing_is_loaded_on_meta_and_nothing_is_printed(saved: Saved, capfd: pytest.CaptureFixture[str]) -> None:
    workload = load_workload(f"hf:{saved('bert')}", num_labels=3)
    with torch.device("meta"):
        model = workload.build()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    workload.build()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_weights_of_another_folder_under_a_head_of_its_own(saved: Saved, tmp_path: Path) -> None:
    config = json.loads((saved("bert") / "config.json").read_text()) | {"architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_workload(f"hf:{tmp_path}").build(0) is not None  # no weights here: random ones
    workload = load_workload(f"hf:{tmp_path}", weights=saved("bert"), num_labels=5)
    first, second = workload.build(0), workload.build(1)
    body = "bert.encoder.layer.0.output.dense.weight"
    written = CLASSES["bert"].from_pretrained(saved("bert"))
    assert torch.equal(first.get_parameter(body), written.get_parameter(body))
    assert first.get_parameter("classifier.weight").shape == (5, 16)
    assert not torch.equal(first.get_parameter("classifier.weight"), second.get_parameter("classifier.weight"))


def test_weights_that_are_not_of_the_model_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(GroupSearchError, match=r"missing or of another shape are bert\..* and \d+ more"):
        load_workload(f"hf:{saved('bert')}", weights=saved("gpt2")).build()
    with pytest.raises(GroupSearchError, match="found no such folder"):
        load_workload(f"hf:{saved('bert')}", weights=tmp_path / "nowhere")
    with pytest.raises(GroupSearchError, match=r"without either of them.*weights=random"):
        load_workload(f"hf:{saved('bert')}", weights=tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(GroupSearchError, match=r"pickled \(\.bin\)"):
        load_workload(f"hf:{saved('bert')}", weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(GroupSearchError, match="could not be loaded"):
        load_workload(f"hf:{saved('bert')}", weights=tmp_path).build()


def test_rows_become_tokens_padded_behind_and_split_the_same_way(saved: Saved, tmp_path: Path) -> None:
    data = write(tmp_path / "data", text=TEXTS, label=LABELS, other=TEXTS)
    workload, found = of(saved("bert"), data=data, sequence_length=6)
    assert (found.train_size, found.validation_size) == (54, 6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved("bert"))
    rows = sorted((*tokenizer(text)["input_ids"][:6], label) for text, label in zip(TEXTS, LABELS, strict=True))
    read = []
    for part in (found.train, found.validation):
        assert set(part) == {"input_ids", "attention_mask", "labels"}
        for ids, mask, label in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            tokens = int(mask.sum())
            assert mask.tolist() == [1] * tokens + [0] * (6 - tokens)
            assert ids[tokens:].eq(0).all()
            read.append((*ids[:tokens].tolist(), int(label)))
    assert sorted(read) == rows
    again = of(saved("bert"), data=data, sequence_length=6, batch_size=2)[1]
    assert torch.equal(again.validation["input_ids"], found.validation["input_ids"])
    assert workload.make_batch(3)["input_ids"].shape == (3, 6)


def test_tokens_that_are_given_lose_what_is_masked(saved: Saved, tmp_path: Path) -> None:
    ids, mask = [[0, 5, 6], [7, 8, 9]] * 10, [[0, 1, 1], [1, 1, 1]] * 10
    found = of(saved("gpt2"), data=write(tmp_path / "data", input_ids=ids, attention_mask=mask), sequence_length=4)[1]
    rows = {tuple(row) for row in found.train["input_ids"].tolist()}
    assert rows == {(5, 6, 0, 0), (7, 8, 9, 0)}
    assert "labels" not in found.train


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_padding_changes_no_loss_and_no_metric(kind: str, saved: Saved, tmp_path: Path) -> None:
    data = write(tmp_path / "data", text=TEXTS, **({"target": TEXTS} if kind == "t5" else {"label": LABELS}))
    short, long = (of(saved(kind), data=data, sequence_length=length, metric="accuracy") for length in (8, 16))
    for score in ("loss", "metric"):
        values = [getattr(workload, score)(workload.model, found.train) for workload, found in (short, long)]
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)


def test_loss_of_predicted_tokens_is_the_models_own(saved: Saved, tmp_path: Path) -> None:
    workload, found = of(saved("gpt2"), data=write(tmp_path / "data", text=TEXTS), sequence_length=8)
    losses = workload.loss(workload.model, found.validation)
    for i, loss in enumerate(losses):
        ids = found.validation["input_ids"][i : i + 1, : int(found.validation["attention_mask"][i].sum())]
        torch.testing.assert_close(loss, workload.model(input_ids=ids, labels=ids).loss)
    assert workload.metric is not None
    assert torch.equal(workload.metric(workload.model, found.validation), -losses)
    assert workload.metric_name == "negative loss"


def test_splits_of_their_own(saved: Saved, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    parts = {"train": range(40), "validation": range(40, 55), "test": range(55, 60)}
    datasets.DatasetDict({name: rows.select(part) for name, part in parts.items()}).save_to_disk(tmp_path / "data")
    found = of(saved("bert"), data=tmp_path / "data")[1]
    assert (found.train_size, found.validation_size) == (40, 15)
    assert found.validation["labels"].tolist() == LABELS[40:55]
    with pytest.raises(GroupSearchError, match="Give one of them"):
        of(saved("bert"), data=tmp_path / "data", validation=0.2)


def test_a_folder_that_changed_is_read_again(saved: Saved, tmp_path: Path) -> None:
    first = of(saved("bert"), data=write(tmp_path / "data", text=TEXTS, label=LABELS))[1]
    second = of(saved("bert"), data=write(tmp_path / "data", text=TEXTS[:30], label=LABELS[:30]))[1]
    assert (first.train_size, second.train_size) == (54, 27)


def test_pictures_and_pixels(saved: Saved, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("L", (20, 10), color=8 * i) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = [i % 5 for i in range(20)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.save_to_disk(tmp_path / "pictures")
    workload, found = of(saved("vit"), data=tmp_path / "pictures")
    pixels = found.train["pixel_values"]
    assert pixels.shape == (18, 3, 8, 8)
    assert set(pixels[:, 0, 0, 0].mul(127.5).add(127.5).round().int().tolist()) <= {8 * i for i in range(20)}
    data = write(tmp_path / "pixels", pixel_values=pixels.tolist(), label=labels[:18])
    assert torch.equal(
        torch.cat([part["pixel_values"] for part in vars(of(saved("vit"), data=data)[1]).values()]).sum(), pixels.sum()
    )
    assert workload.loss(workload.model, found.validation).shape == (2,)
    narrow = write(tmp_path / "narrow", pixel_values=torch.zeros(9, 3, 8, 4).tolist(), label=[0] * 9)
    with pytest.raises(GroupSearchError, match=r"shape \(3, 8, 8\).*found \(3, 8, 4\)"):
        of(saved("vit"), data=narrow)


def test_sequences_become_sequences(saved: Saved, tmp_path: Path) -> None:
    backwards = [" ".join(reversed(text.split())) for text in TEXTS]
    data = write(tmp_path / "data", text=TEXTS, target=backwards)
    workload, found = of(saved("t5"), data=data, sequence_length=6)
    assert {name: tensor.shape[1] for name, tensor in found.train.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels", "decoder_input_ids"), 6
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved("t5"))
    tokens = [[tokenizer(text)["input_ids"] for text in texts] for texts in (TEXTS, backwards)]
    rows = [(x[:6], y[:6]) for x, y in zip(*tokens, strict=True)]
    losses = workload.loss(workload.model, found.validation)
    for i, loss in enumerate(losses):
        ids, mask, labels = (found.validation[name][i] for name in ("input_ids", "attention_mask", "labels"))
        ids, labels = ids[mask == 1], labels[labels != -100]
        assert (ids.tolist(), labels.tolist()) in rows
        # of this example alone, without padding, and with the decoder's inputs made by the model
        torch.testing.assert_close(loss, workload.model(input_ids=ids[None], labels=labels[None]).loss)
    columns = {"input_ids": tokens[0], "labels": [[*row, -100, -100] for row in tokens[1]]}
    again = of(saved("t5"), data=write(tmp_path / "tokens", **columns), sequence_length=6)[1]
    assert all(torch.equal(again.train[name], found.train[name]) for name in found.train)
    wrong = {**columns, "labels": [[97]] * 60}
    with pytest.raises(GroupSearchError, match=r"tokens from 0 to 96.*found 97 to 97"):
        of(saved("t5"), data=write(tmp_path / "wrong", **wrong))
    with pytest.raises(GroupSearchError, match=r"text in row 0 of the column target .* found 3"):
        of(saved("t5"), data=write(tmp_path / "numbers", text=TEXTS, target=[3] * 60))


def test_a_decoder_classifies_when_asked_or_saved_so(saved: Saved, tmp_path: Path) -> None:
    data = write(tmp_path / "data", text=TEXTS, label=LABELS)
    workload, found = of(saved("gpt2"), data=data, task="sequence-classification", sequence_length=8)
    few = {name: tensor[:4] for name, tensor in found.train.items()}
    together = workload.loss(workload.model, few)
    alone = [workload.loss(workload.model, {k: v[i : i + 1] for k, v in few.items()}) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    workload.model.save_pretrained(tmp_path / "classifier")
    assert load_workload(f"hf:{tmp_path / 'classifier'}").settings["task"] == "sequence-classification"
    with pytest.raises(GroupSearchError, match=r"task .* one of sequence-classification, found 'causal-lm'"):
        load_workload(f"hf:{saved('bert')}", task="causal-lm")
    save_tokenizer(tmp_path / "unpadded", padding=None)
    with pytest.raises(GroupSearchError, match=r"padding token .*tokenizer\.pad_token"):
        of(saved("gpt2"), data=data, task="sequence-classification", processor=tmp_path / "unpadded")


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"sentence": TEXTS, "label": LABELS}, {}, "column text or input_ids .* found sentence, label.*rename_column"),
        ({"text": TEXTS}, {}, "column label .* found text"),
        ({"text": TEXTS, "label": ["good"] * 60}, {}, r"whole numbers .* found 'good'.*class_encode_column\('label'\)"),
        ({"text": TEXTS, "label": [i % 3 for i in range(60)]}, {}, "labels from 0 to 1.*found 0 to 2.*num_labels"),
        ({"text": TEXTS, "label": [-1] * 60}, {}, "found -1 to -1"),
        ({"text": [*TEXTS[:59], ""], "label": LABELS}, {}, "no token in row 59 .*filter"),
        ({"text": [*TEXTS[:59], None], "label": LABELS}, {}, "text in row 59 .* found None"),
        ({"input_ids": [[3, 97]] * 60, "label": LABELS}, {}, "tokens from 0 to 96.*found 3 to 97.*tokenizer"),
        ({"input_ids": [3] * 60, "label": LABELS}, {}, "list of whole numbers"),
        ({"text": TEXTS[:1], "label": LABELS[:1]}, {}, "at least 2 rows .* found 1"),
        ({"text": TEXTS, "label": LABELS}, {"validation": 1.5}, "share between 0 and 1, found 1.5"),
        ({"text": TEXTS, "label": LABELS}, {"metric": "f1"}, "one of accuracy, negative-loss, found 'f1'"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    columns: dict[str, Any], settings: dict[str, Any], message: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(GroupSearchError, match=message):
        load_workload(f"hf:{saved('bert')}", data=write(tmp_path / "data", **columns), **settings)


def test_folders_that_are_something_else_are_refused(saved: Saved, tmp_path: Path) -> None:
    model = f"hf:{saved('bert')}"
    for folder, message in (
        (tmp_path / "nowhere", "no folder"),
        ("s3://bucket/data", "no folder"),
        (tmp_path, "no data"),
    ):
        with pytest.raises(GroupSearchError, match=rf"Found {message}.*save_to_disk"):
            load_workload(model, data=folder)
    data = write(tmp_path / "data", text=TEXTS, label=LABELS)
    with pytest.raises(GroupSearchError, match=r"no tokenizer\.json.*processor=\.\.\."):
        load_workload(model, data=data, processor=tmp_path)
    with pytest.raises(GroupSearchError, match=r"Found metric .* without data"):
        load_workload(model, metric="accuracy")
    with pytest.raises(GroupSearchError, match=r"column target or labels in .*found text, label.*rename_column"):
        load_workload(f"hf:{saved('t5')}", data=write(tmp_path / "no-target", text=TEXTS, label=LABELS))
    datasets.DatasetDict({"test": datasets.load_from_disk(data)}).save_to_disk(tmp_path / "test-only")
    with pytest.raises(GroupSearchError, match=r"split named train .* found test"):
        load_workload(model, data=tmp_path / "test-only")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("raise ImportError('not here')\n")
    (tmp_path / "data").mkdir()
    code = "import sys; from groupsearch.workloads import load_workload; load_workload('hf:gpt2', data=sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "data"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        check=False,
    )
    assert "needs the datasets package" in done.stderr
    assert "pip install 'groupsearch[datasets]'" in done.stderr


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_training_is_private_and_learns(kind: str, saved: Saved, tmp_path: Path) -> None:
    columns = {"target": [text.split()[0] for text in TEXTS] * 4} if kind == "t5" else {"label": LABELS * 4}
    data = write(tmp_path / "data", text=TEXTS * 4, **columns)
    workload, found = of(saved(kind), data=data, sequence_length=8)
    assert workload.metric is not None
    assert workload.training is not None
    with torch.no_grad():
        before = workload.metric(workload.build().eval(), found.validation).mean().item()
    trace = trace_model(workload.model, workload.make_batch(8), workload.loss)
    settings = TrainSettings.of(workload, steps=20, physical_batch=32, learning_rate=1e-2, seed=0)
    result = train(workload, Grouping.parse(trace, "best:3"), settings)
    assert result.metric is not None
    assert result.metric > before + 0.2
    assert 7.5 < result.epsilon <= 8
    assert result.delta == pytest.approx(1e-2 / found.train_size)


def test_training_defaults_fit_the_size_of_the_data() -> None:
    from groupsearch.workloads.data import training_defaults

    small, large = training_defaults(100), training_defaults(1_000_000)
    assert (small.sampling_rate, small.steps) == (0.2, 50)
    assert large.sampling_rate * 1_000_000 == 1024
    assert abs(large.steps * large.sampling_rate - 10) < 0.01


@pytest.mark.slow
def test_optimize_from_folder_to_front(saved: Saved, tmp_path: Path) -> None:
    data = write(tmp_path / "data", text=TEXTS * 4, label=LABELS * 4)
    place = tmp_path / "search.json"
    few = ("--steps", 6, "--trials", 3, "--seeds", 1, "--rungs", "full", "--verify", "simulate", "--batch-size", 16)
    result = run(
        "optimize", f"hf:{saved('bert')}", "--setting", f"data={data}", "--checkpoint", "blocks", *few, "-o", place
    )
    assert result.exit_code == 0, result.output
    document = json.loads(place.read_text())
    assert len(document["candidates"]) >= 3
    assert document["recommended"]["metric"]["name"] == "accuracy"
    assert place.with_suffix(".html").is_file()
