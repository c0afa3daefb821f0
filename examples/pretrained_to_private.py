"""From a pretrained model to private weights: ``python examples/pretrained_to_private.py FOLDER``.

The modules of Python's standard library are public here: a small GPT-2 is trained on them without privacy and saved.
Lines of six of its packages are private: LoRA adapters are trained on them with differential privacy, once to tell
whether a line is code, comment or docstring, once to predict the next token, by the commands that anybody would type.
The adapters are then loaded with transformers and peft alone, and judged again. ``--small`` takes a minute and learns
little; docs/pretrained.md shows what the whole finds.
"""

import ast
import json
import platform
import random
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

SOURCE = Path(sysconfig.get_path("stdlib"))
PRIVATE = ("asyncio", "email", "multiprocessing", "tkinter", "unittest", "xml")
KINDS = ("code", "comment", "docstring")
LENGTH, PIECE = 24, 128  # tokens of an example, examples in one pass
WHOLE = {"width": 64, "blocks": 2, "vocabulary": 1024, "pretraining": 600, "modules": None, "rows": (1500, 300)}
SMALL = {"width": 16, "blocks": 1, "vocabulary": 320, "pretraining": 20, "modules": 8, "rows": (20, 10)}
TRAINING = f"--epsilon 8 --sampling-rate 0.08 --batch-size {PIECE}"
LONG = {"train": "--steps 30", "optimize": "--steps 8 --rungs full --trials 2 --seeds 1 --verify simulate"}
SHORT = {"train": "--steps 3", "optimize": "--steps 2 --rungs full --trials 1 --seeds 1 --verify none"}
MODEL = f"hf:pretrained --setting data=private --setting sequence_length={LENGTH} --setting lora=8"
TASKS = {  # settings, and how they are trained
    "classifier": (f" --setting task=sequence-classification --setting num_labels={len(KINDS)}", "0.005"),
    "language-model": ("", "0.02"),
}


def commands(name, more=LONG):
    """The command lines of a task, without the name of the program."""
    settings, rate = TASKS[name]
    how = f"{MODEL}{settings} {TRAINING} --learning-rate {rate}"
    return [
        f"fit {MODEL}{settings} --memory 256MiB --limit 512 -o {name}-fit.json",
        f"optimize {how} {more['optimize']} -o {name}-search.json",
        f"train {how} {more['train']} --grouping {name}-search.json --save {name} -o {name}.json",
    ]


def lines(path):
    """The lines of a module that have 20 characters or more, without # and quotes, and the kind of each."""
    text, documented = path.read_text(encoding="utf-8", errors="replace"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            documented |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        kind = "docstring" if number in documented else "comment" if line.startswith("#") else "code"
        if len(bare := line.strip("#'\" ")) >= 20:
            yield {"text": bare, "label": KINDS.index(kind)}


def pretrain(folder, form):
    """Train tokenizer and model on the public modules, without privacy, and save both."""
    paths = sorted(SOURCE.glob("*.py"))[: form["modules"]]
    texts = [line for path in paths for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True)]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = bytewise, decoders.ByteLevel()
    kept = {"special_tokens": ["<pad>"], "initial_alphabet": bytewise.alphabet(), "show_progress": False}
    pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=form["vocabulary"], **kept))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token="<pad>")
    tokens = torch.tensor([token for row in tokenizer(texts).input_ids for token in row])
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_positions": LENGTH, "n_embd": form["width"], "n_layer": form["blocks"], "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **special))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=form["pretraining"])
    for _ in range(form["pretraining"]):
        taken = tokens[torch.randint(len(tokens) - LENGTH, (64, 1)) + torch.arange(LENGTH)]
        cross_entropy(model(taken).logits[:, :-1].flatten(0, 1), taken[:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_private(folder, form):
    """Write lines of the private packages, as many of every kind; the last eighth of every module is judged by."""
    rows = {"train": [], "validation": []}
    for path in sorted(path for name in PRIVATE for path in (SOURCE / name).rglob("*.py")):
        found = [] if "test" in path.relative_to(SOURCE).parts else list(lines(path))
        rows["train"] += found[: len(found) * 7 // 8]
        rows["validation"] += found[len(found) * 7 // 8 :]
    order = random.Random(0)
    for side, count in zip(rows, form["rows"], strict=True):
        of_kind = [[row for row in rows[side] if row["label"] == kind] for kind in range(len(KINDS))]
        rows[side] = [row for each in of_kind for row in order.sample(each, count)]
        order.shuffle(rows[side])
    DatasetDict({side: Dataset.from_list(each) for side, each in rows.items()}).save_to_disk(folder)
    return rows


def command(folder, line):
    """Run a command line in a process of its own, as it would be typed in the folder."""
    subprocess.run([sys.executable, "-m", "groupsearch", *shlex.split(line)], cwd=folder, check=True)


@torch.no_grad()
def judge(model, tokenizer, rows, labelled):
    """The mean over rows of being right, or of minus the loss per token, with transformers alone."""
    model.eval()
    total = 0.0
    for at in range(0, len(rows), PIECE):
        texts = [row["text"] for row in rows[at : at + PIECE]]
        how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        ids, mask = (tokenizer(texts, **how)[name] for name in ("input_ids", "attention_mask"))
        if labelled:
            labels = torch.tensor([row["label"] for row in rows[at : at + PIECE]])
            total += (model(ids, attention_mask=mask).logits.argmax(-1) == labels).sum().item()
        else:
            next_ids = torch.where(mask == 1, ids, -100).roll(-1, 1)
            next_ids[:, -1] = -100
            logits = model(ids).logits.flatten(0, 1)
            losses = cross_entropy(logits, next_ids.flatten(), reduction="none").view(ids.shape).sum(1)
            total -= (losses / (mask.sum(1) - 1).clamp(min=1)).double().sum().item()
    return total / len(rows)


def main(folder, form=WHOLE, more=LONG, command=command):
    """The whole way; returns what was found."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pretrain(folder / "pretrained", form)
    rows = write_private(folder / "private", form)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pretrained")
    sizes = {side: len(each) for side, each in rows.items()}
    found = {"kind": "example", "python": platform.python_version(), "examples": sizes, "tasks": {}}
    for name in TASKS:
        for line in commands(name, more):
            print(f"$ groupsearch {line}", flush=True)
            command(folder, line)
        told = json.loads((folder / f"{name}.json").read_text())
        labelled = name == "classifier"
        kind, labels = (GPT2ForSequenceClassification if labelled else GPT2LMHeadModel), {"num_labels": len(KINDS)}
        base = kind.from_pretrained(folder / "pretrained", **(labels if labelled else {}))
        before = 1 / len(KINDS) if labelled else judge(base, tokenizer, rows["validation"], labelled)
        again = judge(PeftModel.from_pretrained(base, folder / name), tokenizer, rows["validation"], labelled)
        found["tasks"][name] = {
            "before": before,
            "reported": told["metric"]["mean"],
            "loaded": again,
            **{key: told[key] for key in ("epsilon", "delta", "groups", "peak_bytes", "noise_multiplier", "steps")},
        }
        print(f"{name}: reported {told['metric']['mean']!r}, of the weights loaded again {again!r}", flush=True)
    return found


if __name__ == "__main__":
    small = "--small" in sys.argv
    place = Path(next(argument for argument in sys.argv[1:] if argument != "--small"))
    found = main(place, *((SMALL, SHORT) if small else (WHOLE, LONG)))
    (place / "found.json").write_text(json.dumps(found, indent=1) + "\n")
    assert all(task["reported"] == task["loaded"] for task in found["tasks"].values())
