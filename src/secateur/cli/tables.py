"""Tables for people, plain when piped."""

from __future__ import annotations

from collections.abc import Sequence


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def before_and_after(rows: Sequence[tuple[str, float, float, float]], title: str) -> None:
    """The final table: dense, cut, ratio."""
    show(title, ("", "dense", "cut", "ratio"), [(q, f"{d:.2f}", f"{c:.2f}", f"{r:.3f}") for q, d, c, r in rows])


def fidelity_rows(figures: dict[str, float | int | None]) -> list[tuple[str, str]]:
    """Names and values of a fidelity, for a table."""
    names = {
        "cls_cosine": "CLS cosine to dense",
        "patch_cosine": "patch cosine to dense",
        "self_retrieval": "self-retrieval@1",
        "neighbours": "nearest neighbour kept",
        "top1_agreement": "top-1 agreement",
    }
    return [(label, f"{figures[key]:.4f}") for key, label in names.items() if figures.get(key) is not None]
