"""Tables for people, plain when piped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from secateur.anatomy import PrunableGroup
    from secateur.plan import Kept

WIDE = 200  # columns, where no terminal says how many there are


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(title, style="bold", highlight=False)
    console.print(table)
    console.print()


def loadable(out: Path) -> str:
    """The last line of what writes a model."""
    return f"written to {out}; load it with secateur.load({str(out)!r})"


def scaled(number: float) -> str:
    """Three digits and a unit: 371240 is '371 k'."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.4g}"


def setting(model: nn.Module) -> str:
    """What timings depend on."""
    import torch

    parameter = next(model.parameters())
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread" + ("s" if threads > 1 else "")
    where = cpu if parameter.device.type == "cpu" else str(parameter.device)
    return f"{where}, {str(parameter.dtype).removeprefix('torch.')}"


def before_and_after(rows: Sequence[tuple[str, float, float, float]], title: str) -> None:
    """The final table: dense, cut, ratio."""
    show(title, ("", "dense", "cut", "ratio"), [(q, cell(q, d), cell(q, c), f"{r:.3f}") for q, d, c, r in rows])


def cell(quantity: str, value: float) -> str:
    """A quantity's number with its digits."""
    return scaled(value) if quantity.startswith(("parameters", "MACs")) else f"{value:#.4g}".rstrip(".")


def fidelity_rows(figures: Mapping[str, float | int | None]) -> list[tuple[str, str]]:
    """Names and values of a fidelity, for a table."""
    names = {
        "cls_cosine": "CLS cosine to dense",
        "patch_cosine": "patch cosine to dense",
        "self_retrieval": "self-retrieval@1",
        "neighbours": "nearest neighbour kept",
        "top1_agreement": "top-1 agreement",
        "kl": "KL to dense, nats per token",
        "perplexity": "perplexity per token",
        "dense_perplexity": "of the dense model",
    }
    return [(label, f"{figures[key]:.4f}") for key, label in names.items() if figures.get(key) is not None]


def pattern(name: str) -> str:
    """A group's name with the numbers of its blocks left out."""
    return re.sub(r"\.\d+", ".*", name).removeprefix(":")


def label(names: Sequence[str]) -> str:
    """One name, or a pattern with the number of groups it stands for."""
    return names[0].removeprefix(":") if len(names) == 1 else f"{pattern(names[0])} (x {len(names)})"


def merged(groups: Iterable[PrunableGroup], everything: bool) -> list[list[PrunableGroup]]:
    """Groups, those alike in all but their block's number together."""
    alike: dict[tuple, list[PrunableGroup]] = {}
    for group in groups:
        name = group.name if everything else pattern(group.name)
        reason = re.sub(r"\d+", "#", group.reason)
        alike.setdefault((name, group.kind, group.size, reason), []).append(group)
    return list(alike.values())


def kept(groups: Mapping[str, Kept], everything: bool = False) -> None:
    """What a plan keeps: a line a group, or one for all that are alike in all but their block's number."""
    alike: dict[tuple, list[str]] = {}
    for name, group in groups.items():
        alike.setdefault((name if everything else pattern(name), group.size), []).append(name)
    rows = []
    for (_, size), names in alike.items():
        counts = [len(groups[n].keep) for n in names]
        span = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        rows.append((label(names), str(size), span, f"{sum(counts) / len(counts) / size:.1%}"))
    show("Units kept", ("group", "units", "kept", "share"), rows)
