"""Perplexity of a causal language model, per token and per word, with the window and stride it was measured with.

Shapes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data import Batches
from secateur.errors import DataError, SecateurError
from secateur.models import TextSpec, features
from secateur.models.text import tokenizer
from secateur.progress import track


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        token: exp of the mean negative log-likelihood per predicted token; depends on the tokenizer.
        word: exp of the summed negative log-likelihood over the number of words (as split at white space) of the
            predicted tokens: comparable between tokenizers; None without a tokenizer.
        tokens: number of predicted tokens.
        windows, window: how many windows of how many tokens; each is predicted from its own beginning.
        stride: at most so many tokens at the end of each window are counted.
    """

    token: float
    word: float | None
    tokens: int
    windows: int
    window: int
    stride: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def perplexity(model: nn.Module, data: Batches, stride: int | None = None) -> Perplexity:
    """Perplexity over windows of text.

    Args:
        model: a causal language model, in eval mode.
        data: windows of token ids, all of one length.
        stride: count only the last so many tokens of every window (as when windows overlap); all by default, but the
            first, which nothing predicts.

    Raises:
        DataError: the data are no text, or the model predicts no tokens.
    """
    device = next(model.parameters()).device
    total, tokens, words, windows, window = 0.0, 0, 0, 0, 0
    tool = _tool(data)
    for ids_BT in track(data, "Reading text", len(data)):
        if ids_BT.is_floating_point() or ids_BT.dim() != 2:
            raise DataError("perplexity is of text: give batches of token ids")
        ids_BT = ids_BT.to(device)
        window = ids_BT.shape[1]
        counted = min(stride or window, window - 1)
        logits = features(model, ids_BT).logits
        if logits is None or logits.dim() != 3:
            raise DataError(f"{type(model).__name__} predicts no tokens; perplexity needs a causal language model")
        total += _loss(logits[:, -counted - 1 : -1], ids_BT[:, -counted:])
        tokens, windows = tokens + ids_BT.shape[0] * counted, windows + ids_BT.shape[0]
        words += 0 if tool is None else sum(len(t.split()) for t in tool.batch_decode(ids_BT[:, -counted:]))
    if not tokens:
        raise DataError("no window of text could be read")
    word = math.exp(min(total / words, 700)) if words else None
    return Perplexity(math.exp(min(total / tokens, 700)), word, tokens, windows, window, min(stride or window, window))


def _loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Summed negative log-likelihood, a window at a time: logits of all in float32 would not fit."""
    return sum(float(F.cross_entropy(x.float(), y, reduction="sum")) for x, y in zip(logits_BTV, ids_BT, strict=True))


def _tool(data: Batches) -> Any:
    if not isinstance(data.spec, TextSpec) or not data.spec.tokenizer:
        return None
    try:
        return tokenizer(data.spec)
    except SecateurError:
        return None
