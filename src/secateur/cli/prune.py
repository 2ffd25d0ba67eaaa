"""`secateur prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import BatchSize, ImageSize, Model, Random, Seed, Weights, model_options


def prune(
    model: Model,
    plan: Annotated[Path, typer.Option(help="Written by `secateur plan`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    compensate: Annotated[str, typer.Option(help="none, mean, ridge, affine or sequential.")] = "affine",
    statistics: Annotated[Path | None, typer.Option(help="Written by `secateur calibrate`.")] = None,
    images: Annotated[Path | None, typer.Option(help="The calibration images, for sequential.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most so many of them.")] = 512,
    ridge: Annotated[float, typer.Option(help="Of the regression, relative to the mean diagonal.")] = 1e-3,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    """Apply a plan to a model and save the smaller one.

    [bold]Examples[/bold]

      secateur prune timm/vit_base_patch14_dinov2.lvd142m --plan plan.json --statistics stats.safetensors --out small/
      secateur prune timm/deit_tiny_patch16_224 --plan plan.json --compensate none --out small/
    """
    from secateur import Plan, Statistics, load_model, parameters, save
    from secateur import prune as cut

    decided = Plan.load(plan)
    sums = None if statistics is None else Statistics.load(statistics)
    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    small = cut(
        loaded,
        decided,
        compensate=compensate,
        stats=sums,
        data=images,
        limit=limit,
        ridge=ridge,
        batch_size=batch_size,
        seed=seed,
    )
    save(small, out)
    typer.echo(f"{parameters(loaded) / 1e6:.2f} M -> {parameters(small) / 1e6:.2f} M parameters; written to {out}")
