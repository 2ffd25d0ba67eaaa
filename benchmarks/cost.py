"""What the whole job costs: time against one plain forward and backward pass, memory against what it must hold.

    python benchmarks/cost.py --data PHOTOGRAPHS         # a quarter of an hour on two cores

Each measurement runs in a process of its own, so that peaks do not mix. Writes its section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from _real import arguments, dinov2, environment, markdown, photographs, write_section
from secateur.allocation.amp_bisect import Search
from secateur.allocation.base import Problem
from secateur.calibration.losses import LossInput, losses
from secateur.models import features

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
SEARCHED = 32


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass, nothing collected."""
    model = dinov2()
    data = _data(model, options)
    loss = losses.get("entropy")
    start = time.perf_counter()
    for batch in data:
        loss(LossInput(features(model, batch))).backward()
        model.zero_grad(set_to_none=True)
    return {"seconds": time.perf_counter() - start}


def job(allocator: str, compensator: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Calibrate, score, allocate, cut."""

    def measured(options: argparse.Namespace) -> dict[str, Any]:
        model = dinov2()
        data = _data(model, options)
        start = time.perf_counter()
        anatomy = sc.inspect(model)
        statistics = sc.calibrate(model, data, anatomy)
        scores = sc.score(statistics, "obs")
        plan = sc.allocate(scores, 0.75, allocator)
        small = sc.prune(model, plan, compensate=compensator, stats=statistics, data=data)
        seconds = time.perf_counter() - start
        held = sum(t.numel() * t.element_size() for s in statistics.layers.values() for t in vars(s).values())
        return {"seconds": seconds, "params": sc.parameters(small), "sums": held}

    return measured


def search(cached: bool) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """AMP's search at one tolerance, with and without the prefix kept."""

    def measured(options: argparse.Namespace) -> dict[str, Any]:
        model = dinov2()
        anatomy = sc.inspect(model)
        names = photographs(options.data, options.seed, options.calibration)[0][:SEARCHED]
        data = sc.batches(names, sc.source_of(model).image, size=SEARCHED)
        scores = sc.score(sc.calibrate(model, data, anatomy, loss="entropy", covariance=False), "amp")
        scores.values = {n: v for n, v in scores.values.items() if anatomy.groups[n].kind == "hidden"}
        problem = Problem(scores, anatomy, "params", float("inf"), model=model, data=data)
        found = Search.of(problem, cached=cached)
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            widths = found.run(problem, 5e-3, 6)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "macs": counter.get_total_flops() // 2, "widths": list(widths.values())}

    return measured


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "plain": plain,
    "uniform, affine": job("uniform", "affine"),
    "uniform, sequential": job("uniform", "sequential"),
    "curve, sequential": job("curve", "sequential"),
    "search, naive": search(cached=False),
    "search, cached": search(cached=True),
}


def _data(model: nn.Module, options: argparse.Namespace) -> sc.Batches:
    names = photographs(options.data, options.seed, options.calibration)[0]
    return sc.batches(names, sc.source_of(model).image, seed=options.seed)


def _apart(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """A stage in a process of its own."""
    command = [sys.executable, __file__, "--data", str(options.data), "--seed", str(options.seed)]
    command += ["--calibration", str(options.calibration), "--stage", stage]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(stage, found, flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        found = STAGES[options.stage](options)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return
    found = {stage: _apart(stage, options) for stage in STAGES}
    base, rows = found["plain"], []
    for stage, values in found.items():
        if "search" not in stage:
            more = (values["peak"] - base["peak"]) / 2**20
            sums = f"{values['sums'] / 2**20:.0f}" if "sums" in values else ""
            times = values["seconds"] / base["seconds"]
            name = "one forward and backward pass" if stage == "plain" else f"whole job: {stage}"
            rows.append([name, f"{values['seconds']:.0f}", f"{times:.2f}", f"{more:+.0f}", sums])
    columns = ["", "seconds", "of one pass", "peak memory beyond that pass, MiB", "of these, sums kept, MiB"]
    naive, cached = found["search, naive"], found["search, cached"]
    text = (
        f"{markdown(columns, rows)}\n\n`amp-bisect` on {SEARCHED} images: {cached['macs'] / naive['macs']:.0%} of "
        f"the naive search's multiply-accumulates, {cached['seconds'] / naive['seconds']:.0%} of its time, "
        f"{'the same' if cached['widths'] == naive['widths'] else 'OTHER'} widths.\n\n{environment(options)}"
    )
    write_section(PAGE, "cost", text)


if __name__ == "__main__":
    main()
