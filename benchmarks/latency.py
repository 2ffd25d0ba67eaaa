"""Does the speed-up arrive? Measured time of cut models against the multiply-accumulates they saved.

    python benchmarks/latency.py              # two minutes

Time does not depend on which weights are kept, so units are picked by magnitude and no images are needed. Dense and cut
models run in turn. Writes its section of docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import secateur as sc
from _real import MODELS, markdown, setting, write_section
from secateur.measurement import latency

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
CUTS = (
    ("uniform", ("hidden",), 0.65),
    ("uniform", ("hidden", "heads"), 0.75),
    ("uniform", ("hidden", "heads"), 0.5),
    ("global", ("hidden", "heads"), 0.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, action="append", help="default: 8 and 1")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for name, load in MODELS.items():
        model = load()
        scores = sc.score(None, "magnitude", model=model, anatomy=sc.inspect(model))
        for allocator, kinds, share in CUTS:
            plan = sc.allocate(scores, sc.Budget(macs=share), allocator, kinds=kinds)
            small = sc.prune(model, plan, compensate="none")
            ratio = sc.macs(model) / sc.macs(small)
            for batch in options.batch_size or (8, 1):
                timing = latency({"dense": model, "cut": small}, batch, rounds=options.rounds)
                speed_up = timing["dense"].median_ms / timing["cut"].median_ms
                cells = [timing["dense"].median_ms, timing["cut"].median_ms, ratio, speed_up, speed_up / ratio]
                kinds_text = "MLP, heads" if "heads" in kinds else "MLP"
                rows.append([name, f"`{allocator}`, {kinds_text}, {share:.0%}", str(batch)])
                rows[-1] += [f"{cells[0]:.0f}", f"{cells[1]:.0f}", *(f"{c:.2f}" for c in cells[2:])]
                print(rows[-1], flush=True)
    columns = [
        "model",
        "cut, MACs kept",
        "batch",
        "dense ms",
        "cut ms",
        "MAC ratio",
        "speed-up",
        "speed-up / MAC ratio",
    ]
    write_section(PAGE, "latency", f"{markdown(columns, rows)}\n\n{setting()} Median of {options.rounds} runs in turn.")


if __name__ == "__main__":
    main()
