"""`secateur inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import ImageSize, Model, Random, Weights, model_options


def inspect(
    model: Model,
    weights: Weights = None,
    image_size: ImageSize = None,
    random_weights: Random = False,
    everything: Annotated[bool, typer.Option("--all", help="List every group, not one line for equal ones.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model is made of: what can be cut, what it costs, and what cannot be cut and why.

    [bold]Examples[/bold]

      secateur inspect timm/vit_base_patch14_dinov2.lvd142m
      secateur inspect timm/swin_tiny_patch4_window7_224 --random-weights --all
    """
    from secateur import inspect as find
    from secateur import load_model
    from secateur.cli.tables import show

    loaded = load_model(model, **model_options(weights, image_size, random_weights))
    anatomy = find(loaded)
    if json_:
        _json(anatomy)
        return
    typer.echo(
        f"{model}: {anatomy.params / 1e6:.2f} M parameters, {anatomy.macs / 1e9:.2f} G MACs per image "
        f"({' x '.join(map(str, anatomy.input_shape))})"
    )
    cut, rest = [], []
    for names, group in merge(anatomy, everything):
        params = sum(anatomy.groups[n].unit_params * group.size for n in names)
        macs = sum(anatomy.groups[n].unit_macs * group.size for n in names)
        row = (
            label(names),
            str(group.kind),
            str(group.size),
            f"{params / anatomy.params:.1%}",
            f"{macs / max(anatomy.macs, 1):.1%}",
        )
        if group.cuttable:
            cut.append((*row, _notes(group)))
        else:
            rest.append((*row, group.reason))
    columns = ("group", "units are", "units", "parameters", "MACs")
    show("Can be cut", (*columns, "note"), cut)
    show("Cannot be cut", (*columns, "why"), rest)
    none = 1 - anatomy.params_after(dict.fromkeys(anatomy.cuttable, 0)) / anatomy.params
    typer.echo(f"{none:.1%} of the parameters belong to units that can be cut.")


def _notes(group) -> str:
    if group.norm:
        return f"norm over the units at {group.norm}: its statistics change with the cut"
    return "forward rewritten to allow it" if group.rewritten else ""


def merge(anatomy, everything: bool):
    """Groups, those alike in all but their block's number together: [(names, the first of them)]."""
    import re

    alike: dict[tuple, list[str]] = {}
    for name, group in anatomy.groups.items():
        pattern = name if everything else re.sub(r"\.\d+", ".*", name)
        reason = re.sub(r"\d+", "#", group.reason)
        alike.setdefault((pattern, group.kind, group.size, reason), []).append(name)
    return [(names, anatomy.groups[names[0]]) for names in alike.values()]


def label(names: list[str]) -> str:
    """One name, or a pattern with the number of groups it stands for."""
    import re

    first = names[0].removeprefix(":")
    return first if len(names) == 1 else f"{re.sub(r'[.]([0-9]+)', '.*', first)}  (x {len(names)})"


def _json(anatomy) -> None:
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
