"""The numbers in docs/memory.md, from documents; ``python -m tests.support.memory_page`` writes them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from groupsearch.units import format_bytes, format_count, format_percent, format_ratio, format_signed_percent

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "memory.md"
BLOCK = re.compile(r"(<!-- numbers:(\w+) -->\n).*?(<!-- /numbers -->)", re.DOTALL)
Document = Mapping[str, Any]


CARD = "nvidia-h100-80gb-hbm3"
GRIDS = {"segments": f"grid-{CARD}", "expandable": f"grid-{CARD}-expandable"}
"""Documents of what a card allocated, by how its allocator was set."""


def document(name: str, device: str = "-cpu") -> Document:
    """A committed document, by the stem of its file."""
    found: Document = json.loads((ROOT / "profiles" / f"{name}{device}.json").read_text(encoding="utf-8"))
    return found


def sweep_curves() -> list[dict[str, Any]]:
    """Curves of the sweep; without a word embedding there is no one-hot, and one row stands for both."""
    curves: list[dict[str, Any]] = document("sweep")["curves"]
    return [{"fastdp_without_one_hot_bytes": each["fastdp_bytes"], **each} for each in curves]


def without_card() -> dict[tuple[str, str], tuple[int, int]]:
    """By allocator and grouping of the checkpointed ViT: allocated and reserved bytes as foretold without a card."""
    (row,) = (row for row in document("reserved")["rows"] if row["model"] == "ViT-B/16, checkpointed")
    return {
        (kind, found["grouping"]): (found[f"{kind}_allocated_bytes"], found[f"{kind}_reserved_bytes"])
        for kind in GRIDS
        for found in row["groupings"]
    }


def with_numbers(text: str) -> str:
    """The page's text with its blocks of numbers made anew."""
    return BLOCK.sub(lambda block: "".join([block[1], *(f"{line}\n" for line in BLOCKS[block[2]]()), block[3]]), text)


def _accuracy() -> Iterator[str]:
    yield from table_head("models", "peaks compared", "median error", "worst", "under-estimates", "worst of them")
    for kind, part in document("accuracy")["summary"].items():
        if kind in ("all", "transformers", "convolutions"):
            errors = part["estimate/measurement"]
            yield table_row(
                kind,
                format_count(errors["numbers"]),
                format_percent(errors["median_absolute"], 4),
                format_signed_percent(errors["worst"]),
                format_count(errors["underestimates"]),
                format_signed_percent(errors["worst_underestimate"]),
            )


def _evidence() -> Iterator[str]:
    groups = ("2 groups", "4 groups", "8 groups")
    yield from table_head(
        "model",
        "batch",
        "precision",
        "checkpointing",
        "no privacy",
        "all-layer",
        "layer-wise",
        *groups,
        "at the floor",
        "left",
    )
    for row in document("evidence")["rows"]:
        plain = row["nonprivate_peak_bytes"]
        fewest = f"{row['groups_at_floor']} group{'s' if row['groups_at_floor'] > 1 else ''}"
        yield table_row(
            row["model"],
            f"{row['batch_size']} of {row['given']}",
            "float32" if row["autocast"] == "none" else row["autocast"],
            row["checkpoint"],
            format_bytes(plain),
            *(format_ratio(row[key] / plain) for key in ("all_layer_bytes", "layer_wise_bytes")),
            *(format_ratio(row["at_most_groups_bytes"][key] / plain) for key in ("2", "4", "8")),
            f"{format_ratio(row['floor_bytes'] / plain)}, {fewest}",
            row["where"]["floor"],
        )


def _sweep() -> Iterator[str]:
    yield from table_head(
        "model", "attention", "checkpointing", "no privacy", "all-layer", "two groups, best", "below",
        "fastDP all-layer", "fastDP two groups, best", "below", "without one-hot", "below",
    )  # fmt: skip
    for curve in sweep_curves():
        bests = []
        for key in ("ours_bytes", "fastdp_bytes", "fastdp_without_one_hot_bytes"):
            bests += [format_bytes(min(curve[key])), f"`{_short(_best_site(curve, key))}`"]
        yield table_row(
            curve["model"],
            curve["attention"],
            curve["checkpoint"],
            format_bytes(curve["nonprivate_peak_bytes"]),
            format_bytes(curve["all_layer_bytes"]),
            *bests[:2],
            format_bytes(curve["fastdp_all_layer_bytes"]),
            *bests[2:],
        )


def _rows() -> Iterator[str]:
    """The curves of RoBERTa at the boundaries below its blocks."""
    for name in ("RoBERTa base", "RoBERTa large"):
        chosen = {
            (curve["attention"], curve["checkpoint"]): curve for curve in sweep_curves() if curve["model"] == name
        }
        yield f"{name}, GiB (fastDP by formula; in brackets without the one-hot):"
        yield ""
        edges = next(iter(chosen.values()))["block_boundaries"]
        steps = range(len(edges) // 6, len(edges), len(edges) // 6)
        yield from table_head("boundary below block", *(f"{step}" for step in steps))
        for (attention, checkpoint), curve in chosen.items():
            label = f"{attention}{', checkpointed' if checkpoint != 'none' else ''}"
            at = [edges[step] - 1 for step in steps]
            yield table_row(f"groupsearch, {label}", *(_gib(curve["ours_bytes"][b]) for b in at))
            pairs = zip(curve["fastdp_bytes"], curve["fastdp_without_one_hot_bytes"], strict=True)
            cells = [f"{_gib(whole)} ({_gib(without)})" for whole, without in pairs]
            yield table_row(f"fastDP, {label}", *(cells[b] for b in at))
        yield ""


def _rise() -> Iterator[str]:
    """Why the row of RoBERTa base rises while the others fall."""
    base, large = (_curve(name, "sdpa", "none") for name in ("RoBERTa base", "RoBERTa large"))
    whole, without = base["fastdp_bytes"], base["fastdp_without_one_hot_bytes"]
    first, last = base["block_boundaries"][1] - 1, base["block_boundaries"][-1] - 1
    block = (whole[last] - whole[first]) // (len(base["block_boundaries"]) - 2)
    yield f"- The word embedding's sum takes a one-hot of {format_bytes(base['one_hot_bytes'])} (40 x 256 x 50,265 x"
    yield "  12 bytes) when the group on the input side closes, while that group's book is still alive."
    yield f"- RoBERTa base needs {format_bytes(base['nonprivate_peak_bytes'])} without privacy, so book and one-hot"
    yield f"  are its peak: {format_bytes(whole[first])} with the boundary below block 1, {format_bytes(whole[last])}"
    yield f"  below block 11, {format_bytes(block)} more for every block that joins the group on the input side"
    yield "  (inputs of its layers, copies of their output gradients). The row rises all the way."
    yield f"- Without the one-hot the row falls, from {format_bytes(without[first])} to {format_bytes(min(without))} at"
    yield f"  `{_short(_best_site(base, 'fastdp_without_one_hot_bytes'))}`, as the rows of ViT do, which has no words."
    yield f"- RoBERTa large has the same one-hot, hidden by activations ({format_bytes(large['nonprivate_peak_bytes'])}"
    yield f"  without privacy): its row falls to {format_bytes(min(large['fastdp_bytes']))} at"
    yield f"  `{_short(_best_site(large, 'fastdp_bytes'))}` before it rises."


def _curve(name: str, attention: str, checkpoint: str) -> Document:
    found = sweep_curves()
    key = (name, attention, checkpoint)
    return next(curve for curve in found if (curve["model"], curve["attention"], curve["checkpoint"]) == key)


def _best_site(curve: Document, key: str) -> str:
    """The first site above the boundary that needs least."""
    name: str = document("sweep")["sites"][curve["model"]][curve[key].index(min(curve[key])) + 1]
    return name


def _reserved() -> Iterator[str]:
    yield from table_head(
        "model", "batch", "estimate / allocated", "reserved / estimate", "expandable: / allocated", "/ estimate"
    )
    for row in document("reserved")["rows"]:
        cells = [row["model"], str(row["batch_size"])]
        for kind in ("segments", "expandable"):
            found = row["groupings"]
            errors = [g["estimate_bytes"] / g[f"{kind}_allocated_bytes"] - 1 for g in found]
            held = [g[f"{kind}_reserved_bytes"] / g["estimate_bytes"] for g in found]
            cells.append(f"{format_signed_percent(max(errors))} to {format_signed_percent(min(errors))}")
            cells.append(f"{min(held):.2f} to {max(held):.2f}")
        yield table_row(*cells)


def _replay_peaks() -> Iterator[str]:
    yield from table_head("model, checkpointed", "batch", "all-layer", "replayed", "best 4 groups", "replayed")
    rows = document("replay")["peaks"]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {(row["grouping"], row["replay"]): row for row in rows if row["model"] == model}
        cells = [found[name, replay]["ratio"] for name in ("all-layer", "best:4") for replay in ("none", "all")]
        batch = str(found["all-layer", "none"]["batch"])
        yield table_row(model, batch, *map(format_ratio, cells))


def _replay_steps() -> Iterator[str]:
    yield from table_head("model, checkpointed", "step", "processor time", "wall-clock", "peak / no privacy")
    for row in document("replay")["steps"]:
        ratios = (row[key] for key in ("processor", "wall", "peak"))
        yield table_row(f"{row['model']}, batch {row['batch']}", row["step"], *map(format_ratio, ratios))


def _card() -> Iterator[str]:
    yield from table_head(
        "model, checkpointed",
        "segments",
        "groupings",
        "estimate / asked for",
        "estimate / allocated",
        "held / estimate",
    )
    for kind, stem in GRIDS.items():
        rows = document(stem, "")["rows"]
        for model in dict.fromkeys(row["model"] for row in rows):
            found = [row for row in rows if row["model"] == model]
            held = [row["reserved_bytes"] / row["estimate_bytes"] for row in found]
            errors = [[row["errors"][f"estimate/{level}"] for row in found] for level in ("requested", "measurement")]
            spans = [f"{_fine(max(e))} to {_fine(min(e))}" for e in errors]
            how = "as torch has them" if kind == "segments" else kind
            yield table_row(model, how, str(len(found)), *spans, f"{min(held):.2f} to {max(held):.2f}")


def _foretold() -> Iterator[str]:
    yield from table_head("grouping", "segments", "foretold: allocated", "on the card", "", "held", "on the card", "")
    foretold = without_card()
    for kind, stem in GRIDS.items():
        for row in document(stem, "")["rows"]:
            key = (kind, row["grouping"])
            if row["model"] == "ViT-B/16" and key in foretold:
                cells = []
                for told, seen in zip(foretold[key], (row["measured_bytes"], row["reserved_bytes"]), strict=True):
                    cells += [format_count(told), format_count(seen), _fine(told / seen - 1)]
                yield table_row(row["grouping"], "as torch has them" if kind == "segments" else kind, *cells)


def _fine(share: float) -> str:
    return format_signed_percent(share, 3)


def _short(name: str) -> str:
    return ".".join(name.split(".")[-4:])


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"


def table_head(*names: str) -> tuple[str, str]:
    """The head of a table."""
    return table_row(*names), table_row(*["---"] * len(names))


def table_row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


BLOCKS: dict[str, Callable[[], Iterator[str] | Sequence[str]]] = {
    "accuracy": _accuracy,
    "evidence": _evidence,
    "sweep": _sweep,
    "rows": _rows,
    "rise": _rise,
    "reserved": _reserved,
    "replay_peaks": _replay_peaks,
    "replay_steps": _replay_steps,
    "card": _card,
    "foretold": _foretold,
}

if __name__ == "__main__":
    PAGE.write_text(with_numbers(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
