"""`secateur evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    IMAGES,
    BatchSize,
    Broken,
    ImageSize,
    Limit,
    Model,
    Random,
    Seed,
    Weights,
    model_options,
    report_skipped,
)


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, by the same forms as MODEL.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to compare on.", rich_help_panel=IMAGES)] = None,
    knn: Annotated[
        Path | None,
        typer.Option(
            help="Folder with train/ and test/, each with one subfolder a class: kNN top-1.", rich_help_panel=IMAGES
        ),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    limit: Limit = 1000,
    batch_size: BatchSize = 16,
    broken: Broken = 0.1,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Compare a cut model with the dense one; kNN accuracy.

    The comparison needs no labels; kNN does.

    [bold]Examples[/bold]

    secateur evaluate small/ \
        --against timm/vit_small_patch14_reg4_dinov2.lvd142m --images photos/
    secateur evaluate small/ --knn tiny-imagenet/
    """
    from secateur import batches, fidelity, load_model, source_of
    from secateur import knn as knn_of
    from secateur.cli.tables import fidelity_rows, show
    from secateur.errors import DataError

    if (images is None) != (against is None) or (images is None and knn is None):
        raise DataError("give --images with --against to compare with the dense model, or --knn with labelled images")
    options = model_options(weights, image_size, random_weights)
    loaded = load_model(model, **(options if against is None else {}))
    rows: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    title = "Kept"
    if images is not None and against is not None:
        dense = load_model(against, **options)
        sizes = [" x ".join(map(str, source_of(m).image.size)) for m in (loaded, dense)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"'{model}' takes images of {sizes[0]}, '{against}' of {sizes[1]}; compare with its own dense model"
            )
        data = batches(images, source_of(dense).image, size=batch_size, limit=limit, seed=seed, broken=broken)
        found = fidelity(loaded, dense, data)
        rows += fidelity_rows(found.to_dict())
        title = f"Kept, on {found.images} images"
        skipped |= data.skipped
    if knn is not None:
        spec = source_of(loaded).image
        train, test = (batches(knn / part, spec, size=batch_size, broken=broken) for part in ("train", "test"))
        if train.classes != test.classes or not train.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(
                f"'{knn}/train' and '{knn}/test' need the same subfolders, at least two, one a class; "
                + (f"'{odd[0]}' is in one only" if odd else "found none")
            )
        rows.append((f"kNN top-1 (k={k})", f"{knn_of(loaded, train, test, k):.4f}"))
        skipped |= {**train.skipped, **test.skipped}
    report_skipped(skipped)
    show(title, ("", model), rows)
