"""`secateur inspect`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import ImageSize, Model, Random, Weights, model_options

if TYPE_CHECKING:
    from secateur.anatomy import Anatomy, PrunableGroup


def inspect(
    model: Model,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
    everything: Annotated[bool, typer.Option("--all", help="List every group, not one line for equal ones.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What can be cut, what it costs, and what cannot be cut and why.

    [bold]Examples[/bold]

    secateur inspect timm/vit_base_patch14_dinov2.lvd142m
    secateur inspect timm/swin_tiny_patch4_window7_224 --random-weights --all
    secateur inspect small/ --json
    """
    from secateur import inspect as find
    from secateur import load_model
    from secateur.cli.tables import label, merged, pattern, scaled, show

    anatomy = find(load_model(model, **model_options(weights, image_size, random_weights)))
    if json_:
        _json(anatomy)
        return
    typer.echo(
        f"{model}: {scaled(anatomy.params)} parameters, {scaled(anatomy.macs)} MACs per image of "
        f"{' x '.join(map(str, anatomy.input_shape))}\n"
    )
    rows: list[tuple[str, ...]] = []
    stacks: list[tuple[str, ...]] = []
    rest: dict[str, list[str]] = {}
    for groups in merged(anatomy.groups.values(), everything):
        first, name = groups[0], label([g.name for g in groups])
        if not first.cuttable:
            rest.setdefault(pattern(first.reason), []).append(f"{name}: {first.size} units")
            continue
        params, macs = (sum(getattr(g, what) * g.size for g in groups) for what in ("unit_params", "unit_macs"))
        shares = f"{params / anatomy.params:.1%}", f"{macs / max(anatomy.macs, 1):.1%}"
        if first.stack is not None:
            stacks.append((name, str(first.size), *shares, "; ".join(f"{i}: {why}" for i, why in first.fixed.items())))
        else:
            rows.append((name, str(first.size), *shares, _note(first)))
    show("Can be cut", *_filled(["group", "units", "params", "MACs", "note"], rows))
    whole = _filled(["stack", "blocks", "params", "MACs", "must stay"], stacks)
    show("Can be removed whole, with --kinds blocks", *whole)
    if rest:
        typer.secho("Cannot be cut", bold=True)
    for reason, names in rest.items():
        typer.echo(textwrap.fill(f"{reason}:", 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
        typer.echo("\n".join(f"    {name}" for name in names))
    none = 1 - anatomy.params_after(dict.fromkeys(anatomy.cuttable, 0)) / anatomy.params
    typer.echo(f"\n{none:.1%} of the parameters belong to units that can be cut.")


def _filled(columns: list[str], rows: list[tuple[str, ...]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The table, without the last column where it is empty."""
    return (columns, rows) if any(row[-1] for row in rows) else (columns[:-1], [row[:-1] for row in rows])


def _note(group: PrunableGroup) -> str:
    if group.norm:
        return f"norm over the units at {group.norm}: its statistics change with the cut"
    return "forward rewritten to allow it" if group.rewritten else ""


def _json(anatomy: Anatomy) -> None:
    import json

    groups = [
        {
            "name": g.name,
            "kind": str(g.kind),
            "units": g.size,
            "unit_params": g.unit_params,
            "unit_macs": g.unit_macs,
            "cuttable": g.cuttable,
            "reason": g.reason,
        }
        for g in anatomy.groups.values()
    ]
    typer.echo(json.dumps({"params": anatomy.params, "macs": anatomy.macs, "groups": groups}, indent=1))
