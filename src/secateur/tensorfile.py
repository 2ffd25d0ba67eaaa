"""Files of named tensors with a JSON header, as calibration and scoring write them: safetensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from secateur.errors import ArtifactError
from secateur.files import atomic_file

T = TypeVar("T")
VERSION = 1


def write_tensors(path: str | Path, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file; atomic. `what` says what is in it ("scores")."""
    from safetensors.torch import save_file

    text = json.dumps({"version": VERSION, **header})
    with atomic_file(Path(path)) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={f"secateur_{what}": text})


def read_tensors(path: str | Path, what: str, make: Callable[[dict[str, Any], dict[str, Tensor]], T], remedy: str) -> T:
    """What `make` makes of the header and the tensors of a file.

    Raises:
        ArtifactError: the file is missing, damaged, or something else; `remedy` ends the message.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[f"secateur_{what}"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("version") != VERSION:
            raise ValueError("another version")
        return make(header, tensors)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as e:
        raise ArtifactError(f"'{path}' is not a readable {what} file ({type(e).__name__}); {remedy}") from e
