"""`secateur compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import BatchSize, Broken, Images, ImageSize, Model, Random, Seed, Weights, model_options

Share = Annotated[float | None, typer.Option(help="Share to keep, for example 0.75.")]


def compress(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    keep_params: Annotated[float | None, typer.Option(help="Share of the parameters to keep, e.g. 0.75.")] = None,
    keep_macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep.")] = None,
    min_quality: Annotated[
        float | None, typer.Option(help="Instead: cut as far as the cosine to the dense features stays above this.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="How units are scored.")] = "obs",
    allocator: Annotated[str, typer.Option(help="How the cut is shared out over the layers.")] = "curve",
    compensate: Annotated[str, typer.Option(help="How what remains is refit.")] = "sequential",
    kinds: Annotated[str | None, typer.Option(help="Cut only these kinds, e.g. hidden,heads.")] = None,
    calibration_images: Annotated[int, typer.Option("--limit", min=1, help="Calibrate on at most so many.")] = 512,
    floor: Annotated[float, typer.Option(min=0, max=0.99, help="Least share of every group to keep.")] = 0.1,
    align: Annotated[int, typer.Option(min=1, help="Kept widths are multiples of this.")] = 8,
    uniform_width: Annotated[bool, typer.Option("--uniform-width", help="Equal widths in all layers.")] = False,
    batch_size: BatchSize = 16,
    dtype: Annotated[str, typer.Option(help="Arithmetic of the calibration: float32 or bfloat16.")] = "float32",
    broken: Broken = 0.1,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    """Cut a model to a budget, without labels and without training; write, measure and compare it.

    [bold]Examples[/bold]

      secateur compress timm/vit_small_patch14_reg4_dinov2.lvd142m --images photos/ --keep-params 0.75 --out small/
      secateur compress hf/facebook/dinov2-base --images photos/ --keep-macs 0.6 --kinds hidden --out small/
      secateur compress timm/vit_base_patch16_clip_224.openai --images photos/ --min-quality 0.95 --out small/
    """
    from secateur import compress as run
    from secateur.cli.options import report_skipped
    from secateur.cli.tables import before_and_after, fidelity_rows, show

    result = run(
        model,
        images,
        out=out,
        resume=resume,
        model_options=model_options(weights, image_size, random_weights),
        keep_params=keep_params,
        keep_macs=keep_macs,
        min_quality=min_quality,
        criterion=criterion,
        allocator=allocator,
        compensator=compensate,
        kinds=tuple(kinds.split(",")) if kinds else None,
        limit=calibration_images,
        floor=floor,
        align=align,
        uniform_width=uniform_width,
        batch_size=batch_size,
        dtype=dtype,
        broken=broken,
        seed=seed,
    )
    report_skipped(result.skipped)
    before_and_after(result.table, "Gained")
    if result.fidelity is not None:
        show(
            f"Kept, on {result.fidelity.images} held-out images", ("", "cut"), fidelity_rows(result.fidelity.to_dict())
        )
    typer.echo(f"written to {out}; load it with secateur.load('{out}')")
