"""Perplexity after a cut in a rotated basis: SliceGPT's residual width and MoDeGPT's three kinds of modules.

    python benchmarks/decompose.py --data DATA

DATA holds text/wikitext2-{valid,test}.txt: the former to calibrate on, the latter to measure. Every row has a fifth
fewer parameters than the dense model, the matrix between its last norm and its tied head counted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import secateur as sc
from _real import markdown, setting, smollm2, wikitext, write_section

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
FEWER = 0.2


@dataclass(frozen=True)
class Row:
    """One way to cut.

    Attributes:
        method: as the table calls it.
        rotated: kinds that the model is rotated for.
        kinds: what is cut.
        criterion, allocator, compensator: names from the registries.
    """

    method: str
    rotated: tuple[str, ...]
    kinds: tuple[str, ...]
    criterion: str
    allocator: str
    compensator: str


HEADS = ("vo_dim", "qk_dim")
ROWS = (
    Row("MoDeGPT", HEADS, ("hidden", *HEADS), "modegpt", "modegpt", "ridge"),
    Row("MoDeGPT, the same share everywhere", HEADS, ("hidden", *HEADS), "modegpt", "uniform", "ridge"),
    Row("MoDeGPT, type I only", HEADS, ("hidden",), "modegpt", "uniform", "ridge"),
    Row("SliceGPT, one rotation", ("residual",), ("residual",), "order", "uniform", "none"),
    Row("SliceGPT, one rotation, readers refit", ("residual",), ("residual",), "order", "uniform", "ridge"),
)


class Bench:
    """The dense model and its rotations, each calibrated once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = smollm2()
        self.calibration, self.test = wikitext(self.model, options.data, options.windows, options.seed)
        self.seed = options.seed
        plain = {"loss": (), "covariance": False, "seed": self.seed}
        self.moments = sc.calibrate(self.model, self.calibration, moments=("residual", *HEADS), **plain)
        self.turned: dict[tuple[str, ...], tuple[nn.Module, sc.Statistics]] = {}

    def rotated(self, kinds: tuple[str, ...]) -> tuple[nn.Module, sc.Statistics]:
        if kinds not in self.turned:
            model = sc.rotate(self.model, self.moments, kinds)
            self.turned = {kinds: (model, sc.calibrate(model, self.calibration, loss=(), seed=self.seed))}
        return self.turned[kinds]

    def measure(self, row: Row) -> list[str]:
        start = time.perf_counter()
        model, statistics = self.rotated(row.rotated)
        scores = sc.score(statistics, row.criterion)
        share = (1 - FEWER) * sc.parameters(self.model) / sc.parameters(model)
        plan = sc.allocate(scores, share, row.allocator, kinds=row.kinds)
        small = sc.prune(model, plan, stats=statistics, compensate=row.compensator)
        seconds = time.perf_counter() - start
        found = sc.perplexity(small, self.test).token
        cells = [row.method, f"{sc.parameters(small) / 1e6:.1f} M", f"{sc.macs(small) / sc.macs(self.model):.1%}"]
        cells += [f"{found:.2f}", f"{seconds:.0f} s"]
        print(cells, flush=True)
        return cells

    def dense(self) -> list[str]:
        found = sc.perplexity(self.model, self.test).token
        return ["dense", f"{sc.parameters(self.model) / 1e6:.1f} M", "100.0%", f"{found:.2f}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/wikitext2-{valid,test}.txt")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, for calibration and for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bench = Bench(options)
    rows = [bench.dense(), *map(bench.measure, ROWS)]
    table = markdown(["method", "parameters", "MACs", "perplexity", "time to cut"], rows)
    where = f"{options.windows} windows of 256 tokens, seed {options.seed}."
    write_section(PAGE, "decompose", f"{table}\n\n{setting()} {where}")


if __name__ == "__main__":
    main()
