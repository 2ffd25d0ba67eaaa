"""Depth pruning of SmolLM2-135M: 20 % fewer parameters by removing whole blocks, or replacing a run of them.

Perplexity per token on the first 64 windows of 256 tokens of WikiText-2 test; calibrated on windows of its validation
part. Writes a table into docs/results.md.

    python benchmarks/depth.py --data FOLDER        (with text/wikitext2-valid.txt and text/wikitext2-test.txt)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

import secateur as sc
from _real import markdown, setting, smollm2, write_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
KEEP, STACK = 0.8, "model.layers:blocks"
COLUMNS = ["blocks by", "gone", "fewer parameters", "fewer MACs", "perplexity", "time to make"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/wikitext2-{valid,test}.txt")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=64, help="windows that perplexity is measured on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dense = smollm2()
    spec = sc.source_of(dense).input
    valid = sc.batches(options.data / "text/wikitext2-valid.txt", spec, limit=options.calibration, seed=options.seed)
    test = sc.batches(options.data / "text/wikitext2-test.txt", spec).pick(range(options.windows))
    anatomy = sc.inspect(dense)
    statistics = sc.calibrate(dense, valid, anatomy, loss=(), covariance=False)
    rows: list[list[str]] = []
    note = f"{options.calibration} calibration and {options.windows} test windows of 256 tokens, seed {options.seed}."

    def measure(name: str, blocks: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        model = make()
        seconds, fewer = time.perf_counter() - start, 1 - sc.parameters(model) / sc.parameters(dense)
        macs = 1 - sc.macs(model) / sc.macs(dense)
        found = sc.perplexity(model, test).token
        rows.append([name, blocks, f"{fewer:.1%}", f"{macs:.1%}", f"{found:.1f}", f"{seconds:.0f} s"])
        print(*rows[-1], sep=" | ", flush=True)
        write_section(PAGE, "depth", f"{markdown(COLUMNS, rows)}\n\n{setting()} {note}")

    measure("dense", "", lambda: dense)
    plans = {}
    for criterion, allocator in (("block-influence", "uniform"), ("angular", "contiguous")):
        name = f"`{criterion}`, `{allocator}`"
        plan = plans[name] = sc.allocate(sc.score(statistics, criterion), KEEP, allocator)
        measure(name, numbers(plan), lambda p=plan: sc.prune(dense, p, compensate="none", anatomy=anatomy))

    def shortened(plan: sc.Plan, how: str) -> nn.Module:
        """Every run that a plan removes replaced, the last first so that numbers hold."""
        model = dense
        for start, stop in reversed(runs(gone(plan))):
            model = sc.shorten(model, start, stop, valid, how=how, anatomy=anatomy if model is dense else None)
        return model

    for how in ("linear", "mlp"):
        for name, plan in plans.items():
            measure(f"{name}, runs replaced, `{how}`", numbers(plan), lambda p=plan, h=how: shortened(p, h))
    sequential = {"compensate": "sequential", "stats": statistics, "data": valid}
    for name, plan in plans.items():
        measure(f"{name}, refit `sequential`", numbers(plan), lambda p=plan: sc.prune(dense, p, **sequential))


def gone(plan: sc.Plan) -> list[int]:
    """Indices of the blocks that a plan removes."""
    return sorted(set(range(plan.groups[STACK].size)) - set(plan.groups[STACK].keep))


def runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Stretches of neighbours, as slices."""
    starts = [i for i in blocks if i - 1 not in blocks]
    return [(i, next(j for j in range(i, blocks[-1] + 2) if j not in blocks)) for i in starts]


def numbers(plan: sc.Plan) -> str:
    return ", ".join(map(str, gone(plan)))


if __name__ == "__main__":
    main()
