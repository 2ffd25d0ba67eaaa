"""`secateur plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    IMAGES,
    METHOD,
    Align,
    Allocator,
    Criterion,
    Floor,
    ImageSize,
    KeepMacs,
    KeepParams,
    Kinds,
    Model,
    Random,
    Seed,
    Stride,
    Uniform,
    Weights,
    Window,
    listed,
    model_options,
)


def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write, e.g. plan.json.")],
    statistics: Annotated[
        Path | None, typer.Option(help="Written by `secateur calibrate`; some criteria need none.")
    ] = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    kinds: Kinds = None,
    floor: Floor = 0.1,
    align: Align = 8,
    uniform_width: Uniform = False,
    criterion: Criterion = None,
    allocator: Allocator = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the allocator, e.g. tolerance=0.01.", rich_help_panel=METHOD),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", "--text", help="For allocators that measure (amp-bisect).", rich_help_panel=IMAGES),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most so many of them.", rich_help_panel=IMAGES)] = 512,
    window: Window = 256,
    stride: Stride = None,
    seed: Seed = 0,
    everything: Annotated[bool, typer.Option("--all", help="List every group, not one line for equal ones.")] = False,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    r"""Decide which units stay under a budget; nothing is cut yet.

    [bold]Examples[/bold]

    secateur plan timm/vit_base_patch14_dinov2.lvd142m \
        --statistics s.safetensors --keep-params 0.6 --out plan.json
    secateur plan timm/deit_tiny_patch16_224 --criterion dgmr \
        --allocator uniform --keep-macs 0.5 --out plan.json
    """
    from secateur import Budget, Statistics, allocate, batches, inspect, load_model, score, source_of
    from secateur.allocation import allocators
    from secateur.cli import tables
    from secateur.criteria import criteria
    from secateur.errors import DataError
    from secateur.files import check_writable
    from secateur.result import Settings

    budget = Budget(**{k: v for k, v in (("params", keep_params), ("macs", keep_macs)) if v is not None})
    chosen = Settings.of(kinds=listed(kinds), criterion=criterion, allocator=allocator)
    criterion, allocator = chosen.criterion, chosen.allocator
    criteria.get(criterion)
    if allocators.get(allocator).measures and images is None:
        raise DataError(f"allocator '{allocator}' measures the model: give --images")
    check_writable(out, file=True)
    options = _options(option or [])
    sums = None if statistics is None else Statistics.load(statistics)
    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    anatomy = inspect(loaded)
    scores = score(sums, criterion, model=loaded, anatomy=anatomy, seed=seed)
    read: dict[str, Any] = {"limit": limit, "seed": seed, "window": window, "stride": stride}
    data = None if images is None else batches(images, source_of(loaded).input, **read)
    made = allocate(
        scores,
        budget,
        allocator,
        anatomy=anatomy,
        kinds=listed(kinds),
        floor=floor,
        align=align,
        uniform_width=uniform_width,
        model=loaded,
        data=data,
        model_name=source_of(loaded).name,
        **options,
    )
    made.save(out)
    tables.kept(made.groups, everything)
    p = made.predicted
    typer.echo(
        f"parameters {p['params'] / p['dense_params']:.1%}, MACs {p['macs'] / p['dense_macs']:.1%} of the dense model\n"
        f"written to {out}; apply it with secateur prune --plan {out}"
    )


def _options(pairs: list[str]) -> dict[str, Any]:
    from secateur.errors import BudgetError

    out: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise BudgetError(f"--option takes NAME=VALUE, found '{pair}'")
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = value
    return out
