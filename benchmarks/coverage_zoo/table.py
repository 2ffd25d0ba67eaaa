"""docs/coverage.md from the rows."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coverage_zoo.check import TOLERANCE
from coverage_zoo.hf_special import LEFT_OUT

Row = dict[str, Any]
PACKAGES = {"timm": "timm", "hf": "transformers", "open_clip": "open_clip_torch", "text": "transformers"}
NAMES = {"timm": "timm", "hf": "transformers", "open_clip": "open_clip", "text": "transformers, language models"}
CUT = ("hidden", "channels", "heads", "kv_groups", "experts")

_INTRODUCTION = """\
# Coverage

Every family of timm, every vision class of transformers, every image tower of open_clip and every language model of
transformers whose config can be made tiny by the usual names of sizes was built small (or as it is), given random
weights, inspected, and cut in all groups at once to two thirds of their units, picked at random. It passes if the
sliced model gives what the masked one gives, to {tolerance:g} of the largest output (in float64 where it runs in
that), if masking changed the output, and if the parameters left are exactly those foretold.

    python benchmarks/coverage.py

wrote this page, with {versions}.
A family of timm is a module and the letters that its models' names begin with; of each, the smallest model of every
distinct set of layers was tried. A family passes only if all of its models do. Of transformers, not run:
{left_out}.
"""
_COUPLED = re.compile(r"^(.*) couples all units in \((.*)\)$")
_IN = re.compile(r"^(.*) in \((.*)\)$")
_CANNOT = re.compile(r"^(\w+) (cannot run with fewer units|could not be run by itself)")


def families(rows: list[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["family"].lower()):
        out.setdefault(row["family"], []).append(row)
    return out


def status_of(rows: list[Row]) -> str:
    """A family passes if all its layouts that have something to cut pass."""
    found = {r["status"] for r in rows}
    return "fail" if "fail" in found else "pass" if "pass" in found else "not applicable"


def counts(rows: list[Row]) -> tuple[int, int, int]:
    """Families that pass, that count, and that have nothing to cut."""
    status = [status_of(r) for r in families(rows).values()]
    return status.count("pass"), len(status) - status.count("not applicable"), status.count("not applicable")


def summary(library: str, rows: list[Row]) -> str:
    passed, counted, left = counts(rows)
    models = sum(r["status"] == "pass" for r in rows)
    return (
        f"{library}: {passed} of {counted} families pass ({passed / max(counted, 1):.1%}), {left} not applicable; "
        f"{models} of {len(rows)} models pass"
    )


def write_page(path: Path, rows: list[Row]) -> None:
    """Write docs/coverage.md.

    Args:
        path: of the page.
        rows: of all libraries, as `check` gives them.
    """
    packages = [f"{p} {version(p)}" for p in dict.fromkeys(("torch", *PACKAGES.values()))]
    by_library = {name: [r for r in rows if r["library"] == name] for name in NAMES}
    parts = [
        _INTRODUCTION.format(
            tolerance=TOLERANCE,
            versions=", ".join(packages),
            left_out="; ".join(f"{name} ({reason})" for name, reason in LEFT_OUT.items()),
        ),
        _totals(by_library),
        "## What does not pass\n\n" + _failures(rows),
        "## What is left whole in families that pass\n\n" + _refusals(rows),
        *(f"## {NAMES[name]}\n\n{_families(mine)}" for name, mine in by_library.items() if mine),
    ]
    path.write_text("\n".join(parts))


def _table(head: list[str], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)


def _totals(by_library: dict[str, list[Row]]) -> str:
    body = []
    for name, rows in by_library.items():
        passed, counted, left = counts(rows)
        models = sum(r["status"] == "pass" for r in rows)
        share = f"{passed / max(counted, 1):.1%}"
        body.append([NAMES[name], f"{passed} of {counted}", share, left, f"{models} of {len(rows)}"])
    return _table(["library", "families that pass", "share", "families with nothing to cut", "models that pass"], body)


def _failures(rows: list[Row]) -> str:
    body = []
    for name in NAMES:
        for family, mine in families([r for r in rows if r["library"] == name]).items():
            failed = [r for r in mine if r["status"] == "fail"]
            for reason in dict.fromkeys(map(_why, failed)):
                models = [r["name"] for r in failed if _why(r) == reason]
                others = (
                    f"; {len(mine) - len(failed)} of its {len(mine)} models pass" if len(failed) < len(mine) else ""
                )
                body.append([NAMES[name], family, ", ".join(models), reason + others])
    return _table(["library", "family", "models", "reason"], body) if body else "Everything passes.\n"


def _why(row: Row) -> str:
    """The reason of a row; where nothing can be cut, what keeps the groups that could be."""
    if row["reason"] != "nothing can be cut":
        return row["reason"]
    reasons: Counter[str] = Counter()
    for text, count in row["refused"].items():
        kind, _, reason = text.partition(": ")
        if kind in CUT:
            reason, where = _category(reason)
            reasons[f"{reason} ({where})" if where else reason] += count
    return "every group is refused: " + "; ".join(r for r, _ in reasons.most_common())


def _category(reason: str) -> tuple[str, str]:
    """A reason without sizes and names, and the class of the module in which it arose."""
    if match := _COUPLED.match(reason):
        return f"{match[1]} couples all units", match[2]
    if match := _CANNOT.match(reason):
        return f"the module's own code {match[2]}", match[1]
    if "counts these units as well as those of" in reason:
        return "another group counts in the same attribute", ""
    if match := _IN.match(reason):
        return match[1], match[2]
    return reason, ""


def _refusals(rows: list[Row]) -> str:
    groups: Counter[str] = Counter()
    classes: dict[str, Counter[str]] = {}
    for row in rows:
        if row["status"] != "pass":
            continue
        for text, count in row["refused"].items():
            kind, _, reason = text.partition(": ")
            category, where = _category(reason)
            if kind not in CUT and where == "":
                category = f"{kind}: {category}"
            groups[category] += count
            if where:
                classes.setdefault(category, Counter())[where] += count
    body = [[reason, count, _most(classes.get(reason, Counter()))] for reason, count in groups.most_common()]
    return _table(["reason", "groups", "most often in"], body)


def _most(where: Counter[str], shown: int = 4) -> str:
    rest = len(where) - shown
    return ", ".join(name for name, _ in where.most_common(shown)) + (f" and {rest} more" if rest > 0 else "")


def _families(rows: list[Row]) -> str:
    body = []
    for family, mine in families(rows).items():
        cut = [r for r in mine if r.get("groups")]
        kinds = [k for k in CUT if any(k in r["groups"] for r in cut)]
        largest = max((r["difference"] for r in cut), default=None)
        body.append(
            [
                family,
                len(mine),
                ", ".join(kinds),
                _range([r["share"] for r in cut]),
                "" if largest is None else f"{largest:.0e}",
                status_of(mine),
            ]
        )
    return _table(["family", "models", "groups", "share of parameters within reach", "largest difference", ""], body)


def _range(shares: list[float]) -> str:
    if not shares:
        return ""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"
