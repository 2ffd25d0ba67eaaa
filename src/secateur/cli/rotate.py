"""`secateur rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import ImageSize, Model, Random, Weights, listed, model_options


def rotate(
    model: Model,
    statistics: Annotated[Path, typer.Option(help="Written by `secateur calibrate --moments`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    kinds: Annotated[
        str, typer.Option(help="What to prepare for a cut: residual, vo_dim, qk_dim, comma-separated.")
    ] = "residual",
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Bring a model into a basis whose last units matter least.

    It computes what it did; calibrate, plan and prune take it from there.

    [bold]Examples[/bold]

    secateur rotate hf/HuggingFaceTB/SmolLM2-135M --statistics s.safetensors \
        --out rotated/
    secateur rotate llama/ --statistics s.safetensors \
        --kinds vo_dim,qk_dim --out rotated/
    """
    from secateur import Statistics, load_model, parameters, save
    from secateur import rotate as run
    from secateur.cli.tables import scaled
    from secateur.files import check_writable

    check_writable(out)
    sums = Statistics.load(statistics)
    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    turned = run(loaded, sums, listed(kinds) or ())
    save(turned, out)
    added = parameters(turned) - parameters(loaded)
    typer.echo(
        f"rotated for {kinds}; {scaled(added) if added else 'no'} parameters added\n"
        f"written to {out}; calibrate, plan and prune it like any model"
    )
