"""Parameters and buffers by dotted name, and modules whose attributes follow their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import AnatomyError


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def get_tensor(model: nn.Module, name: str) -> Tensor:
    module, leaf = owner_of(model, name)
    tensor = getattr(module, leaf, None)
    if not isinstance(tensor, Tensor):
        raise AnatomyError(f"the model has no parameter '{name}'; is this plan for another model?")
    return tensor


def set_tensor(model: nn.Module, name: str, value: Tensor | None) -> None:
    """Replace a parameter (kept a Parameter) or a buffer in place; tied names must each be set."""
    module, leaf = owner_of(model, name)
    old = getattr(module, leaf, None)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    elif value is None:
        module.register_parameter(leaf, None)
    else:
        grad = old.requires_grad if isinstance(old, Tensor) else True
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=grad and value.is_floating_point()))


def conv1d_like(module: nn.Module) -> bool:
    """transformers' `Conv1D`: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def sync_attributes(module: nn.Module) -> None:
    """Make the size attributes of a standard layer agree with its parameters.

    `groups` of a convolution must already be right.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        a, b = weight.shape[:2]  # type: ignore[union-attr]
        if module.transposed:
            module.in_channels, module.out_channels = a, b * module.groups
        else:
            module.out_channels, module.in_channels = a, b * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif conv1d_like(module):
        module.nx, module.nf = weight.shape  # type: ignore[union-attr]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.GroupNorm) and weight is not None and weight.numel() != module.num_channels:
        scaled = module.num_groups * weight.numel()
        if module.num_groups > 1:
            module.num_groups = scaled // module.num_channels
        module.num_channels = weight.numel()
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sizes = [t for t in (module.weight, module.running_mean) if t is not None]
        if sizes:
            module.num_features = sizes[0].numel()
    elif isinstance(weight, Tensor) and isinstance(
        getattr(module, "normalized_shape", None), (tuple, list, torch.Size)
    ):
        module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
