"""`secateur plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import ImageSize, Model, Random, Seed, Weights, model_options


def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write, e.g. plan.json.")],
    statistics: Annotated[
        Path | None, typer.Option(help="Written by `secateur calibrate`; some criteria need none.")
    ] = None,
    keep_params: Annotated[float | None, typer.Option(help="Share of the parameters to keep.")] = None,
    keep_macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep.")] = None,
    criterion: Annotated[str, typer.Option(help="How units are scored.")] = "obs",
    allocator: Annotated[str, typer.Option(help="How the cut is shared out.")] = "curve",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the allocator, e.g. tolerance=0.01.")] = None,
    kinds: Annotated[str | None, typer.Option(help="Cut only these kinds, e.g. hidden,heads.")] = None,
    floor: Annotated[float, typer.Option(min=0, max=0.99, help="Least share of every group to keep.")] = 0.1,
    align: Annotated[int, typer.Option(min=1, help="Kept widths are multiples of this.")] = 8,
    uniform_width: Annotated[bool, typer.Option("--uniform-width", help="Equal widths in all layers.")] = False,
    images: Annotated[Path | None, typer.Option(help="Images, for allocators that measure (amp-bisect).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most so many of them.")] = 512,
    seed: Seed = 0,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
) -> None:
    """Score units and share a budget out over the layers; nothing is cut yet.

    [bold]Examples[/bold]

      secateur plan timm/vit_base_patch14_dinov2.lvd142m --statistics s.safetensors --keep-params 0.6 --out plan.json
      secateur plan timm/deit_tiny_patch16_224 --criterion dgmr --allocator uniform --keep-macs 0.5 --out plan.json
    """
    from secateur import Budget, Statistics, allocate, batches, inspect, load_model, score, source_of
    from secateur.cli.tables import show

    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    given = {k: v for k, v in (("params", keep_params), ("macs", keep_macs)) if v is not None}
    budget = Budget(**given)
    anatomy = inspect(loaded)
    sums = None if statistics is None else Statistics.load(statistics)
    scores = score(sums, criterion, model=loaded, anatomy=anatomy, seed=seed)
    data = None if images is None else batches(images, source_of(loaded).image, limit=limit, seed=seed)
    made = allocate(
        scores,
        budget,
        allocator,
        anatomy=anatomy,
        kinds=kinds.split(",") if kinds else None,
        floor=floor,
        align=align,
        uniform_width=uniform_width,
        model=loaded,
        data=data,
        model_name=source_of(loaded).name,
        **_options(option or []),
    )
    made.save(out)
    show(
        "Kept",
        ("group", "units", "kept", "share"),
        [(n, str(g.size), str(len(g.keep)), f"{len(g.keep) / g.size:.1%}") for n, g in made.groups.items()],
    )
    p = made.predicted
    typer.echo(
        f"parameters {p['params'] / p['dense_params']:.1%}, MACs {p['macs'] / p['dense_macs']:.1%} of the dense "
        f"model; written to {out}"
    )


def _options(pairs: list[str]) -> dict[str, Any]:
    from secateur.errors import BudgetError

    out: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise BudgetError(f"--option takes NAME=VALUE, found '{pair}'")
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = value
    return out
