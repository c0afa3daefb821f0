"""docs/models.md: which models the engine is exact for, found by running them.

``python -m tests.support.model_table`` writes the page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from tests.engine.test_parity import DTYPES, assert_agree, groupings, step, truth, typical_norm
from tests.support.case import Case
from tests.support.reference import SiteGradients, combine, group_norms, magnitudes
from tests.support.zoo import CHECKPOINTS, LISTED, Model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEADER = ("model", "trained", "sites", "float32", "float64", "attention", "checkpointing")
HEADROOM = 3  # another processor rounds otherwise
VANISHING = 1e-6
INTRODUCTION = """\
# Models

Every model below is built from its configuration with random weights, two layers deep, and trained as it is: no layer
is replaced, wrapped or registered. One step of the engine is compared with one-example-at-a-time autograd. The page is
written by `python -m tests.support.model_table`, which runs the models; every fourth row is run again by the tests and
all of them by `pytest -m slow`, which hold the page to it.

- *sites*: uses of layers that own trainable parameters. A tied or reused layer has several. `parameter`: parameters
  that are not in a layer of their own (class tokens, positions, layer scales) or are used outside of its forward;
  `function`: modules whose examples are differentiated one at a time.
- *float32*, *float64*: the largest error of any clipped sum, relative to the largest number that an example adds to it,
  rounded up to a power of ten, over one group, a group per block, a group per layer and random groups.
- *attention*, *checkpointing*: the implementations, and the kinds of transformers' activation checkpointing, that the
  same holds for; a dash where the model has no choice of them or was not tried with them. `blocks` is
  `groupsearch.workloads.blocks.checkpoint_blocks`.
- *refused*: the engine says no and names the layer; it is never silently wrong. What to do is said in its place.

timm's ViT, BEiT, Swin, ConvNeXt and ResNets with GroupNorm, and torchvision's ResNet with GroupNorm, ViT and Swin are
exact too (`tests/engine/test_vision.py`, which runs where the two are installed and load).

"""


def five_groupings(case: Case) -> dict[str, Grouping]:
    """All-layer, block-wise, layer-wise and two random ones."""
    sites, _ = truth(case, torch.float64)
    chosen = groupings(case, sites)
    layer_wise = chosen["layer-wise"]
    blocks = tuple(b for b in layer_wise.boundaries if sites[b].block != sites[b - 1].block)
    return {
        "all-layer": chosen["all-layer"],
        "block-wise": Grouping(blocks, sites),
        "layer-wise": layer_wise,
        "random 0": chosen["random 0"],
        "random 1": chosen["random 1"],
    }


@cache
def reached(model: Model, dtype: torch.dtype, rule: str = "abadi") -> float:
    """The smallest power of ten, with some headroom, that the engine's clipped sums agree with the reference to.

    Over five groupings, over three for a variant. The norm of every example in every group is
    the reference's, too, which holds the realised groups to the requested ones: a site in another
    group would move its norm there. Left out is what no tolerance can hold: a rule that normalises
    a gradient that is zero but for rounding (an attention key's bias, alone in its group).

    Raises:
        AssertionError: when they disagree beyond the model's own tolerance.
        UnsupportedModelError: when the engine refuses the model.
    """
    (_, exact), (_, gradients) = truth(model, torch.float64), truth(model, dtype)
    power = -16
    for name, grouping in five_groupings(model).items():
        if model.name not in LISTED and name in ("layer-wise", "random 1"):
            continue
        plan = ClipPlan(grouping, max_grad_norm=typical_norm(gradients), rule=rule)
        if rule != "abadi" and float(group_norms(exact, plan).min()) < VANISHING * plan.max_grad_norm:
            continue
        engine, sums = step(model, dtype, plan)
        expected, largest = combine(gradients, plan), magnitudes(gradients, plan)
        try:
            assert_agree(sums, expected, model.tolerance[dtype], largest)
            _assert_norms_agree(engine.norms, gradients, plan, 10 * model.tolerance[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name} {grouping}: {error}") from error
        while not _agree(sums, expected, 10.0**power / HEADROOM, largest):
            power += 1
    return 10.0**power


def _assert_norms_agree(found: Tensor, gradients: SiteGradients, plan: ClipPlan, allowed: float) -> None:
    expected = group_norms(gradients, plan)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=allowed, atol=allowed * float(expected.max()))


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, largest: dict[str, float]) -> bool:
    try:
        assert_agree(found, expected, tolerance, largest)
    except AssertionError:
        return False
    return True


@cache
def cells(model: Model) -> tuple[str, ...]:
    """What the model's row says, by running it and its variants."""
    if not _exact(model):
        return (*_naming(model), f"refused: {_remedy(model)}", *["-"] * 4)
    sites, _ = truth(model, torch.float64)
    counts = Counter(site.kind for site in sites)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    tolerances = [f"{reached(model, dtype):.0e}" for dtype in DTYPES]
    attention = _outcomes(model, "eager", always=("sdpa",))
    return (*_naming(model), f"{len(sites)}: {kinds}", *tolerances, attention, _outcomes(model, *CHECKPOINTS, "blocks"))


def _naming(model: Model) -> tuple[str, str]:
    name, comma, rest = model.title.partition(",")
    return f"`{name}`{comma}{rest}", model.trained


@cache
def _exact(model: Model) -> bool:
    try:
        reached(model, torch.float64)
    except (UnsupportedModelError, RuntimeError):  # some fail without an engine, too
        return False
    return True


def _outcomes(model: Model, *kinds: str, always: tuple[str, ...] = ()) -> str:
    present = {kind: model.variants[kind] for kind in kinds if kind in model.variants}
    held = [*(always if present else ()), *(kind for kind, variant in present.items() if _exact(variant))]
    refused = [f"{kind} refused: {_remedy(present[kind])}" for kind in present if kind not in held]
    return "; ".join([*([", ".join(held)] if held else []), *refused]) or "-"


def _remedy(model: Model) -> str:
    assert model.refusal is not None, f"{model.name} is refused and the catalogue does not say so"
    return model.refusal.remedy


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    yield _line(HEADER)
    yield _line(("---",) * len(HEADER))
    for model in LISTED.values():
        if model.title:
            yield _line(cells(model))


def _line(texts: tuple[str, ...]) -> str:
    return f"| {' | '.join(texts)} |"


def written() -> tuple[tuple[str, ...], ...]:
    """The rows of the page as it is, each as its cells."""
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(tuple(row.split(" | ")) for row in rows[2:])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
