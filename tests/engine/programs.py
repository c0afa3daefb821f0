"""Random small models with batch and loss, as Python text: a seed gives a recipe, a recipe gives a program."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tests.engine import ingredients, mixtures, quirks  # noqa: F401  (they enter themselves)
from tests.engine.writer import INGREDIENTS, MIXED, ORDER, RIGHT, Writer

ROOTS = {"vec": 3, "seq": 3, "tokens": 2, "img": 2, "table": 1}
FOLDS = ("views", "views first", "triplet", "choice")
SHAPES = {"vec": "4", "seq": "3, 4", "tokens": "3", "img": "4, 3, 3", "table": "3"}
KINDS = {"vec": "vec", "seq": "seq", "tokens": "seq", "img": "img", "table": "vec"}


@dataclass(frozen=True)
class Recipe:
    """What a program is made of; dropping a step leaves the others as they are.

    Attributes:
        root: what the batch holds: vec, seq, tokens, img, table.
        stem: whether a layer of its own comes first.
        steps: names of ingredients, each with the seed of its draws.
        fold: how several rows of an example are folded into the batch; "" for one row.
        end: seed of how the trunk ends.
        autocast: whether it runs in bfloat16.
    """

    seed: int
    root: str
    stem: bool
    steps: tuple[tuple[str, int], ...]
    fold: str
    end: int
    autocast: bool

    @property
    def verdict(self) -> str:
        """What the ingredients say: right, either or mixed."""
        return max((INGREDIENTS[name].verdict for name, _ in self.steps), key=ORDER.index, default=RIGHT)

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Every ingredient by name, folding and autocast among them."""
        extra = [f"fold: {self.fold}"] * bool(self.fold) + ["autocast"] * self.autocast + [f"root: {self.root}"]
        return (*(name for name, _ in self.steps), *extra)

    def smaller(self) -> list[Recipe]:
        """The recipes with one ingredient less."""
        fewer = [replace(self, steps=self.steps[:k] + self.steps[k + 1 :]) for k in range(len(self.steps))]
        fewer += [replace(self, fold="")] * bool(self.fold) + [replace(self, stem=False)] * self.stem
        return fewer + [replace(self, autocast=False)] * self.autocast


@dataclass(frozen=True)
class Program:
    """A program as text.

    It defines ``make() -> model``, ``examples(count, seed) -> batch``, ``loss(model, batch) -> (B,)``,
    ``after(model)``, which runs once the model is private, and ``P``, the rate of everything dropped at random.
    """

    recipe: Recipe
    source: str

    def load(self) -> dict[str, Any]:
        """Its names, fresh."""
        space: dict[str, Any] = {"__name__": f"program_{self.recipe.seed}"}
        exec(compile(self.source, f"<program {self.recipe.seed}>", "exec"), space)
        return space


def recipe(seed: int) -> Recipe:
    """The recipe of a seed."""
    draw = random.Random(seed)
    root = draw.choices(list(ROOTS), list(ROOTS.values()))[0]
    kind = KINDS[root]
    names = [n for n, i in INGREDIENTS.items() if kind in i.kinds and i.verdict != MIXED]
    chosen = draw.choices(names, [INGREDIENTS[n].weight for n in names], k=draw.randint(1, 4))
    if draw.random() < 0.3:
        bad = [n for n, i in INGREDIENTS.items() if kind in i.kinds and i.verdict == MIXED]
        weights = [INGREDIENTS[n].weight for n in bad]
        chosen.insert(draw.randint(0, len(chosen)), draw.choices(bad, weights)[0])
    fold = draw.choice(FOLDS) if draw.random() < 0.12 else ""
    steps = tuple((name, draw.randrange(10**6)) for name in chosen)
    return Recipe(seed, root, draw.random() < 0.4, steps, fold, draw.randrange(10**6), draw.random() < 0.03)


def write(recipe: Recipe) -> Program:
    """The program of a recipe."""
    w = Writer(random.Random(recipe.end), KINDS[recipe.root])
    _begin(w, recipe)
    for name, seed in recipe.steps:
        assert w.kind in INGREDIENTS[name].kinds
        w.draw = random.Random(seed)
        w.add(f"# {name.replace('_', ' ')}")
        INGREDIENTS[name].write(w)
    w.draw = random.Random(recipe.end)
    _end(w)
    return Program(recipe, _text(w, recipe))


def generate(seed: int) -> Program:
    """The program of a seed."""
    return write(recipe(seed))


def _begin(w: Writer, recipe: Recipe) -> None:
    if recipe.root == "tokens":
        w.add(f"z = self.{w.member('nn.Embedding(7, 4)', 'e')}(x)")
    elif recipe.root == "table":
        w.add(f"z = torch.cat([self.{w.member('nn.Embedding(5, 2)', 'e')}(x[:, 0].long()), x[:, 1:]], 1)")
    else:
        w.add("z = x")
    if recipe.stem:
        made = "nn.Conv2d(4, 4, 1)" if w.kind == "img" else "nn.Linear(4, 4)"
        w.add(f"z = torch.tanh(self.{w.member(made)}(z))")


def _end(w: Writer) -> None:
    if w.kind == "seq":
        way = w.pick("z = z.mean(1)", "z = z[:, -1]", "z = self.flat(z.flatten(1))")
    elif w.kind == "img":
        way = w.pick("z = z.mean((2, 3))", "z = self.flat(z.flatten(1))")
    else:
        way = ""
    if "flat(" in way:
        w.init.append(f"self.flat = nn.Linear({12 if w.kind == 'seq' else 36}, 4)")
    w.add(*[way] * bool(way))
    w.add(f"return self.{w.member('nn.Linear(4, 3)', 'head')}(z)")


def _text(w: Writer, recipe: Recipe) -> str:
    def block(lines: list[str], depth: int) -> list[str]:
        return [" " * depth + line for line in lines] or [" " * depth + "pass"]

    lines = ["import torch", "from torch import nn", "from torch.nn import functional as F"]
    lines += ["from torch.utils.checkpoint import checkpoint", "", "P = 0.3"]
    lines += [*dict.fromkeys(w.top)] if len(set(w.top)) == len(w.top) else _unique(w.top)
    lines += ["", "class Net(nn.Module):", "    def __init__(self):", "        super().__init__()", *block(w.init, 8)]
    lines += ["", "    def forward(self, x):", *block(w.forward, 8)]
    lines += ["", "def make():", f"    torch.manual_seed({recipe.seed})", "    return Net()"]
    lines += ["", "def after(model):", *block(w.after, 4), "", *_examples(recipe)]
    terms, start = [line.replace("fold(", "(") if not recipe.fold else line for line in w.terms], []
    if any("fold(" in line for line in terms):
        order = "rows.view(3, -1).mean(0)" if recipe.fold in ("views first", "triplet") else "rows.view(-1, 3).mean(1)"
        start = ["def fold(rows):", f"    return {order}", ""]
    body = [*_rows(recipe), *w.before, "logits = model(x)", *_value(recipe, random.Random(recipe.end)), *terms]
    if recipe.autocast:
        body = ["with torch.autocast('cpu', dtype=torch.bfloat16):", *("    " + line for line in body)]
    return "\n".join(
        [
            *lines,
            "",
            *start,
            "def loss(model, batch):",
            *block([*body, "return value.float()" if recipe.autocast else "return value"], 4),
            "",
        ]
    )


def _unique(top: list[str]) -> list[str]:
    """Lines with constants that several ingredients define kept once; classes of equal names are the same."""
    return [line for k, line in enumerate(top) if line.startswith((" ", "class", "def")) or line not in top[:k]]


def _examples(recipe: Recipe) -> list[str]:
    shape = SHAPES[recipe.root]
    rows = "3, " if recipe.fold and recipe.fold != "triplet" else ""
    made = f"torch.randint(7, (count, {rows}{shape}), generator=draw)"
    if recipe.root != "tokens":
        made = f"torch.randn(count, {rows}{shape}, generator=draw)"
    lines = ["def examples(count, seed):", "    draw = torch.Generator().manual_seed(seed)"]
    if recipe.root == "table":
        code = f"torch.randint(5, (count, {rows}1), generator=draw)"
        made = f"torch.cat([{code}, torch.randn(count, {rows}2, generator=draw)], -1)"
    keys = "apn" if recipe.fold == "triplet" else "x"
    lines += [f"    batch = {{{', '.join(f'{key!r}: {made}' for key in keys)}}}"]
    return [*lines, "    batch['y'] = torch.randint(3, (count,), generator=draw)", "    return batch"]


def _rows(recipe: Recipe) -> list[str]:
    return {
        "": ["x, target = batch['x'], batch['y']"],
        "views": ["x, target = batch['x'].flatten(0, 1), batch['y'].repeat_interleave(3)"],
        "choice": ["x, target = batch['x'].flatten(0, 1), batch['y'].repeat_interleave(3)"],
        "views first": ["x, target = batch['x'].transpose(0, 1).flatten(0, 1), batch['y'].repeat(3)"],
        "triplet": ["x, target = torch.cat([batch['a'], batch['p'], batch['n']]), batch['y'].repeat(3)"],
    }[recipe.fold]


def _value(recipe: Recipe, draw: random.Random) -> list[str]:
    if recipe.fold == "triplet":
        return ["a, p, n = logits.chunk(3)", "value = (a - p).square().sum(1) - torch.tanh((a - n).square().sum(1))"]
    if recipe.fold == "choice":
        return ["value = F.cross_entropy(logits[:, 0].view(-1, 3), batch['y'], reduction='none')"]
    extra = draw.choice(["", "", ", weight=torch.tensor([1.0, 4.0, 2.0])", ", label_smoothing=0.1"])
    value = [f"value = F.cross_entropy(logits, target{extra}, reduction='none')"]
    if recipe.fold == "views":
        value.append("value = value.view(-1, 3).mean(1)")
    if recipe.fold == "views first":
        value.append("value = value.view(3, -1).mean(0)")
    return value
