"""A config as one module sees it.

Layers share one config, and some read sizes from it at every call (`self.config.num_attention_heads * self.head_dim`).
Where one layer loses units and the next does not, each must see its own number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

PREFIX = "config."


class LocalConfig:
    """Sizes of a module's own; everything else is read from, and written to, the config that all modules share."""

    def __init__(self, shared: Any) -> None:
        self.__dict__.update(shared=shared, own={})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def shared_config(module: nn.Module) -> Any:
    """The config that a module shares with others; None if it has none."""
    config = getattr(module, "config", None)
    return config.shared if isinstance(config, LocalConfig) else config


def get_size(module: nn.Module, attribute: str) -> Any:
    """An attribute of a module, or, as "config.<name>", of its config.

    Raises:
        AttributeError: there is none.
    """
    if attribute.startswith(PREFIX):
        return getattr(module.config, attribute.removeprefix(PREFIX))
    return getattr(module, attribute)


def set_size(module: nn.Module, attribute: str, value: Any) -> None:
    """Set what `get_size` reads, for this module alone."""
    if attribute.startswith(PREFIX):
        if not isinstance(module.config, LocalConfig):
            module.config = LocalConfig(module.config)  # type: ignore[assignment]
        module.config.own[attribute.removeprefix(PREFIX)] = value  # type: ignore[union-attr,operator,index]
    else:
        setattr(module, attribute, value)


def own_sizes(module: nn.Module) -> dict[str, Any]:
    """What a module's config says of this module alone, by the names that `set_size` takes."""
    config = getattr(module, "config", None)
    return {PREFIX + k: v for k, v in config.own.items()} if isinstance(config, LocalConfig) else {}
