"""Documents like those of the commands, made without a model: a small transformer's bytes, written down by formula."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import Booked, Instant, Site, StaticBytes, Trace
from groupsearch.records import environment, new_document

BATCH, POSITIONS, WIDTH, BLOCKS = 64, 17, 64, 4
STYLES = {
    "all-layer": (),
    "layer-wise": tuple(range(1, 28)),
    "4": (14, 22, 25),
    "2": (19,),
    "3": (19, 25),
    "7": (11, 16, 17, 23, 25, 26),
}


def transformer_trace() -> Trace:
    """28 sites: patch, position, 4 blocks of 6, norm, head; activations freed as backward passes."""
    shapes = [("patch", "patch", 12, WIDTH), ("position", "position", 0, WIDTH)]
    for block in range(BLOCKS):
        name = f"blocks.{block}"
        shapes += [(f"{name}.norm1", name, WIDTH, WIDTH), (f"{name}.qkv", name, WIDTH, 3 * WIDTH)]
        shapes += [(f"{name}.proj", name, WIDTH, WIDTH), (f"{name}.norm2", name, WIDTH, WIDTH)]
        shapes += [(f"{name}.fc1", name, WIDTH, 4 * WIDTH), (f"{name}.fc2", name, 4 * WIDTH, WIDTH)]
    shapes += [("norm", "norm", WIDTH, WIDTH), ("head", "head", POSITIONS * WIDTH, 10)]
    sites = [_site(*shape) for shape in shapes]
    weights = sum(4 * site.parameter_count for site in sites)
    static = StaticBytes(weights=weights, buffers=4096, optimizer=2 * weights, batch=BATCH * 64 * 4)
    activations = [4 * BATCH * site.positions * (site.inputs + site.outputs) for site in sites]
    total = sum(activations)
    instants = [Instant(-1, False, static.total + part * total // 12, part * total // 12) for part in range(1, 13)]
    booked = []
    for index in reversed(range(len(sites))):
        alive, gradient = sum(activations[: index + 1]), 4 * BATCH * sites[index].positions * sites[index].outputs
        instants.append(Instant(index, True, static.total + alive + 2 * gradient, alive))
        instants.append(Instant(index, False, static.total + alive + gradient, alive))
        booked.append(Booked(activations[index], index, index, len(instants)))
        booked.append(Booked(gradient, index, index, len(instants)))
        sites[index] = replace(sites[index], close_live_bytes=static.total + alive + gradient)
    gradients = sum(site.gradient_bytes for site in sites)
    return Trace(
        sites=tuple(sites),
        instants=tuple(instants),
        booked=tuple(booked),
        cross_terms=(),
        static=static,
        step_bytes=static.total + 2 * gradients,
        nonprivate_peak_bytes=static.total + total + total // 20,
        batch_size=BATCH,
        settings={"model": "synthetic-vit", "norm_method": "mixed", "checkpoint": "none"},
    )


def _site(name: str, block: str, inputs: int, outputs: int) -> Site:
    norm = "norm" in name
    count = 2 * outputs if norm else max(inputs, POSITIONS * (inputs == 0)) * outputs + (outputs if inputs else 0)
    return Site(
        name=name,
        layer=name,
        block=block,
        kind="norm" if norm else "parameter" if name == "position" else "linear",
        method="direct" if norm else "ghost",
        positions=1 if name == "head" else POSITIONS,
        inputs=0 if name == "position" else inputs if name != "head" else WIDTH,
        outputs=outputs,
        parameters=(f"{name}.weight", f"{name}.bias"),
        parameter_count=count,
        close_bytes=8 * count,
        gradient_bytes=4 * count,
    )


def peak(trace: Trace, boundaries: tuple[int, ...]) -> Any:
    return peak_memory(trace, boundaries)


def header(trace: Trace, name: str = "synthetic-vit") -> dict[str, Any]:
    return {
        "model": {"name": name, "batch_size": BATCH, "parameters": sum(s.parameter_count for s in trace.sites)},
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "platform": "Linux-6.1-x86_64",
            "cpu_count": 2,
            "device": "cpu",
            "packages": {"torch": "2.13.0", "optuna": "5.0.0"},
        },
        "settings": {"seed": 0, "optimizer": "adam", "norm_method": "mixed", "checkpoint": "none"},
    }


def profile_document(name: str = "synthetic-vit") -> dict[str, Any]:
    trace = transformer_trace()
    layer_wise = peak(trace, STYLES["layer-wise"])
    front = [{"groups": 1, "boundaries": [], "peak_bytes": peak(trace, ()).peak_bytes}]
    for key in ("2", "3", "4", "7"):
        cuts = STYLES[key]
        front.append({"groups": len(cuts) + 1, "boundaries": list(cuts), "peak_bytes": peak(trace, cuts).peak_bytes})
    estimates, observed = [], {"simulations": [], "measurements": []}
    for style, cuts in STYLES.items():
        estimate = peak(trace, cuts)
        row = {
            "grouping": style if "-" in style else f"best:{style}",
            "boundaries": list(cuts),
            "groups": len(cuts) + 1,
        }
        breakdown = {key.removesuffix("_bytes"): value for key, value in asdict(estimate.breakdown).items()}
        estimates.append(
            {**row, "peak_bytes": estimate.peak_bytes, "breakdown": breakdown, "site": estimate.site, "where": "close"}
        )
        for level, factor in (
            ("simulations", 1.0 + 0.001 * len(cuts) ** 0.5),
            ("measurements", 1.003 - 0.0008 * len(cuts) ** 0.5),
        ):
            seen = round(estimate.peak_bytes * factor)
            row_of_level = {**row, "peak_bytes": seen, "relative_error": estimate.peak_bytes / seen - 1}
            observed[level].append({**row_of_level, "step_seconds": 0.0421 + 0.0003 * len(cuts)})
    return new_document(
        "profile",
        **header(trace, name),
        trace=trace.to_json(),
        nonprivate_peak_bytes=trace.nonprivate_peak_bytes,
        floor_bytes=min(layer_wise.peak_bytes, *(row["peak_bytes"] for row in front)),
        front=front,
        estimates=estimates,
        **observed,
        summary="",
    )


def fit_document(name: str = "synthetic-vit") -> dict[str, Any]:
    """A profile that also tells what fits: measured at the size itself, at smaller ones, and nowhere; and one at 0."""
    sizes = {"non-private": 64, "best": 60, "all-layer": 40, "layer-wise": 60, "best:2": 1, "uniform:4": 0}
    rows = [
        {
            "grouping": text,
            "boundaries": None if text == "non-private" else [],
            "groups": None if text == "non-private" else 4,
            "size": size,
            "batch_size": size,
            "expected_batch_size": None if text == "non-private" else size // 2,
            "pieces": None,
            "peak_bytes": 1000 * size or None,
            "next_peak_bytes": 1000 * (size + 1),
            "limited_by": "limit" if text == "non-private" else "memory",
        }
        for text, size in sizes.items()
    ]
    rows[1]["timings"] = [_timing(15), _timing(30)]
    rows[1]["examples_per_second"] = {"value": 1234.5, "batch_size": 60, "source": "predicted"}
    rows[4]["timings"] = [_timing(1)]
    rows[4]["examples_per_second"] = {"value": 10.0, "batch_size": 1, "source": "measured"}
    fit = {
        "memory_bytes": 2**16,
        "margin": 0.005,
        "usable_bytes": 65208,
        "varies": "batch_size",
        "limit": 64,
        "poisson": {
            "quantile": 0.999,
            "dataset_size": None,
            "sampling_rate": None,
            "rule": "An expected batch is the largest that fits whole.",
        },
        "rows": rows,
        "summary": "Non-private training fits a batch of at least 64.",
    }
    return {**profile_document(name), "fit": fit, "summary": "Grouping saves much here."}


def _timing(batch_size: int) -> dict[str, Any]:
    seconds = 0.1 * batch_size
    return {"batch_size": batch_size, "peak_bytes": 1000 * batch_size, "step_seconds": seconds, "metric": "allocated"}


def joint_document(name: str = "synthetic-vit") -> dict[str, Any]:
    """A profile whose norm methods were chosen with the grouping, measured on a GPU."""
    document = profile_document(name)
    compared = [
        {"norm_method": method, "all_layer_bytes": 2**20 * k, "floor_bytes": 2**19 * k, "operations": 10**6 * k}
        for k, method in enumerate(("mixed", "ghost", "instantiate", "recompute", "joint"), 1)
    ]
    document["joint"] = {
        "budget_bytes": 2**24,
        "boundaries": list(STYLES["3"]),
        "groups": 3,
        "peak_bytes": peak(transformer_trace(), STYLES["3"]).peak_bytes,
        "operations": 500_000,
        "bound": {"of": "operations", "least": 500_000, "gap": 0.0},
        "weights": {"ghost": 5, "instantiate": 13},
        "compared": compared,
    }
    for row in document["measurements"]:
        row["reserved_bytes"] = 2 * row["peak_bytes"]
    return document


def search_document(name: str = "synthetic-vit") -> dict[str, Any]:
    trace = transformer_trace()
    means = {"all-layer": 0.935, "4": 0.931, "2": 0.934, "3": 0.9325, "7": 0.927, "layer-wise": 0.917}
    sources = {"all-layer": "all-layer", "layer-wise": "layer-wise"}
    candidates = [_candidate(trace, STYLES[key], mean, sources.get(key, "exact front")) for key, mean in means.items()]
    for number in range(2, 26, 2):
        cuts = tuple(sorted({number, 27 - number // 3, 15 + number // 3}))
        candidates.append(_candidate(trace, cuts, 0.915 + 0.012 * math.sin(number) ** 2, "search"))
    for row in candidates:
        row["on_front"] = not any(_dominates(other, row) for other in candidates)
    candidates.append({**_candidate(trace, (1, 2), 0.0, "search"), "metric": None})
    return new_document(
        "search",
        **header(trace, name),
        trace=trace.to_json(),
        candidates=candidates,
        recommended=candidates[1],
        cost={
            "seconds": 421.7,
            "trials": 31,
            "trained": 22,
            "steps": 6600,
            "epsilon": 8.0,
            "full_trainings": 24.5,
        },
        training={
            "epsilon": 8.0,
            "delta": 1e-5,
            "noise_multiplier": 1.03,
            "sampling_rate": 0.2,
            "steps": 150,
            "learning_rate": 3e-3,
            "optimizer": "adam",
            "curves": [_curve(STYLES[key], means[key], seed) for key in means for seed in range(3)],
        },
    )


def _candidate(trace: Trace, cuts: tuple[int, ...], mean: float, source: str) -> dict[str, Any]:
    seeds = 3 if source != "search" else 1
    metric = {
        "name": "accuracy",
        "mean": mean,
        "half_width": 0.003 if seeds > 1 else None,
        "seeds": seeds,
        "values": [mean] * seeds,
    }
    return {
        "boundaries": list(cuts),
        "groups": len(cuts) + 1,
        "peak_bytes": peak(trace, cuts).peak_bytes,
        "metric": metric,
        "on_front": False,
        "source": source,
        "step_seconds": 0.043,
    }


def _dominates(other: dict[str, Any], row: dict[str, Any]) -> bool:
    better = (other["metric"]["mean"] - row["metric"]["mean"], row["peak_bytes"] - other["peak_bytes"])
    return min(better) >= 0 and max(better) > 0


def _curve(cuts: tuple[int, ...], mean: float, seed: int) -> dict[str, Any]:
    points = [[step, mean * (1 - math.exp(-(step + 4 * seed) / 40))] for step in range(10, 151, 10)]
    return {"boundaries": list(cuts), "seed": seed, "points": points}


def verify_document(name: str = "synthetic-vit") -> dict[str, Any]:
    profile = profile_document(name)
    rows = [
        {**row, "tolerance": 0.005, "within": abs(row["relative_error"]) <= 0.005} for row in profile["measurements"]
    ]
    return new_document("verify", profile["model"], profile["environment"], profile["settings"], rows=rows)


def train_document(name: str = "synthetic-vit") -> dict[str, Any]:
    trace = transformer_trace()
    curve = [[step, 2.3 * math.exp(-step / 60), 0.93 * (1 - math.exp(-step / 40))] for step in range(10, 151, 10)]
    return new_document(
        "train",
        **header(trace, name),
        trace=trace.to_json(),
        grouping="best:4",
        boundaries=list(STYLES["4"]),
        groups=4,
        curve=curve,
        epsilon=8.0,
        delta=1e-5,
        metric={"name": "accuracy", "mean": curve[-1][2]},
    )


def study_document(name: str = "clip21") -> dict[str, Any]:
    """Two methods that stall and fall, with and without noise; one diverges at the largest threshold."""
    records, thresholds = [0, 1, 2, 5, 10, 20, 50, 100], [0.01, 0.1, 1.0]
    falls = {"clip-gd": 0.0, "clip21-gd": -1.0, "dp-sgd": -0.1, "dp-clip21-sgd2m": -0.5}
    cells, curves = [], []
    for problem in ("logistic, digits", "network, digits"):
        for workers in (10, 20):
            for method, slope in falls.items():
                epsilon = 8.0 if method.startswith("dp") else None
                end = 100.0**slope
                inactive = [None, 40, 0] if method.startswith("clip21") else [None, None, None]
                squared = [2 * end, end, None if workers == 20 else end / 2]
                cells.append([problem, workers, method, epsilon, "tuned", squared, inactive, 0.5, slope, 0.01])
                if workers == 10:
                    fell = [max(1, k) ** slope for k in records]
                    curve = {"problem": problem, "workers": workers, "method": method, "epsilon": epsilon}
                    curves.append({**curve, "squared": fell})
    guarantee = {"workers": 10, "epsilon": 8.0, "delta": 1e-3, "noise_multiplier": 3.0, "of_weights": 8.0}
    return new_document(
        "study",
        {"name": name, "batch_size": 4, "parameters": 650},
        environment(),
        {"quick": False, "steps": 100, "seed": 0, "batch": 4},
        records=records,
        thresholds=thresholds,
        cells=cells,
        curves=curves,
        guarantees=[{**guarantee, "of_messages": 40.0}],
        randomness={"secret": False, "secure": False, "seed": 0},
    )
