"""Coverage: which model families of timm, transformers (vision, text) and open_clip can be cut, and is the cut exact?

Every model is built small, randomised, inspected, cut in all groups at once to about 2/3 of their units, and the
sliced model is compared with the masked one. Writes docs/coverage.md.

    python benchmarks/coverage.py                       # everything, about an hour on one core
    python benchmarks/coverage.py --page                # docs/coverage.md again, from the saved rows
    python benchmarks/coverage.py --only timm --family swin_transformer/swin --show
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from coverage_zoo.table import PACKAGES, summary, write_page
from coverage_zoo.worker import Worker, library, run_case

LIBRARIES = ("timm", "hf", "open_clip", "text")
RESULTS = Path(__file__).parent / "results" / "coverage.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=LIBRARIES, help="one library")
    parser.add_argument("--family", action="append", help="only families (or models) whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "coverage.md")
    parser.add_argument("--resume", action="store_true", help="keep the rows finished by an earlier run")
    parser.add_argument("--retry", action="store_true", help="with --resume: run again what did not pass")
    parser.add_argument("--page", action="store_true", help="only write the page, from the rows of an earlier run")
    parser.add_argument("--show", action="store_true", help="run in this process, print the rows, write nothing")
    options = parser.parse_args()
    selected = [c for name in LIBRARIES if options.only in (None, name) for c in _cases(name)]
    if options.family:
        selected = [c for c in selected if any(f in c["family"] or f in c["name"] for f in options.family)]
    if options.show:
        for case in selected:
            print(json.dumps(case | run_case(case), indent=1))
        return
    rows = _saved(selected) if options.page else _run(selected, options.resume, options.retry)
    if not (options.only or options.family):
        write_page(options.out, rows)
    for name in dict.fromkeys(r["library"] for r in rows):
        print(summary(name, [r for r in rows if r["library"] == name]))


def _saved(selected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    known = {_key(r): r for r in _load(RESULTS)}
    missing = [c["name"] for c in selected if _key(c) not in known]
    if missing:
        sys.exit(f"{len(missing)} of {len(selected)} models have no row ({missing[0]}, ...); run with --resume first")
    return [known[_key(c)] for c in selected]


def _run(selected: list[dict[str, Any]], resume: bool, retry: bool) -> list[dict[str, Any]]:
    """Rows of the selected cases, written to the results file as they come."""
    known = {_key(r): r for r in _load(RESULTS)}
    done = {k for k, r in known.items() if resume and not (retry and r["status"] == "fail")}
    worker, start = Worker(), time.time()
    for i, case in enumerate(selected):
        if _key(case) in done:
            continue
        row = known[_key(case)] = worker.run(case)
        print(
            f"[{i + 1}/{len(selected)} {time.time() - start:.0f}s] {row['status']:5} {row['family']:32} {row['name']}"
            f" share {row.get('share', 0):.2f} difference {row.get('difference', -1):.1e}"
            f" inspect {row.get('inspect_s', 0)}s {row['reason']}",
            flush=True,
        )
        _save(RESULTS, list(known.values()))
    worker.stop()
    return [known[_key(c)] for c in selected]


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["library"], row["name"]


def _cases(name: str) -> list[dict[str, Any]]:
    """The cases of a library; finding them means building every model, so they are remembered by version."""
    from importlib.metadata import version

    from secateur._compat import ensure_torchvision

    package = PACKAGES[name]
    part = "-text" if name == "text" else ""
    file = RESULTS.parent / f"cases-{package}{part}-{version(package)}.json"
    cases = _load(file)
    if not cases:
        ensure_torchvision()
        cases = library(name).cases()
        _save(file, cases)
    return cases


def _load(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.is_file() else []


def _save(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    main()
