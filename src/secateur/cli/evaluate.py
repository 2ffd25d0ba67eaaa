"""`secateur evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import BatchSize, ImageSize, Limit, Model, Random, Seed, Weights, model_options


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, by the same forms as MODEL.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to compare on.")] = None,
    knn: Annotated[
        Path | None, typer.Option(help="Folder with train/ and test/, each with one subfolder a class: kNN top-1.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    limit: Limit = 1000,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    """How close a cut model is to the dense one (no labels needed), and its kNN accuracy (labels needed).

    [bold]Examples[/bold]

      secateur evaluate small/ --against timm/vit_small_patch14_reg4_dinov2.lvd142m --images photos/
      secateur evaluate small/ --knn tiny-imagenet/
    """
    from secateur import batches, fidelity, load_model, source_of
    from secateur import knn as knn_of
    from secateur.cli.tables import fidelity_rows, show
    from secateur.errors import DataError

    if (images is None or against is None) and knn is None:
        raise DataError("give --images and --against to compare with the dense model, or --knn with labelled images")
    options = model_options(weights, image_size, random_weights)
    loaded = load_model(model, **(options if against is None else {}))
    rows = []
    if images is not None and against is not None:
        dense = load_model(against, **options)
        data = batches(images, source_of(dense).image, size=batch_size, limit=limit, seed=seed)
        rows += fidelity_rows(fidelity(loaded, dense, data).to_dict())
    if knn is not None:
        train, test = (batches(knn / part, source_of(loaded).image, size=batch_size) for part in ("train", "test"))
        rows.append((f"kNN top-1 (k={k})", f"{knn_of(loaded, train, test, k):.4f}"))
    show("Kept", ("", model), rows)
