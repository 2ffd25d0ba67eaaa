"""Perplexity of a language model after the cut, without training: every criterion, allocation and refit.

    python benchmarks/language.py --data FOLDER                    # the main table, about half an hour on two cores
    python benchmarks/language.py --data FOLDER --only criteria    # all of them, sliced and refit
    python benchmarks/language.py --data FOLDER --only everything  # all combinations: many hours; resumable

SmolLM2-135M, calibrated on 64 windows of 256 tokens of WikiText-2's validation text, evaluated on as many of its test
text. Finished rows are kept in benchmarks/results/. Writes its sections of docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import secateur as sc
from _real import SMOLLM2, markdown, setting, smollm2, wikitext, write_section

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
LOSSES = ("features", "logits-entropy", "cross-entropy", "kl")
WEIGHED = ("cross-entropy", "kl")
CRITERIA = (
    "obs",
    "leverage",
    "variance",
    "flap",
    "wanda",
    "taylor",
    "hfprune",
    "sdmprune",
    "llm-pruner",
    "amp-llm",
    "cfsp",
    "magnitude",
    "random",
)
OPTIONS: dict[str, dict[str, str]] = {"taylor": {"loss": "cross-entropy", "aggregation": "token"}}


@dataclass(frozen=True)
class Row:
    """One cut: so much of every MLP's neurons (or as many parameters elsewhere)."""

    criterion: str
    allocator: str = "uniform"
    compensator: str = "none"
    cut: float = 0.3
    kinds: tuple[str, ...] = ("hidden",)

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


REFITS, ALLOCATORS, CUTS = ("none", "mean", "ridge", "affine"), ("uniform", "global", "curve"), (0.1, 0.2, 0.3, 0.5)
MAIN = [
    Row("hfprune"),
    Row("taylor"),
    Row("hfprune", compensator="affine"),
    *(Row("obs", a, x) for a, x in itertools.product(("uniform", "curve"), ("affine", "sequential"))),
]
EVERY_CRITERION = [Row(c, compensator=x) for c in CRITERIA for x in ("none", "affine")]
EVERYTHING = [Row(c, a, x, p) for p, c, a, x in itertools.product(CUTS, CRITERIA, ALLOCATORS, REFITS)]
SECTIONS = {"main": MAIN, "criteria": EVERY_CRITERION, "everything": EVERYTHING}


class Bench:
    """The model, its statistics, and the rows measured on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = smollm2()
        self.anatomy = sc.inspect(self.model)
        self.seed = options.seed
        self.calibration, self.test = wikitext(self.model, options.data, options.windows, options.seed)
        self.file = RESULTS / f"language-{options.windows}-{options.seed}.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.scores: dict[str, sc.Scores] = {}
        self.statistics = self._statistics()

    def _statistics(self) -> sc.Statistics:
        file = self.file.with_suffix(".safetensors")
        if file.is_file():
            found = sc.Statistics.load(file)
            found.model, found.anatomy = self.model, self.anatomy
            return found
        options = {"loss": LOSSES, "weights": WEIGHED, "projected": True, "seed": self.seed}
        found = sc.calibrate(self.model, self.calibration, self.anatomy, **options)
        RESULTS.mkdir(exist_ok=True)
        found.save(file)
        return found

    def budget(self, row: Row) -> float:
        """Parameters that remain when this share of every MLP's neurons goes, as a share of all."""
        hidden = {
            g.name: g.size - round(row.cut * g.size) for g in self.anatomy.cuttable.values() if g.kind == "hidden"
        }
        return (self.anatomy.params_after(hidden) + 0.5) / self.anatomy.params

    def measure(self, row: Row) -> dict[str, Any]:
        if row.key() in self.rows:
            return self.rows[row.key()]
        start = time.perf_counter()
        if row.criterion not in self.scores:
            self.scores[row.criterion] = sc.score(self.statistics, row.criterion, **OPTIONS.get(row.criterion, {}))
        align = 1 if row.allocator == "uniform" else 8
        plan = sc.allocate(
            self.scores[row.criterion], self.budget(row), row.allocator, kinds=row.kinds, align=align, floor=0.05
        )
        small = sc.prune(self.model, plan, compensate=row.compensator, stats=self.statistics, data=self.calibration)
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "params": sc.parameters(small), "macs": sc.macs(small)}
        found |= sc.perplexity(small, self.test).to_dict()
        self.rows[row.key()] = found
        self.file.write_text(json.dumps(self.rows, indent=1))
        print(row, {k: round(v, 3) for k, v in found.items() if v is not None}, flush=True)
        return found

    def dense(self) -> dict[str, Any]:
        if "dense" not in self.rows:
            self.rows["dense"] = sc.perplexity(self.model, self.test).to_dict()
            self.file.write_text(json.dumps(self.rows, indent=1))
        return self.rows["dense"]

    def table(self, rows: list[Row]) -> str:
        columns = [
            "criterion",
            "widths",
            "refit",
            "neurons cut",
            "fewer parameters",
            "perplexity per token",
            "per word",
        ]
        lines = [["dense", "", "", "", "0.0%", f"{self.dense()['token']:.2f}", f"{self.dense()['word']:.1f}"]]
        best = {cut: min(self.measure(r)["token"] for r in rows if r.cut == cut) for cut in {r.cut for r in rows}}
        for row in sorted(rows, key=lambda r: (r.cut, self.measure(r)["token"])):
            found = self.measure(row)
            fewer = f"{1 - found['params'] / self.anatomy.params:.1%}"
            token = f"{found['token']:.2f}"
            token = f"**{token}**" if found["token"] == best[row.cut] else token
            names = [f"`{row.criterion}`", f"`{row.allocator}`", f"`{row.compensator}`"]
            lines.append([*names, f"{row.cut:.0%}", fewer, token, f"{found['word']:.1f}"])
        return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/wikitext2-{valid,test}.txt")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, for calibration and for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these tables; the main one by default")
    parser.add_argument("--page", action="store_true", help="only write the tables, from the rows that are finished")
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.only or ["main"]:
        rows = [r for r in SECTIONS[name] if not options.page or r.key() in bench.rows]
        for row in rows:
            bench.measure(row)
        where = f"{SMOLLM2}; {options.windows} windows of 256 tokens, stride 256, seed {options.seed}."
        write_section(PAGE, f"language-{name}", f"{bench.table(rows)}\n\n{setting()} {where}")


if __name__ == "__main__":
    main()
