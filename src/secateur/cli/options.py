"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(help="timm/NAME, hf/ORG/NAME, open_clip/NAME:TAG, or a folder saved by one of them or by secateur."),
]
Images = Annotated[Path, typer.Option("--images", help="Folder of unlabeled images (subfolders are searched).")]
Weights = Annotated[Path | None, typer.Option(help="Local checkpoint for a timm or open_clip model.")]
ImageSize = Annotated[int | None, typer.Option(help="Build a timm model for this image size.")]
Random = Annotated[bool, typer.Option("--random-weights", help="Do not load pretrained weights.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Use at most so many images.")]
Broken = Annotated[float, typer.Option(min=0, max=1, help="Largest share of unreadable images to put up with.")]


def model_options(weights: Path | None, image_size: int | None, random: bool) -> dict[str, Any]:
    """Keyword arguments for `load_model`."""
    out: dict[str, Any] = {}
    if weights is not None:
        out["weights"] = str(weights)
    if image_size is not None:
        out["img_size"] = image_size
    if random:
        out["pretrained"] = False
    return out


def report_skipped(skipped: dict[str, str]) -> None:
    """Say how many images could not be read, and name the first few."""
    if skipped:
        names = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        typer.echo(f"skipped {len(skipped)} unreadable image(s): {names}", err=True)
