"""Quality after the cut, without any training: every criterion, allocator and compensator on the same images.

    python benchmarks/quality.py --data PHOTOGRAPHS                # about an hour and a half on two cores
    python benchmarks/quality.py --data PHOTOGRAPHS --only knn     # one table

Finished rows are kept in benchmarks/results/ and not computed again (`--fresh` throws them away). Writes its sections
of docs/results.md and the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

import secateur as sc
from _real import DINOV2, FOCUS, MODELS, arguments, environment, markdown, photographs, tiny_imagenet, write_section
from secateur.anatomy import Kind
from secateur.evaluation.knn import embed, knn_top1

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
CRITERIA = ("obs", "leverage", "variance", "wanda", "taylor", "amp", "dgmr", "magnitude", "random")
SEARCHED = 16  # images on which amp-bisect measures the entropy: one batch, or it takes hours


@dataclass(frozen=True)
class Row:
    """One cut: `share` of the parameters is kept; 0 stands for as many as half of every MLP leaves.

    `images` are those it is calibrated on.
    """

    criterion: str
    allocator: str = "uniform"
    compensator: str = "none"
    kinds: tuple[str, ...] = ("hidden",)
    share: float = 0.0
    images: str = "photographs"

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


BOTH = ("hidden", "heads")
REFIT = [Row("obs", x, "sequential") for x in ("curve", "uniform")]
ALLOCATED = [*REFIT, *(Row("obs", "curve", x) for x in ("affine", "none")), Row("amp", "amp-bisect")]
HEADS = [Row("obs", "curve", x, BOTH) for x in ("sequential", "affine")] + [Row("amp", "amp-bisect"), Row("dgmr")]
DEEPER = [Row("obs", "curve", x, BOTH, 0.60) for x in ("sequential", "affine")]
DEEPER += [Row("amp", "amp-bisect", share=0.60), Row("dgmr", share=0.60)]
CRITERIA_ALONE = [REFIT[1], *(Row(c, compensator=x) for x in ("affine", "none") for c in CRITERIA)]
QUARTER = [Row("obs", "curve", "sequential", BOTH, 0.75, x) for x in ("half of each", "photographs", "tiny-imagenet")]
QUARTER += [Row(c, share=0.75, images="half of each") for c in ("amp", "dgmr")]
SECOND = [
    *REFIT,
    *(Row(c, compensator=x) for x in ("affine", "none") for c in ("obs", "amp", "dgmr")),
    Row("obs", "curve", "sequential", BOTH, 0.60),
    Row("amp", share=0.60),
    Row("dgmr", share=0.60),
]


class Bench:
    """One model, its statistics, and the rows measured on it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.model = name, MODELS[name]()
        self.anatomy = sc.inspect(self.model)
        self.seed, self.stem = options.seed, f"{name.split()[0].lower()}-{options.calibration}-{options.seed}"
        calibration, held_out = photographs(options.data, options.seed, options.calibration)
        spec = sc.source_of(self.model).image
        tiny = tiny_imagenet(options.data, options.seed, options.calibration)
        half = options.calibration // 2
        files = {"photographs": calibration, "tiny-imagenet": tiny, "half of each": calibration[:half] + tiny[:half]}
        self.images = {name: sc.batches(paths, spec, seed=options.seed) for name, paths in files.items()}
        self.searched = sc.batches(calibration[:SEARCHED], spec, size=SEARCHED)
        self.held_out = sc.batches(held_out, spec)
        self.file = RESULTS / f"quality-{self.stem}.json"
        if options.fresh:
            for file in RESULTS.glob(f"*-{self.stem}*"):
                file.unlink()
        self.rows: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.scores: dict[tuple[str, str], sc.Scores] = {}

    @cache  # noqa: B019  (there are two benches, for the life of the process)
    def statistics(self, images: str) -> sc.Statistics:
        file = RESULTS / f"statistics-{self.stem}-{images.replace(' ', '-')}.safetensors"
        if file.is_file():
            statistics = sc.Statistics.load(file)
            statistics.model, statistics.anatomy = self.model, self.anatomy
            return statistics
        losses = ["features", "entropy"]
        statistics = sc.calibrate(self.model, self.images[images], self.anatomy, loss=losses, seed=self.seed)
        statistics.save(file)
        return statistics

    def share(self, row: Row) -> float:
        if row.share:
            return row.share
        half = {g.name: g.size // 2 for g in self.anatomy.cuttable.values() if g.kind == Kind.HIDDEN}
        return (self.anatomy.params_after(half) + 0.5) / self.anatomy.params

    def cut(self, row: Row) -> nn.Module:
        statistics, made = self.statistics(row.images), (row.criterion, row.images)
        if made not in self.scores:
            self.scores[made] = sc.score(statistics, row.criterion)
        plan = sc.allocate(
            self.scores[made], self.share(row), row.allocator, kinds=row.kinds, model=self.model, data=self.searched
        )
        data = self.images[row.images]
        return sc.prune(self.model, plan, compensate=row.compensator, stats=statistics, data=data)

    def measure(self, rows: list[Row], what: Callable[[nn.Module], dict[str, float]] | None = None) -> None:
        """Fill in what is missing of some rows; `what` measures something more than fidelity."""
        for row in rows:
            found = self.rows.get(row.key(), {})
            if found and (what is None or "knn" in found):
                continue
            start = time.perf_counter()
            small = self.cut(row)
            seconds = time.perf_counter() - start
            found = {"seconds": seconds, "params": sc.parameters(small), "macs": sc.macs(small)}
            found |= sc.fidelity(small, self.model, self.held_out).to_dict()
            if what is not None:
                found |= what(small)
            self.rows[row.key()] = found
            print(self.name, row, {k: round(v, 4) for k, v in found.items() if v is not None}, flush=True)
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(json.dumps(self.rows, indent=1))

    def table(self, rows: list[Row], columns: dict[str, str]) -> str:
        """Markdown; the best value of each column is bold."""
        found = [self.rows[r.key()] for r in rows]
        several = len({r.images for r in rows}) > 1
        best = {c: max(f[c] for f in found) for c in columns if found[0].get(c) is not None}
        lines = []
        for row, values in zip(rows, found, strict=True):
            fewer = f"{1 - values['params'] / sc.parameters(self.model):.1%}"
            cells = [_text(values[c], values[c] == best[c]) for c in best]
            kinds = "MLP, heads" if "heads" in row.kinds else "MLP"
            images = [row.images] if several else []
            names = [f"`{row.criterion}`", f"`{row.allocator}`", f"`{row.compensator}`"]
            lines.append([*names, kinds, *images, fewer, *cells])
        heads = ["criterion", "widths", "refit", "cut", *["calibrated on"] * several, "fewer parameters"]
        return markdown([*heads, *(columns[c] for c in best)], lines)


def _text(value: float, best: bool) -> str:
    return f"**{value:.3f}**" if best else f"{value:.3f}"


COLUMNS = {
    "cls_cosine": "CLS cosine",
    "self_retrieval": "self-retrieval@1",
    "neighbours": "same neighbour",
    "patch_cosine": "patch cosine",
}


SECTIONS = {"allocated": ALLOCATED, "knn": QUARTER, "heads": HEADS + DEEPER, "half": CRITERIA_ALONE, "second": SECOND}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these tables; all by default")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
    wanted = options.only or list(SECTIONS)
    benches: dict[str, Bench] = {}
    for name in wanted:
        which = FOCUS if name == "second" else DINOV2
        if which not in benches:
            benches[which] = Bench(which, options)
        bench = benches[which]
        columns, note, more = COLUMNS, "", None
        if name == "knn":
            more = _Knn(bench, options.data)
            columns = COLUMNS | {"knn": "kNN top-1", "knn_kept": "of the dense kNN"}
            note = f"Dense kNN top-1: {more.dense:.3f}.\n\n"
        bench.measure(SECTIONS[name], more)
        table = bench.table(SECTIONS[name], columns)
        write_section(PAGE, f"quality-{name}", f"{note}{table}\n\n{environment(options)}")
        if more is not None:
            write_section(ROOT / "README.md", "result", _headline(bench, more.dense))


def _headline(bench: Bench, dense_knn: float) -> str:
    """The table of README.md: a quarter fewer parameters by three procedures."""
    names = {"AMP's slices": QUARTER[3], "DGMR's slices": QUARTER[4], "**Secateur**": QUARTER[0]}
    lines = [["dense", f"{sc.parameters(bench.model) / 1e6:.1f} M", "1", "100 %", f"{dense_knn:.1%}"]]
    for name, row in names.items():
        found = bench.rows[row.key()]
        size = f"{found['params'] / 1e6:.1f} M"
        cells = [f"{found['cls_cosine']:.2f}", f"{found['self_retrieval']:.0%}", f"{found['knn']:.1%}"]
        lines.append([name, size, *cells])
    columns = ["", "parameters", "cosine to the dense features", "images recognised", "kNN accuracy"]
    return (
        f"A quarter of the parameters of a DINOv2 ViT-S cut, from 512 unlabeled images, without any training:\n\n"
        f"{markdown(columns, lines)}\n\n"
        "How this was measured, and much more: [results](docs/results.md)."
    )


class _Knn:
    """kNN top-1 on 64 px images enlarged to the model's size; training features are the same model's."""

    def __init__(self, bench: Bench, data: Path) -> None:
        spec = sc.source_of(bench.model).image
        self.train, self.test = (sc.batches(data / "tiny-imagenet" / part, spec) for part in ("train", "test"))
        self.dense = self.top1(bench.model)

    def top1(self, model: nn.Module) -> float:
        return knn_top1(embed(model, self.train), embed(model, self.test))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = self.top1(model)
        return {"knn": found, "knn_kept": found / self.dense}


if __name__ == "__main__":
    main()
