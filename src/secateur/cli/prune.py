"""`secateur prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    IMAGES,
    BatchSize,
    ImageSize,
    Model,
    Random,
    Ridge,
    Seed,
    Stride,
    Weights,
    Window,
    model_options,
)


def prune(
    model: Model,
    plan: Annotated[Path, typer.Option(help="Written by `secateur plan`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    compensate: Annotated[str, typer.Option(help="none, mean, ridge, affine or sequential.")] = "affine",
    statistics: Annotated[Path | None, typer.Option(help="Written by `secateur calibrate`.")] = None,
    ridge: Ridge = 1e-3,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--text", help="The calibration images or text, for sequential.", rich_help_panel=IMAGES
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most so many of them.", rich_help_panel=IMAGES)] = 512,
    batch_size: BatchSize = None,
    window: Window = 256,
    stride: Stride = None,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Apply a plan to a model and save the smaller one.

    [bold]Examples[/bold]

    secateur prune timm/vit_base_patch14_dinov2.lvd142m --plan plan.json \
        --statistics s.safetensors --out small/
    secateur prune timm/deit_tiny_patch16_224 --plan plan.json \
        --compensate none --out small/
    """
    from secateur import Plan, Statistics, load_model, parameters, save
    from secateur import prune as cut
    from secateur.cli.tables import loadable, scaled
    from secateur.errors import DataError
    from secateur.files import check_writable
    from secateur.surgery import compensators

    rule = compensators.get(compensate)
    if rule.sequential and images is None:
        raise DataError(f"compensator '{compensate}' reads the calibration images again: give --images")
    if rule.data and not rule.sequential and statistics is None:
        raise DataError(f"compensator '{compensate}' needs --statistics; or use --compensate none")
    check_writable(out)
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
        window=window,
        stride=stride,
        seed=seed,
    )
    save(small, out)
    before, after = parameters(loaded), parameters(small)
    if after == before:
        typer.echo("note: nothing was cut: the plan keeps every unit", err=True)
    typer.echo(f"{scaled(before)} -> {scaled(after)} parameters ({after / before:.1%})")
    typer.echo(loadable(out))
