"""secateur.json: where a saved model came from, what its structure is, and what its files must hash to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from secateur.errors import ArtifactError
from secateur.files import sha256
from secateur.models import Source

FORMAT = 1
NAME = "secateur.json"


class About(BaseModel):
    """The contents of secateur.json.

    Attributes:
        format: version of this file's format.
        source: of the dense model.
        recipe: structural changes, see `secateur.surgery.Recipe`.
        tied: names of parameters that share the tensor of another name.
        buffers: floating-point type of buffers that the library computes by itself.
        sha256: of the files beside.
        figures: measurements.
    """

    format: int = FORMAT
    source: Source
    recipe: dict[str, Any] = Field(default_factory=dict)
    tied: dict[str, str] = Field(default_factory=dict)
    buffers: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str]
    figures: dict[str, Any] = Field(default_factory=dict)

    def write(self, folder: Path) -> None:
        data = {**dict(self), "source": self.source.to_dict()}
        (folder / NAME).write_text(to_json(data), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> About:
        """Read and check.

        Raises:
            ArtifactError: missing, not JSON, of a newer format, or with fields that make no sense.
        """
        file = folder / NAME
        if not file.is_file():
            raise ArtifactError(f"'{folder}' holds no {NAME}; give a folder that Secateur wrote")
        try:
            data = from_json(file.read_bytes())
        except (ValueError, OSError) as e:
            raise ArtifactError(f"'{file}' is not valid JSON ({e}); copy the folder again") from e
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise ArtifactError(f"'{file}' has no format number; it was not written by Secateur")
        if version > FORMAT:
            raise ArtifactError(f"'{file}' has format {version}, this Secateur reads up to {FORMAT}; upgrade Secateur")
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            first = e.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"'{file}' is damaged at '{at}': {first['msg']}; copy the folder again") from e

    def check(self, folder: Path, name: str) -> Path:
        """The file of that name, if it is the one that was saved.

        Raises:
            ArtifactError: it is missing, damaged, or another one.
        """
        file = folder / name
        if name not in self.sha256:
            raise ArtifactError(f"'{folder / NAME}' does not say what '{name}' hashes to; copy the folder again")
        if not file.is_file():
            raise ArtifactError(f"'{file}' is missing; copy the folder again")
        if sha256(file) != self.sha256[name]:
            raise ArtifactError(
                f"'{file}' is damaged or another model's (its sha256 is not the one in {NAME}); copy the folder again"
            )
        return file


def to_json(data: Any) -> str:
    """JSON text; numbers that JSON does not know (NaN, infinity) become null.

    Raises:
        ArtifactError: something in it is no data.
    """
    try:
        return json.dumps(_finite(data), indent=1, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"only plain data can be saved with a model ({e}); check figures=") from e


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
