"""`secateur calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    METHOD,
    BatchSize,
    Broken,
    Images,
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


def calibrate(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="File to write, e.g. stats.safetensors.")],
    loss: Annotated[
        str,
        typer.Option(
            help="Losses to run backward, comma-separated (features, entropy, logits-entropy, kl, cross-entropy), or "
            "'none'.",
            rich_help_panel=METHOD,
        ),
    ] = "features,entropy",
    covariance: Annotated[bool, typer.Option(help="Collect covariances.", rich_help_panel=METHOD)] = True,
    dtype: Annotated[str, typer.Option(help="Arithmetic: float32 or bfloat16.", rich_help_panel=METHOD)] = "float32",
    moments: Annotated[
        str | None,
        typer.Option(
            help="Also what `secateur rotate` needs for these kinds, e.g. residual,vo_dim.", rich_help_panel=METHOD
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.", rich_help_panel=METHOD)
    ] = False,
    limit: Limit = 512,
    batch_size: BatchSize = None,
    window: Window = 256,
    stride: Stride = None,
    broken: Broken = 0.1,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Gather statistics in one pass over unlabeled images.

    The sums it writes serve any number of plans. Runs under torchrun as it is.

    [bold]Examples[/bold]

    secateur calibrate timm/vit_base_patch14_dinov2.lvd142m --images photos/ \
        --out stats.safetensors
    torchrun --nproc-per-node 2 -m secateur calibrate hf/facebook/dinov2-base \
        --images photos/ --out stats.safetensors
    """
    from secateur import calibrate as run
    from secateur import load_model
    from secateur.calibration.distributed import rank_and_world
    from secateur.files import check_writable

    check_writable(out, file=True)
    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    statistics = run(
        loaded,
        images,
        loss=() if loss == "none" else listed(loss) or (),
        covariance=covariance,
        limit=limit,
        batch_size=batch_size,
        window=window,
        stride=stride,
        dtype=dtype,
        moments=listed(moments) or (),
        checkpointing=checkpointing,
        broken=broken,
        seed=seed,
    )
    if rank_and_world()[0] == 0:
        statistics.save(out)
        report_skipped(statistics.skipped)
        typer.echo(
            f"{statistics.images} images, {len(statistics.layers)} layers, losses: "
            f"{', '.join(statistics.losses) or 'none'}\n"
            f"written to {out}; plan from it with secateur plan --statistics {out}"
        )
