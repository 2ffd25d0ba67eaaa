"""Memory that a large language model takes: cut block by block from its files, and scored by gradients in memory.

    python benchmarks/memory.py                     # 3B parameters, 13 GB of disk, half an hour on two cores
    python benchmarks/memory.py --small             # a tenth of it, for trying out; writes nothing

A LLaMA of random bfloat16 weights is written to a temporary folder, a file at a time; then each measurement runs in a
process of its own, and the system says how much memory it held at most, mapped files included. Writes its section of
docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from _real import markdown, setting, write_section
from secateur._compat import ensure_torchvision

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
LARGE = {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192, "num_attention_heads": 24}
SMALL = {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 4096, "num_attention_heads": 16}
HEADS, VOCABULARY = 8, 128256
WINDOWS, HELD_OUT, WINDOW, KEEP = 8, 2, 128, 0.8
BUDGET, SHARE = 6e9, 1.6  # the bars: bytes, and times the weights


def write_model(folder: Path, shape: dict[str, int]) -> int:
    """A LLaMA of random weights, never in memory as a whole; its number of parameters."""
    ensure_torchvision()
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(f"layer-{parts[2]}" if "layers" in parts else "rest", []).append(name)
    torch.manual_seed(0)
    where = {}
    for file, names in files.items():
        tensors = {}
        for name in names:
            plain = len(shapes[name]) == 1  # a norm
            tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            tensors[name] = tensors[name] if plain else tensors[name].normal_(0, 0.02)
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(names, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(s.numel() for s in shapes.values())


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (WINDOWS + HELD_OUT, WINDOW), generator=torch.Generator().manual_seed(0))


def streamed(folder: Path) -> dict[str, Any]:
    """Calibrate, cut a fifth, refit and write, block by block."""
    result = sc.compress(
        folder,
        tokens(),
        keep_params=KEEP,
        criterion="variance",
        allocator="uniform",
        compensator="affine",
        limit=WINDOWS,
        held_out=HELD_OUT,
        window=WINDOW,
        batch_size=1,
        memory_budget=f"{BUDGET / 1e9:g}GB",
        out=folder / "cut",
    )
    return {"params": result.table[0][3], "quality": result.fidelity.quality}


def scored(folder: Path) -> dict[str, Any]:
    """HFPrune's scores: entropy of the prediction, absolute activation times gradient at every token."""
    model = sc.load_model(folder)
    anatomy = sc.inspect(model)
    options = {"batch_size": 1, "limit": WINDOWS, "window": WINDOW, "checkpointing": True, "covariance": False}
    statistics = sc.calibrate(model, tokens(), anatomy, loss="logits-entropy", weighting=None, **options)
    scores = sc.score(statistics, "hfprune")
    return {"groups": len(scores.values)}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {"streamed": streamed, "scored": scored}


def _apart(stage: str, folder: Path) -> dict[str, Any]:
    """A stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(stage, found, flush=True)
    return found


def measure(shape: dict[str, int], scratch: Path) -> str:
    """The table."""
    folder = scratch / "llama"
    params = write_model(folder, shape)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{params / 1e9:.2f} B parameters, {weights / 1e9:.2f} GB", flush=True)
    found = {stage: _apart(stage, folder) for stage in STAGES}
    bars = {"streamed": BUDGET, "scored": SHARE * weights}
    jobs = {
        "streamed": f"calibrated, {1 - KEEP:.0%} cut by `variance`, refit by `affine`, compared and written, by blocks",
        "scored": "loaded, and scored by the entropy-Taylor of HFPrune with checkpointing",
    }
    rows = [
        [
            jobs[stage],
            f"{values['peak'] / 1e9:.2f}",
            f"{bars[stage] / 1e9:.2f}",
            f"{values['peak'] / weights:.2f}",
            f"{values['seconds']:.0f}",
        ]
        for stage, values in found.items()
    ]
    columns = ["", "peak memory, GB", "bar, GB", "of the weights", "seconds"]
    return (
        f"{markdown(columns, rows)}\n\nA LLaMA of {params / 1e9:.2f} B random parameters, {weights / 1e9:.2f} GB in "
        f"bfloat16, on {WINDOWS} windows of {WINDOW} random tokens, one a batch: enough to see the memory, not to "
        f"calibrate. Peaks are resident memory as the system counts it, mapped files, Python and torch included. "
        f"{setting().replace('float32', 'bfloat16')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tenth of the model; nothing is written")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        start = time.perf_counter()
        found = STAGES[options.stage](options.folder)
        found["seconds"] = time.perf_counter() - start
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        need = 2e9 if options.small else 14e9
        if shutil.disk_usage(name).free < need:
            raise SystemExit(f"{need / 1e9:.0f} GB of disk are needed in {name}; set TMPDIR to a larger disk")
        text = measure(SMALL if options.small else LARGE, Path(name))
    print(text)
    if not options.small:
        write_section(PAGE, "memory", text)


if __name__ == "__main__":
    main()
