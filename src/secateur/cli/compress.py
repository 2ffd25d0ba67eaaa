"""`secateur compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    BUDGET,
    IMAGES,
    METHOD,
    Align,
    Allocator,
    BatchSize,
    Broken,
    Criterion,
    Floor,
    Images,
    ImageSize,
    KeepMacs,
    KeepParams,
    Kinds,
    Model,
    Random,
    Ridge,
    Seed,
    Stride,
    Uniform,
    Weights,
    Window,
    listed,
    model_options,
    report_skipped,
)


def compress(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    min_quality: Annotated[
        float | None,
        typer.Option(
            help="Instead: cut as far as the cosine to the dense features stays above this.", rich_help_panel=BUDGET
        ),
    ] = None,
    kinds: Kinds = None,
    floor: Floor = 0.1,
    align: Align = 8,
    uniform_width: Uniform = False,
    criterion: Criterion = None,
    allocator: Allocator = None,
    compensate: Annotated[
        str, typer.Option(help="How what remains is refit; see secateur.list_compensators().", rich_help_panel=METHOD)
    ] = "sequential",
    ridge: Ridge = 1e-3,
    limit: Annotated[int, typer.Option(min=2, help="Calibrate on at most so many.", rich_help_panel=IMAGES)] = 512,
    held_out: Annotated[
        int, typer.Option(min=2, help="Evaluate on at most so many others.", rich_help_panel=IMAGES)
    ] = 128,
    batch_size: BatchSize = None,
    window: Window = 256,
    stride: Stride = None,
    broken: Broken = 0.1,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="Such as 6GB: take the model, a local transformers folder, block by block from its files.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic of the calibration: float32 or bfloat16.", rich_help_panel=METHOD)
    ] = "float32",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Cut a model to a budget, without labels and without training.

    The small model is compared with the dense one on images held out, timed, and written with all figures.

    [bold]Examples[/bold]

    secateur compress timm/vit_small_patch14_reg4_dinov2.lvd142m \
        --images photos/ --keep-params 0.75 --out small/
    secateur compress hf/facebook/dinov2-base --images photos/ --keep-macs 0.6 \
        --kinds hidden --out small/
    secateur compress timm/vit_base_patch16_clip_224.openai --images photos/ \
        --min-quality 0.95 --out small/
    secateur compress llama/ --text corpus.txt --keep-params 0.8 \
        --memory-budget 6GB --criterion variance --out small/
    """
    from secateur import compress as run
    from secateur.cli.tables import before_and_after, fidelity_rows, kept, loadable, setting, show

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
        kinds=listed(kinds),
        limit=limit,
        held_out=held_out,
        floor=floor,
        align=align,
        uniform_width=uniform_width,
        ridge=ridge,
        batch_size=batch_size,
        window=window,
        stride=stride,
        dtype=dtype,
        broken=broken,
        seed=seed,
        memory_budget=memory_budget,
    )
    report_skipped(result.skipped)
    if result.reused:
        typer.echo(f"taken up from the interrupted run: {', '.join(result.reused)}")
    kept(result.plan.groups)
    before_and_after(result.table, f"Gained ({setting(result.model)})")
    which = "held-out images" if result.held_out else "calibration images: too few to hold any out"
    title = f"Kept, on {result.fidelity.images} {which}"
    show(title, ("", "cut"), fidelity_rows(result.fidelity.to_dict()))
    typer.echo(loadable(out))
