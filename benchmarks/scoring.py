"""What it costs to score by every criterion at once, beside each of them alone.

    python benchmarks/scoring.py --data FOLDER          # half an hour on two cores

SmolLM2-135M on windows of WikiText-2: one calibration that collects what all criteria need, and all scores from it,
against one calibration and one score each. Writes its section of docs/results.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import secateur as sc
from _real import SMOLLM2, markdown, setting, smollm2, wikitext, write_section
from secateur.criteria import criteria

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
LANGUAGE = (
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


def needs(names: tuple[str, ...]) -> dict[str, Any]:
    """Options of a calibration that serves these criteria."""
    rules = [criteria.get(n) for n in names]
    weighting = next((r.weighting for r in rules if r.weighting), None)
    losses = [loss for r in rules for loss in (*r.losses, *r.weights)] + [weighting or ""]
    return {
        "loss": tuple(dict.fromkeys(x for x in losses if x)),
        "weighting": weighting,
        "weights": tuple(dict.fromkeys(w for r in rules for w in r.weights)),
        "covariance": any(r.covariance for r in rules),
        "projected": any(r.projected for r in rules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/wikitext2-{valid,test}.txt")
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = smollm2()
    data, _ = wikitext(model, options.data, options.windows, options.seed)
    anatomy = sc.inspect(model)
    seconds: dict[str, float] = {}
    for label, names in {"all": LANGUAGE, **{n: (n,) for n in LANGUAGE}}.items():
        start = time.perf_counter()
        statistics = sc.calibrate(model, data, anatomy, **needs(names)) if label == "all" or _reads(label) else None
        for name in names:
            sc.score(statistics, name, model=model, anatomy=anatomy, curves=False)
        seconds[label] = time.perf_counter() - start
        print(f"{label}: {seconds[label]:.0f} s", flush=True)
    slowest = max(LANGUAGE, key=lambda n: seconds[n])
    rows = [[f"`{n}`" if n != "all" else "all at once", f"{s:.0f}"] for n, s in seconds.items()]
    text = (
        f"{markdown(['calibrated and scored by', 'seconds'], rows)}\n\nAll at once takes "
        f"{seconds['all'] / seconds[slowest]:.2f} times the slowest alone (`{slowest}`), "
        f"{seconds['all'] / sum(seconds[n] for n in LANGUAGE):.2f} times all one after the other.\n\n"
        f"{setting()} {SMOLLM2}; {options.windows} windows of 256 tokens, seed {options.seed}."
    )
    write_section(PAGE, "scoring", text)


def _reads(name: str) -> bool:
    return criteria.get(name).data


if __name__ == "__main__":
    main()
