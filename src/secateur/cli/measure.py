"""`secateur measure`."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import ImageSize, Model, Random, Weights, model_options


def measure(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, by the same forms as MODEL.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 15,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Parameters, multiply-accumulates, latency and throughput.

    Two models are timed in turn, so that a drifting machine slows both alike.

    [bold]Examples[/bold]

    secateur measure small/ \
        --against timm/vit_small_patch14_reg4_dinov2.lvd142m
    secateur measure timm/vit_tiny_patch16_224 --random-weights --batch-size 1
    """
    from secateur import latency, load_model, macs, parameters
    from secateur.cli.tables import cell, setting, show

    options = model_options(weights, image_size, random_weights)
    models = {"model": load_model(model, **(options if against is None else {}))}
    if against is not None:
        models = {"dense": load_model(against, **options), **models}
    times = latency(models, batch_size, rounds=rounds)
    rows = []
    for name, value in (
        ("parameters", {n: float(parameters(m)) for n, m in models.items()}),
        ("MACs per image", {n: macs(m) for n, m in models.items()}),
        (f"latency, batch {batch_size} (ms)", {n: t.median_ms for n, t in times.items()}),
        ("images per second", {n: t.images_per_second for n, t in times.items()}),
    ):
        cells = [cell(name, v) for v in value.values()]
        if against is not None:
            cells.append(f"{value['model'] / value['dense']:.3f}")
        rows.append((name, *cells))
    show(
        f"Median of {rounds} ({setting(models['model'])})",
        ("", *models, *(["ratio"] if against is not None else [])),
        rows,
    )
