"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, IMAGES, BUDGET, METHOD = "Model", "Images or text", "Budget", "Method"

Model = Annotated[
    str,
    typer.Argument(help="timm/NAME, hf/ORG/NAME, open_clip/NAME:TAG, or a folder saved by one of them or by secateur."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Local checkpoint for the (dense) timm or open_clip model.", rich_help_panel=MODEL),
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Build the (dense) timm or open_clip model for this size.", rich_help_panel=MODEL),
]
Random = Annotated[
    bool, typer.Option("--random-weights", help="Do not load pretrained weights.", rich_help_panel=MODEL)
]
Images = Annotated[
    Path,
    typer.Option(
        "--images",
        "--text",
        help="Folder of unlabeled images; for language models a text or .jsonl file, or a folder of them.",
        rich_help_panel=IMAGES,
    ),
]
Limit = Annotated[
    int, typer.Option("--limit", min=1, help="Use at most so many images or windows.", rich_help_panel=IMAGES)
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images (default 16) or windows (default 4) per batch.", rich_help_panel=IMAGES),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window of text.", rich_help_panel=IMAGES)]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens from one window to the next (default: the window's length).", rich_help_panel=IMAGES
    ),
]
Broken = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Largest share of unreadable images, or lines of text, to put up with.",
        rich_help_panel=IMAGES,
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
KeepParams = Annotated[
    float | None, typer.Option(help="Share of the parameters to keep, e.g. 0.75.", rich_help_panel=BUDGET)
]
KeepMacs = Annotated[
    float | None, typer.Option(help="Share of the multiply-accumulates to keep.", rich_help_panel=BUDGET)
]
Kinds = Annotated[
    str | None,
    typer.Option(
        help="Cut only groups of these kinds, e.g. hidden,heads; or blocks, to remove whole ones.",
        rich_help_panel=BUDGET,
    ),
]
Floor = Annotated[
    float, typer.Option(min=0, max=0.99, help="Least share of every group to keep.", rich_help_panel=BUDGET)
]
Align = Annotated[int, typer.Option(min=1, help="Kept widths are multiples of this.", rich_help_panel=BUDGET)]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform-width", help="Equal widths in all layers, for engines that need it.", rich_help_panel=BUDGET
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="How units are scored; see secateur.list_criteria(). By default obs; block-influence for whole blocks.",
        rich_help_panel=METHOD,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        help="How the cut is shared out; see secateur.list_allocators(). By default curve; uniform for whole blocks.",
        rich_help_panel=METHOD,
    ),
]
Ridge = Annotated[
    float, typer.Option(min=0, help="Of the regression, relative to the mean diagonal.", rich_help_panel=METHOD)
]


def model_options(weights: Path | None, image_size: int | None, random: bool) -> dict[str, Any]:
    """Keyword arguments for `load_model`."""
    out: dict[str, Any] = {}
    if weights is not None:
        out["weights"] = str(weights)
    if image_size is not None:
        out["img_size"] = image_size
    if random:
        import torch

        torch.manual_seed(0)  # the same random weights every time, so that plans and statistics fit
        out["pretrained"] = False
    return out


def listed(text: str | None) -> tuple[str, ...] | None:
    """Comma-separated names; None if there are none."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    return names or None


def report_skipped(skipped: dict[str, str]) -> None:
    """Say how many images, or lines of text, could not be read, and name the first few."""
    if skipped:
        names = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        typer.echo(f"skipped {len(skipped)} unreadable image(s): {names}{more}", err=True)
