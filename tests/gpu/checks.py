"""Whether the engine is right on a device: sums, noise, bytes; what can be right or wrong without a figure.

Run with ``python -m tests.gpu.checks OUTPUT [--device DEVICE] [--seconds N]``; a line is written after every check, and
what passed is not run again. No pytest: a bare machine has torch, and options of this project's are none of its own.
A check that needs what the machine lacks, or another kind of device, is told as skipped.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.arithmetic import ieee
from groupsearch.engine.entries import matrix_sqnorm
from groupsearch.measure import simulate_peak
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.tracer.allocator import CUDA_GRANULARITY_BYTES, Allocator, workspace_bytes
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.step import StepSettings, real_stage
from groupsearch.workloads import load_workload
from tests.gpu.lines import Lines
from tests.support.cases import EVERY_CASE, Case, plain
from tests.support.reference import clipped_sums

CASES = (
    *("linear-3d", "conv2d-groups", "conv2d-circular", "embedding-padding", "layernorm", "groupnorm", "class-token"),
    *("reused-linear-3d", "tied-embedding-head", "attention", "bilinear", "checkpoint-reentrant"),
    *("checkpoint-non-reentrant", "gpt2", "vit", "t5"),
)
TOLERANCE = 1.5e-2


class Skipped(Exception):
    """A check that cannot be made here."""


def needs_cuda(device: str) -> None:
    """Raises where the device is none of CUDA's."""
    if torch.device(device).type != "cuda":
        raise Skipped("it is of a CUDA device")


def plans(case: Case) -> list[ClipPlan]:
    """All-layer and a random grouping, with a threshold that clips some examples and not others."""
    sites = observe_sites(case.model(), case.batch(), case.loss)
    spans = [[i for i, site in enumerate(sites) if name in site.parameters] for name in case.whole]
    cuts = [b for b in range(1, len(sites)) if not any(span[0] < b <= span[-1] for span in spans)]
    drawn = random.Random(case.seed).sample(cuts, len(cuts) // 2)
    return [ClipPlan(Grouping(tuple(sorted(chosen)), sites), max_grad_norm=0.5) for chosen in ([], drawn)]


def attach(
    case: Case, plan: ClipPlan, options: EngineOptions, device: str, seed: int = 0
) -> tuple[PrivateEngine, torch.nn.Module, torch.optim.Optimizer]:
    """A model of the case on the device with an engine and an optimizer, and one backward pass done."""
    model = case.model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=2.0,
        expected_batch_size=4,
        options=options,
        generator=torch.Generator(device).manual_seed(seed),
    )
    case.loss(model, {key: tensor.to(device) for key, tensor in case.batch().items()}).mean().backward()
    return engine, model, optimizer


def sums(name: str, method: str, device: str) -> str:
    """Clipped sums in float64 on the device equal the reference on the CPU."""
    case, worst = EVERY_CASE[name], 0.0
    tolerance = max(1e-8, case.tolerance[torch.float64])
    for plan in plans(case):
        engine, *_ = attach(case, plan, EngineOptions(method), device)
        expected = clipped_sums(plain(case.model()), case.batch(), case.loss, plan)
        for parameter, found in engine.clipped_sums().items():
            assert found.device.type == torch.device(device).type
            scale = float(expected[parameter].abs().max())
            torch.testing.assert_close(
                found.cpu(), expected[parameter], rtol=tolerance, atol=tolerance * max(scale, 1.0), msg=parameter
            )
            worst = max(worst, float((found.cpu() - expected[parameter]).abs().max()) / max(scale, 1.0))
    return f"largest difference {worst:.0e}"


def noise_from_the_generator(device: str) -> str:
    """Noise is drawn on the device, from the generator given."""
    case = EVERY_CASE["linear-3d-long"]
    plan, noise = plans(case)[0], []
    for seed in (1, 1, 2):
        engine, model, optimizer = attach(case, plan, EngineOptions(), device, seed)
        sums = {key: value.clone() for key, value in engine.clipped_sums().items()}
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        optimizer.step()
        moved = {key: (before[key] - value.detach()) * 4 - sums[key] for key, value in model.named_parameters()}
        noise.append(torch.cat([value.flatten() for value in moved.values()]))
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=0)
    assert not torch.allclose(noise[0], noise[2])
    return f"{len(noise[0])} numbers"


def noise_deviation(device: str) -> str:
    """Noise has the standard deviation of the plan."""
    case = Case("wide", lambda: torch.nn.Linear(300, 300), (300,))
    model = case.model().to(device)
    plan = ClipPlan(Grouping((), observe_sites(case.model(), case.batch(), case.loss)), max_grad_norm=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make_private(model, optimizer, plan, noise_multiplier=3.0, expected_batch_size=2)
    before = model.weight.detach().clone()
    optimizer.step()  # an empty batch: noise alone
    found, expected = float((before - model.weight.detach()).std()), 3.0 * plan.sensitivity / 2
    assert abs(found / expected - 1) < 0.02
    return f"{found:.4f}, expected {expected:.4f}"


def precision(device: str) -> str:
    """Norms are long enough, and at most 1 % long, whatever matrix units are allowed; what they are allowed is kept."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(4, 1, 512, n, generator=generator) for n in (768, 640))
    true = torch.linalg.vector_norm((g.double().mT @ a.double()).flatten(1), dim=1)
    before, ratios = torch.backends.cuda.matmul.fp32_precision, []
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, y = a.to(dtype), g.to(dtype)
            exact = torch.linalg.vector_norm((y.double().mT @ x.double()).flatten(1), dim=1)
            found = matrix_sqnorm(x.to(device), y.to(device), bias=False).double().sqrt().cpu()
            ratios += [float((found / exact).min()), float((found / exact).max())]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        fast = (g.to(device).mT @ a.to(device)).double().cpu()
        with ieee():
            slow = (g.to(device).mT @ a.to(device)).double().cpu()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert min(ratios) >= 1
    assert max(ratios) <= 1.01
    apart = [float(torch.linalg.vector_norm((x.flatten(1)), dim=1).sub(true).abs().max()) for x in (fast, slow)]
    return f"norms 1 to {max(ratios):.6f} long; products of the user {apart[0]:.1e} off, of the engine {apart[1]:.1e}"


def storages(device: str) -> str:
    """Storages are rounded as the caching allocator does."""
    needs_cuda(device)
    live = LiveBytes(allocator=Allocator.of(torch.device(device)))
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    with live:
        kept = [torch.empty(size, dtype=torch.uint8, device=device) for size in (1, 511, 513, 100_000)]
        elsewhere = torch.empty(1000)
        assert live.live_bytes == torch.cuda.memory_allocated() - before
    assert len(kept) == 4
    assert live.number(elsewhere) is None
    return f"{live.live_bytes} bytes"


def inside_an_operation(device: str) -> str:
    """What a sort asks for besides its results is seen."""
    needs_cuda(device)
    live = LiveBytes(allocator=Allocator.of(torch.device(device)))
    numbers = torch.randn(100_000, device=device)
    live.ignore([numbers])
    with live:
        numbers.sort()
    assert max(live.log) > sum(live.sizes)
    return f"{max(live.log)} bytes, results {sum(live.sizes)}"


def static_bytes(device: str) -> str:
    """Static bytes are what is held between steps."""
    needs_cuda(device)
    case, place = EVERY_CASE["linear-3d"], torch.device(device)
    workspaces = workspace_bytes(place)
    assert workspace_bytes.__wrapped__(place) == workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    stage = real_stage(case.model(torch.float32), case.batch(torch.float32), case.loss, StepSettings(), place)
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    assert stage.static.workspaces == workspaces
    assert held == stage.static.total - workspaces
    return f"{held} bytes held, workspaces {workspaces}"


def trace_and_engine(device: str) -> str:
    """A trace on the device agrees with the engine simulated there."""
    case, errors = EVERY_CASE["gpt2"], []
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    trace = trace_model(model, batch, case.loss, device=device)
    if torch.device(device).type == "cuda":
        assert trace.settings["granularity_bytes"] == CUDA_GRANULARITY_BYTES
        assert {instant.live_bytes % CUDA_GRANULARITY_BYTES for instant in trace.instants} == {0}
    for grouping in (Grouping.all_layer(trace), Grouping.layer_wise(trace)):
        simulated = simulate_peak(model, batch, case.loss, grouping, device=device)
        errors.append(peak_memory(trace, grouping).peak_bytes / simulated - 1)
    assert max(map(abs, errors)) < TOLERANCE, errors
    return ", ".join(f"{error:+.3%}" for error in errors)


def training(checkpoint: str, device: str) -> str:
    """One step of training runs on the device."""
    from groupsearch.training import TrainSettings, train  # needs dp-accounting

    workload = load_workload("digits-vit", blocks=2)
    sites = observe_sites(workload.model, workload.make_batch(4), workload.loss)
    settings = TrainSettings.of(workload, steps=1, noise_multiplier=1.0, device=device, checkpoint=checkpoint)
    result = train(workload, Grouping((len(sites) // 2,), sites), settings)
    assert result.steps == 1
    assert result.epsilon < float("inf")
    return f"{result.step_seconds:.2f} s, epsilon {result.epsilon:.2f}"


CHECKS: dict[str, Callable[..., str]] = {
    "noise from the generator": noise_from_the_generator,
    "deviation of noise": noise_deviation,
    "precision of products": precision,
    "storages": storages,
    "inside an operation": inside_an_operation,
    "static bytes": static_bytes,
    "trace and engine": trace_and_engine,
    **{f"sums of {name}": partial(sums, name, "mixed") for name in CASES},
    **{f"one step of training, checkpoint {c}": partial(training, c) for c in ("none", "blocks")},
    **{f"sums of {n}, {m}": partial(sums, n, m) for m in NORM_METHODS if m != "mixed" for n in CASES},
}
"""In the order of what is worth most."""


def outcome_of(check: Callable[..., str], device: str) -> dict[str, str]:
    """``passed`` with a figure, ``skipped`` with a reason, or ``failed`` with the end of the traceback."""
    try:
        return {"passed": check(device=device)}
    except (Skipped, ImportError) as reason:
        return {"skipped": str(reason)}
    except Exception:
        return {"failed": "".join(traceback.format_exc().splitlines(keepends=True)[-12:])}


def main(arguments: Sequence[str]) -> int:
    """Run what has not passed; 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.checks", description=__doc__)
    parser.add_argument("output", type=Path, help="one line a check; what passed is not run again")
    parser.add_argument("--device", default="cuda", help="a torch device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no check begins after that")
    parser.add_argument("--only", nargs="+", default=[""], help="checks whose names begin so")
    options = parser.parse_args(arguments)
    lines, begin = Lines(options.output, ("check",), options.device), time.monotonic()
    failed = 0
    for name, check in CHECKS.items():
        if not name.startswith(tuple(options.only)) or lines.has(check=name):
            continue
        if time.monotonic() - begin > options.seconds:
            print("The time is over; run it again for the rest.")
            break
        start = time.monotonic()
        outcome = outcome_of(check, options.device)
        lines.add({"check": name, **outcome, "seconds": round(time.monotonic() - start, 2)})
        (word, said), *_ = outcome.items()
        print(f"{word:<8}{name}: {said}", flush=True)
        failed += word == "failed"
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
