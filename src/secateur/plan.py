"""A Plan: which units of which group are kept, of which model, chosen by what, under what budget. Pure data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from secateur.errors import BudgetError, PlanError

VERSION = 1


class Budget(BaseModel):
    """How much may be kept; give one.

    Attributes:
        params: share of the model's parameters.
        macs: share of its multiply-accumulates.
        quality: lowest acceptable fidelity (CLS cosine to the dense model on held-out images).

    Raises:
        BudgetError: none or several are given, or one is not a share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    params: float | None = None
    macs: float | None = None
    quality: float | None = None

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as e:
            given = ", ".join(f"{k}={v!r}" for k, v in data.items() if v is not None) or "nothing"
            raise BudgetError(f"bad budget ({given}): {_first(e)}") from e

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = {k: v for k in ("params", "macs", "quality") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError("give exactly one of params, macs and quality, for example params=0.75")
        ((name, value),) = given.items()
        if not 0 < value <= 1:
            hint = f"; for {value:g} percent give {value / 100:g}" if 2 <= value <= 100 else ""
            raise ValueError(f"{name} is the share to keep, above 0 and at most 1{hint}")
        return self

    @property
    def kind(self) -> str:
        return next(k for k in ("params", "macs", "quality") if getattr(self, k) is not None)

    @property
    def share(self) -> float:
        return float(getattr(self, self.kind))


class Kept(BaseModel):
    """What one group keeps.

    Attributes:
        kind: of the group.
        size: units in the dense model.
        keep: indices of the units that stay, ascending.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    size: Annotated[int, Field(ge=1)]
    keep: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _ordered(self) -> Kept:
        if not self.keep:
            raise ValueError("a group must keep at least one unit")
        if any(b <= a for a, b in zip(self.keep, self.keep[1:], strict=False)) or self.keep[-1] >= self.size:
            raise ValueError(f"kept units must be ascending, distinct and below {self.size}")
        return self


class Plan(BaseModel):
    """A complete decision, independent of how it will be applied.

    Attributes:
        version: of this format.
        model: name and fingerprint of the dense model.
        groups: by group name; groups not named stay whole.
        made_by: criterion, allocator and their settings, JSON-able.
        budget: what was asked for.
        predicted: dense and remaining parameters and multiply-accumulates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = VERSION
    model: dict[str, str] = Field(default_factory=dict)
    groups: dict[str, Kept] = Field(default_factory=dict)
    made_by: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, FiniteFloat] = Field(default_factory=dict)
    predicted: dict[str, FiniteFloat] = Field(default_factory=dict)

    @field_validator("made_by")
    @classmethod
    def _jsonable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except TypeError as e:
            raise ValueError(str(e)) from e
        return value

    def kept(self) -> dict[str, int]:
        """Units kept, by group."""
        return {name: len(group.keep) for name, group in self.groups.items()}

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse and check.

        Raises:
            PlanError: not JSON, a newer version, or fields that make no sense.
        """
        try:
            data = from_json(text, allow_inf_nan=False)
        except (ValueError, TypeError) as e:  # TypeError: text that is no Unicode
            raise PlanError(f"{where} is not valid JSON ({e}); is the file complete?") from e
        if not isinstance(data, dict):
            raise PlanError(f"{where} holds a {type(data).__name__}, expected an object with 'groups'")
        version = data.get("version", VERSION)
        if type(version) is not int or version < 1:
            raise PlanError(f"{where} has no format version that makes sense; was it written by Secateur?")
        if version > VERSION:
            raise PlanError(
                f"{where} has format version {version}, this Secateur reads up to {VERSION}; upgrade Secateur"
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as e:
            raise PlanError(f"{where} is damaged {_first(e)}; make the plan again") from e

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all.

        Raises:
            ArtifactError: it cannot be written.
        """
        from secateur.files import atomic_file

        with atomic_file(Path(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: the file is missing, unreadable, damaged or of a newer version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as e:
            raise PlanError(f"'{path}' does not exist; write a plan with `secateur plan`") from e
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(f"'{path}' cannot be read as a plan: {e}") from e
        return cls.from_json(text, f"'{path}'")


def _first(error: ValidationError) -> str:
    """The first complaint, in plain words, with its place."""
    first = error.errors()[0]
    at = ".".join(str(x) for x in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"at '{at}': {message}" if at else message
