"""transformers keeps several implementations of attention and of packed experts; the config chooses.

A cut must hold in all of them: an attribute that one never reads (`num_key_value_groups` under a fused kernel) decides
in another. So models are traced, and cuts proved, in plain code as well as in the code that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.nn.localconfig import shared_config

_ATTENTION, _EXPERTS = "_attn_implementation_internal", "_experts_implementation_internal"

CHOSEN: Mapping[str, str] = {}
# Spelled out: every size that a module's code names is named.
PLAIN: Mapping[str, str] = {_ATTENTION: "eager", _EXPERTS: "eager"}
# Without a loop over the experts that the data chose: every expert's weights are read, whatever the input.
TRACED: Mapping[str, str] = {_ATTENTION: "eager", _EXPERTS: "grouped_mm"}


@contextmanager
def implementation(model: nn.Module, choice: Mapping[str, str]) -> Iterator[None]:
    """Within the context, modules whose config chooses an implementation run another one; configs end as they were."""
    configs = {id(c): c for c in map(shared_config, model.modules()) if c is not None}
    before: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        for name, value in choice.items():
            held = getattr(config, "__dict__", {}).get(name)
            if isinstance(held, str) and held != value:
                before.append((config, name, held))
                setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, held in before:
            setattr(config, name, held)


def has_other(model: nn.Module, choice: Mapping[str, str] = PLAIN) -> bool:
    """Whether the model runs anything else than this choice."""
    held = (getattr(c, "__dict__", {}) for c in map(shared_config, model.modules()))
    return any(h.get(name) not in (None, value) for h in held for name, value in choice.items())
