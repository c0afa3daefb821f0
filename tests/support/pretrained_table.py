"""The matrix of docs/hub-models.md: what becomes of a pretrained model in every command, found by running them.

``python -m tests.support.pretrained_table`` writes it; with names of rows it runs those and keeps the others.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.running import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hub-models.md"
MARKS = "<!-- matrix -->\n", "<!-- /matrix -->\n"
SMALL = ("--steps", 2, "--batch-size", 4)
SEARCH = ("--trials", 1, "--max-groups", 2, "--seeds", 1, "--rungs", "full", "--verify", "none")
COMMANDS: Mapping[str, tuple[object, ...]] = {
    "profile": ("--batch-size", 4, "--grouping", "all-layer"),
    "fit": ("--memory", "64MiB", "--limit", 4, "--batch-size", 4),
    "optimize": (*SEARCH, *SMALL),
    "train": ("--grouping", "all-layer", *SMALL),
    "verify": (),
}
FILE = '''
from pathlib import Path

import torch
from torch import nn
from groupsearch.workloads import Data, TrainingDefaults, Workload

HERE = Path(__file__).parent

def of(build):
    examples = {"input_ids": torch.arange(192).view(24, 8) % 97, "labels": torch.arange(24) % 2}

    def logits(model, batch):
        return model(input_ids=batch["input_ids"]).logits.float()

    def loss(model, batch):
        return nn.functional.cross_entropy(logits(model, batch), batch["labels"], reduction="none")

    def metric(model, batch):
        return (logits(model, batch).argmax(-1) == batch["labels"]).float()

    return Workload(
        name="mine",
        build=build,
        make_batch=lambda size: {name: tensor[:size] for name, tensor in examples.items()},
        loss=loss,
        metric=metric,
        metric_is_share=True,
        data=Data(examples, examples),
        batch_size=4,
        training=TrainingDefaults(steps=2, learning_rate=0.01),
    )

def pretrained():
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(HERE / "bert")
    with (HERE / "built").open("a") as file:
        file.write(".")
    return model

def adapted(model):
    import peft

    settings = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
    return peft.get_peft_model(model, settings).train()

def frozen():
    def build(seed=0):
        model = pretrained()
        model.bert.requires_grad_(False)
        return model

    return of(build)

class Integers(nn.Module):
    """A frozen linear layer: weights as integers of 8 bits and a scale for every output."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("integers", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.integers.to(x.dtype) * self.scale, self.bias)

def integers():
    def build(seed=0):
        model = adapted(pretrained())
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters()):
                model.set_submodule(name, Integers(module))
        return model

    return of(build)

def packed():
    def build(seed=0):
        model = frozen().build()
        model.bert = torch.ao.quantization.quantize_dynamic(model.bert, {nn.Linear}, dtype=torch.qint8)
        return model

    return of(build)
'''


@dataclass(frozen=True)
class Row:
    """A way to come by a model.

    Attributes:
        model: a folder for ``hf:``, or a function of the file.
        settings: of the workload.
        refusal: part of the message where it is refused, and what the matrix says of it.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    refusal: tuple[str, str] | None = None


_PACKED = ("holds weights in a packed form", "weights in a packed form")
ROWS: Mapping[str, Row] = {
    "weights of a folder": Row("bert"),
    "a configuration, random weights": Row("bert", {"weights": "random"}),
    "LoRA": Row("bert", {"lora": 2}),
    "DoRA": Row("bert", {"dora": 2}),
    "IA3": Row("bert", {"ia3": "true"}),
    "prompt tuning": Row("bert", {"prompt": 2}),
    "prefix tuning": Row("gpt2", {"prefix": 2}),
    "head tied to the embedding": Row("gpt2"),
    "sequence to sequence": Row("t5"),
    "sequence to sequence, LoRA": Row("t5", {"lora": 2}),
    "half precision (`dtype=bfloat16`), LoRA": Row("bert", {"dtype": "bfloat16", "lora": 2}),
    "`from_pretrained` in a task file, frozen below its head": Row("frozen"),
    "integers and scales in buffers, LoRA": Row("integers"),
    "packed by `torch.ao.quantization`": Row("packed", refusal=_PACKED),
}


def make(folder: Path) -> None:
    """The models, the data and the file of the rows."""
    import datasets
    import torch
    import transformers

    from tests.workloads.conftest import CONFIGS

    classes = {
        "bert": transformers.BertForSequenceClassification,
        "gpt2": transformers.GPT2LMHeadModel,
        "t5": transformers.T5ForConditionalGeneration,
    }
    for kind, made in classes.items():
        config = CONFIGS[kind] | ({"bos_token_id": 1, "eos_token_id": 1} if kind == "gpt2" else {})
        made(transformers.AutoConfig.for_model(kind, **config)).save_pretrained(folder / kind)
    tokens = (torch.arange(240).view(24, 10) % 90 + 5).tolist()
    columns = {"input_ids": tokens, "labels": tokens, "label": [i % 2 for i in range(24)]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "data")
    (folder / "mine.py").write_text(FILE)


def outcome(folder: Path, name: str, command: str) -> str:
    """What the matrix says of a row in a command, by running it.

    Raises:
        AssertionError: for a refusal of something else than the row says, and for any other end.
    """
    row = ROWS[name]
    if command == "verify":
        document = folder / "profile.json"
        if not _ends(row, "profile", *_asked(folder, row), *COMMANDS["profile"], "-o", document, "--force"):
            return _refused(row)  # there is no document to verify
        arguments: Sequence[object] = (document,)
    else:
        arguments = _asked(folder, row)
    kept = ("-o", folder / f"{command}.json", "--force") if command == "optimize" else ()
    return "works" if _ends(row, command, *arguments, *COMMANDS[command], *kept, "--json") else _refused(row)


def _asked(folder: Path, row: Row) -> tuple[object, ...]:
    if not (folder / row.model).is_dir():
        return (f"{folder / 'mine.py'}:{row.model}",)
    settings = {"data": folder / "data", "sequence_length": 8, **row.settings}
    return (f"hf:{folder / row.model}", *(x for k, v in settings.items() for x in ("--setting", f"{k}={v}")))


def _ends(row: Row, command: str, *arguments: object) -> bool:
    """Whether a command works; if not, it is refused as the row says, in a paragraph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of tied heads and of what it asks transformers
        result = run(command, *arguments)
    if result.exit_code == 0:
        assert row.refusal is None, f"{command} is not refused"
        return True
    assert result.exit_code == 2, result.output
    assert row.refusal is not None, result.stderr
    (message,) = [line for line in result.stderr.strip().splitlines() if line.startswith("Error: ")]
    assert row.refusal[0] in message
    return False


def _refused(row: Row) -> str:
    assert row.refusal is not None
    return f"refused: {row.refusal[1]}"


def written() -> dict[str, dict[str, str]]:
    """The matrix as it is: outcomes by row and command."""
    between = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [line.split(" | ") for line in re.findall(r"^\| (.*) \|$", between, re.MULTILINE)]
    return {cells[0]: dict(zip(COMMANDS, cells[1:], strict=True)) for cells in rows[2:]}


def main(wanted: Sequence[str]) -> None:
    """Run the rows of these names, or all, and write each when it is done."""
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        for name in ROWS:
            if not wanted or name in wanted:
                found = {command: outcome(Path(place), name, command) for command in COMMANDS}
                _write({**written(), name: found})


def _write(rows: Mapping[str, Mapping[str, str]]) -> None:
    table = [("model", *COMMANDS), ("---",) * (1 + len(COMMANDS))]
    table += [(name, *rows[name].values()) for name in ROWS if name in rows]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + lines + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
