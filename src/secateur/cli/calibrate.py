"""`secateur calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    BatchSize,
    Broken,
    Images,
    ImageSize,
    Limit,
    Model,
    Random,
    Seed,
    Weights,
    model_options,
    report_skipped,
)


def calibrate(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="File to write, e.g. statistics.safetensors.")],
    loss: Annotated[
        str,
        typer.Option(
            help="Losses to run backward, comma-separated (features, entropy, logits-entropy, kl, "
            "cross-entropy), or 'none'."
        ),
    ] = "features,entropy",
    covariance: Annotated[bool, typer.Option(help="Collect covariances.")] = True,
    limit: Limit = 512,
    batch_size: BatchSize = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.")
    ] = False,
    broken: Broken = 0.1,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    """One pass over unlabeled images; the sums it writes serve any number of plans. Runs under torchrun as it is.

    [bold]Examples[/bold]

      secateur calibrate timm/vit_base_patch14_dinov2.lvd142m --images photos/ --out stats.safetensors
      torchrun --nproc-per-node 2 -m secateur calibrate hf/facebook/dinov2-base --images photos/ --out stats.safetensors
    """
    from secateur import calibrate as run
    from secateur import load_model
    from secateur.calibration.distributed import rank_and_world

    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    losses = () if loss == "none" else tuple(loss.split(","))
    statistics = run(
        loaded,
        images,
        loss=losses,
        covariance=covariance,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        checkpointing=checkpointing,
        broken=broken,
        seed=seed,
    )
    if rank_and_world()[0] == 0:
        statistics.save(out)
        report_skipped(statistics.skipped)
        typer.echo(
            f"{statistics.images} images, {len(statistics.layers)} layers, losses: "
            f"{', '.join(statistics.losses) or 'none'}; written to {out}"
        )
