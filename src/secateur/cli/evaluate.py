"""`secateur evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Stride,
    Weights,
    Window,
    listed,
    model_options,
    report_skipped,
)

if TYPE_CHECKING:
    from secateur.evaluation import Perplexity


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, by the same forms as MODEL.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--text", help="Images to compare on; text for language models.", rich_help_panel=IMAGES
        ),
    ] = None,
    knn: Annotated[
        Path | None,
        typer.Option(
            help="Folder with train/ and test/, each with one subfolder a class: kNN top-1.", rich_help_panel=IMAGES
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, comma-separated, e.g. hellaswag,arc_easy.", rich_help_panel=IMAGES),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", rich_help_panel=IMAGES)
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    limit: Limit = 1000,
    batch_size: BatchSize = None,
    window: Window = 256,
    stride: Stride = None,
    broken: Broken = 0.1,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Compare a cut model with the dense one; perplexity; kNN accuracy.

    The comparison needs no labels; kNN does. The perplexity of a causal language model is given per token and per word,
    over windows of --window tokens, the last --stride of which count.

    [bold]Examples[/bold]

    secateur evaluate small/ \
        --against timm/vit_small_patch14_reg4_dinov2.lvd142m --images photos/
    secateur evaluate small/ --knn tiny-imagenet/
    secateur evaluate small-lm/ --tasks hellaswag,arc_easy --limit 200
    secateur evaluate small-lm/ --text wikitext-test.txt --window 256 --limit 64
    """
    from secateur import batches, fidelity, load_model, perplexity, source_of
    from secateur import knn as knn_of
    from secateur import tasks as run_tasks
    from secateur.cli.tables import fidelity_rows, show
    from secateur.errors import DataError
    from secateur.models import TextSpec

    options = model_options(weights, image_size, random_weights)
    if images is None and (against is not None or (knn is None and tasks is None)):
        raise DataError("give --images with --against to compare with the dense model, or --knn with labelled images")
    loaded = load_model(model, **(options if against is None else {}))
    spec = source_of(loaded).input
    text = isinstance(spec, TextSpec)
    if images is not None and against is None and not (isinstance(spec, TextSpec) and spec.causal):
        raise DataError("give --images with --against to compare with the dense model, or --knn with labelled images")
    rows: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    title = "Kept"
    read: dict[str, Any] = {
        "size": batch_size,
        "limit": limit,
        "seed": seed,
        "broken": broken,
        "window": window,
        "stride": stride,
    }
    if images is not None and against is None:
        data = batches(images, spec, **read)
        rows += _perplexities(perplexity(loaded, data, stride))
        skipped |= data.skipped
    if images is not None and against is not None:
        dense = load_model(against, **options)
        sizes = [" x ".join(map(str, source_of(m).image.size)) for m in (loaded, dense)]
        if sizes[0] != sizes[1] and not text:
            raise DataError(
                f"'{model}' takes images of {sizes[0]}, '{against}' of {sizes[1]}; compare with its own dense model"
            )
        data = batches(images, source_of(dense).input, **read)
        found = fidelity(loaded, dense, data)
        rows += fidelity_rows(found.to_dict())
        title = f"Kept, on {found.images} " + (f"windows of {window} tokens" if text else "images")
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
    if tasks is not None:
        results = run_tasks(
            loaded, listed(tasks) or (), limit=limit, batch_size=batch_size or 4, folder=task_folder, seed=seed
        )
        rows += [
            (f"{task} {metric}", f"{value:.4f}") for task, found in results.items() for metric, value in found.items()
        ]
    report_skipped(skipped)
    show(title, ("", model), rows)


def _perplexities(found: Perplexity) -> list[tuple[str, str]]:
    """Both perplexities, with the protocol in the label."""
    how = f"{found.windows} windows of {found.window} tokens, stride {found.stride}"
    rows = [(f"perplexity per token ({how})", f"{found.token:.2f}")]
    return rows if found.word is None else [*rows, (f"perplexity per word ({how})", f"{found.word:.2f}")]
