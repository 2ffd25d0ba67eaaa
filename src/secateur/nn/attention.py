"""`nn.MultiheadAttention`, spelled out so that its heads can be seen and removed.

The stock module hands its weights to one fused function: no hook ever fires on its `out_proj`, and its head size is
always width / heads. `HeadwiseAttention` has the same parameters under the same names, calls `out_proj` as a module,
and keeps its head size when heads go.

Shapes: B batch, L queries, S keys, H heads, D head size, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadwiseAttention(nn.MultiheadAttention):
    """Drop-in for a batch of queries, keys and values; parameters and outputs are those of the parent class."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, so that `nn.TransformerEncoderLayer` does not hand cut weights to its fused kernel."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        same = query is key and key is value
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q_BHLD, k_BHSD, v_BHSD = (self._heads(t) for t in self._project(query, key, value, same))
        mask = _additive_mask(q_BHLD, attn_mask, key_padding_mask)
        weights_BHLS = None
        if need_weights:
            scores = q_BHLD @ k_BHSD.transpose(-2, -1) * self.head_dim**-0.5
            weights_BHLS = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights_BHLS, self.dropout, self.training) @ v_BHSD
        else:
            out = F.scaled_dot_product_attention(
                q_BHLD, k_BHSD, v_BHSD, mask, self.dropout if self.training else 0.0, scale=self.head_dim**-0.5
            )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights_BHLS is not None and average_attn_weights:
            weights_BHLS = weights_BHLS.mean(1)
        if unbatched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights_BHLS = None if weights_BHLS is None else weights_BHLS.squeeze(0)
        return out, weights_BHLS

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        if same and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _additive_mask(q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    mask = None
    for part in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, float("-inf"))
        if part.dim() == 3:  # [B * H, L, S]
            part = part.unflatten(0, (q.shape[0], -1))
        mask = part if mask is None else mask + part
    return mask


def can_spell_out(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """A plain attention module, without the extra key and value rows that few models use."""
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


@contextmanager
def explicit_attention(model: nn.Module) -> Iterator[None]:
    """Within the context, every plain `nn.MultiheadAttention` of the model runs as `HeadwiseAttention`."""
    swapped = [m for m in model.modules() if can_spell_out(m)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in swapped:
        module.__class__ = HeadwiseAttention
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in swapped:
            if module.num_heads * module.head_dim == module.embed_dim:
                module.__class__ = nn.MultiheadAttention
