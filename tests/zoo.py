"""Small networks, one for every way in which units of a hidden dimension can be told apart, or cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN, HEADS, HEAD = 16, 12, 4, 6


class Stack(nn.Module):
    """Stem, two residual blocks, head."""

    def __init__(self, block: Callable[[], nn.Module], stem: nn.Module, norm: Callable[[], nn.Module], head: nn.Module):
        super().__init__()
        self.stem, self.head = stem, head
        self.blocks = nn.ModuleList(Residual(norm(), block()) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, norm, inner):
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


def on_tokens(block: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    """A network on 9 tokens of 5 numbers."""
    net = Stack(block, nn.Linear(5, WIDTH), lambda: nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    return net, torch.randn(2, 9, 5)


def on_images(block: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    """A network on images of 8 x 8 pixels."""
    net = Stack(block, nn.Conv2d(3, WIDTH, 1), lambda: nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 3, 1))
    return net, torch.randn(2, 3, 8, 8)


class Glu(nn.Module):
    """A gated MLP, its two producers packed into one or apart, with or without a norm over the hidden dimension."""

    def __init__(self, packed: bool, norm: bool):
        super().__init__()
        self.packed = packed
        self.fc1 = nn.Linear(WIDTH, 2 * HIDDEN) if packed else nn.Linear(WIDTH, HIDDEN)
        self.gate = None if packed else nn.Linear(WIDTH, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN) if norm else nn.Identity()
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1) if self.packed else (self.gate(x), self.fc1(x))
        return self.fc2(self.norm(F.silu(gate) * value))


class Attention(nn.Module):
    """Attention, plainly written.

    Args:
        fused: one projection for queries, keys and values.
        kv: number of key/value heads.
        norms: a norm over each head's queries and keys.
        by_width: reshape by the input's width, as many libraries do.
    """

    def __init__(self, fused=False, kv=HEADS, norms=False, by_width=False, expand=False):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.by_width, self.expand = HEADS, kv, by_width, expand
        self.head_dim = WIDTH // HEADS if by_width else HEAD
        inner = HEADS * self.head_dim
        self.qkv = nn.Linear(WIDTH, 3 * inner) if fused else None
        if not fused:
            self.q, self.k, self.v = (nn.Linear(WIDTH, n * self.head_dim) for n in (HEADS, kv, kv))
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if norms else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(inner, WIDTH)

    def split(self, x):
        b, n, c = x.shape
        if self.qkv is None:
            q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = (f(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
            return q, self.shared(k), self.shared(v)
        size = c // self.num_heads if self.by_width else self.head_dim
        return self.qkv(x).reshape(b, n, 3, self.num_heads, size).permute(2, 0, 3, 1, 4).unbind(0)

    def shared(self, t):
        times = self.num_heads // self.num_kv_heads
        if times == 1:
            return t
        if self.expand:
            b, kv, n, d = t.shape
            return t[:, :, None].expand(b, kv, times, n, d).reshape(b, kv * times, n, d)
        return t.repeat_interleave(times, dim=1)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
        return self.proj(out.reshape(b, n, c) if self.by_width else out.flatten(2))


class Flat(Attention):
    """Heads are only ever seen as batch * heads."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, -1, self.head_dim).transpose(1, 2).reshape(b * self.num_heads, n, self.head_dim)
            for f in (self.q, self.k, self.v)
        )
        out = ((q @ k.mT).softmax(-1) @ v).view(b, -1, n, self.head_dim)
        return self.proj(out.transpose(1, 2).flatten(2))


class Asked(Attention):
    """Its position biases come from a module that is never called, only asked."""

    def __init__(self):
        super().__init__()
        self.positions = Positions()

    def forward(self, x):
        q, k, v = self.split(x)
        return self.proj(((q @ k.mT + self.positions.table()).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.weight = HEADS, nn.Parameter(torch.empty(9 * 9, HEADS))

    def table(self):
        return self.weight.view(9, 9, self.num_heads).permute(2, 0, 1)


class Telling(nn.Module):
    """Attention that returns its weights, which nobody reads, and keeps keys and values for a next call."""

    def __init__(self):
        super().__init__()
        self.attention = Remembering()

    def forward(self, x):
        return self.attention(x, past=[])[0]


class Remembering(Attention):
    def forward(self, x, past):
        q, k, v = self.split(x)
        past.append((k, v))
        k, v = (torch.cat(t, dim=2) for t in zip(*past, strict=True))
        weights = (q @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Stock(nn.Module):
    """`nn.MultiheadAttention` as self-attention."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Conv1dMlp(nn.Module):
    """GPT-2's MLP: weights stored [in, out]."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_fc, self.c_proj = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Functional(nn.Module):
    """Bare parameters and matrix products, no layers at all."""

    def __init__(self):
        super().__init__()
        self.up, self.shift = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(HIDDEN))
        self.down = nn.Parameter(torch.empty(HIDDEN, WIDTH))

    def forward(self, x):
        return torch.tanh(x @ self.up + self.shift) @ self.down


class Bottleneck(nn.Module):
    """1x1 to 8 channels, something in between, 1x1 back."""

    def __init__(self, *between: nn.Module):
        super().__init__()
        self.reduce, self.between, self.restore = (
            nn.Conv2d(WIDTH, 8, 1),
            nn.Sequential(*between),
            nn.Conv2d(8, WIDTH, 1),
        )

    def forward(self, x):
        return self.restore(self.between(self.reduce(x)))


class Blur(nn.Module):
    """A fixed filter, one copy a channel, as anti-aliased networks have."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("filter", torch.tensor([1.0, 2.0, 1.0]).repeat(channels, 1, 3, 1) / 12)

    def forward(self, x):
        return F.conv2d(x, self.filter, padding=1, groups=self.channels)


class Grn(nn.Module):
    """An MLP with global response normalisation: every unit is divided by the mean over all of them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.weight = (
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(HIDDEN, WIDTH),
            nn.Parameter(torch.ones(HIDDEN)),
        )

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        size = x.norm(dim=1, keepdim=True)
        return self.fc2(x + self.weight * x * size / size.mean(-1, keepdim=True))


class SpatialGate(nn.Module):
    """gMLP: half of the hidden units, normed over all of them, gate the other half."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.mix = nn.LayerNorm(HIDDEN), nn.Linear(9, 9)

    def forward(self, x):
        u, v = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(u * self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2))


class Ista(nn.Module):
    """One dictionary read both ways."""

    def __init__(self):
        super().__init__()
        self.dictionary = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x):
        back = F.linear(F.linear(x, self.dictionary), self.dictionary.t())
        return F.relu(x + 0.1 * (F.linear(x, self.dictionary.t()) - back))


class Around(nn.Module):
    """fc1, a function of the hidden units, fc2."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.fc1, self.function, self.fc2 = nn.Linear(WIDTH, HIDDEN), function, nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(self.function(self.fc1(x)))


class Standardised(nn.Conv2d):
    """A convolution whose filters are brought to mean 0 and variance 1."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class ByInputWidth(nn.Module):
    """Its output has another width than its input, but its code calls both C."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        b, n, c = x.shape
        return self.fc(x).transpose(1, 2).reshape(b, n * c).reshape(b, c, n).transpose(1, 2)


def swin(version: int) -> tuple[nn.Module, torch.Tensor]:
    """Windowed attention with a table of relative positions, or with an MLP that makes one (version 2)."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    cls = (SwinTransformer, SwinTransformerV2)[version - 1]
    net = cls(img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(4,), window_size=4, num_classes=3)
    return net, torch.randn(2, 3, 16, 16)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# What can be cut: how to make it, and the kinds of groups that every block has.
CUTTABLE: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], dict[str, int]]] = {
    "mlp": (lambda: on_tokens(mlp), {"hidden": 2}),
    "mlp of 1x1 convolutions": (
        lambda: on_images(lambda: chain(nn.Conv2d(WIDTH, 8, 1), nn.GELU(), nn.Conv2d(8, WIDTH, 1))),
        {"hidden": 2},
    ),
    "mlp of Conv1D": (lambda: on_tokens(Conv1dMlp), {"hidden": 2}),
    "mlp of bare parameters": (lambda: on_tokens(Functional), {"hidden": 2}),
    "packed glu": (lambda: on_tokens(lambda: Glu(True, False)), {"hidden": 2}),
    "packed glu, norm": (lambda: on_tokens(lambda: Glu(True, True)), {"hidden": 2}),
    "split glu": (lambda: on_tokens(lambda: Glu(False, False)), {"hidden": 2}),
    "split glu, norm": (lambda: on_tokens(lambda: Glu(False, True)), {"hidden": 2}),
    "mlp, some units addressed": (
        lambda: on_tokens(lambda: Around(lambda x: x * x[..., :3].amax(-1, True))),
        {"hidden": 2},
    ),
    "depthwise convolution, batch norms": (
        lambda: on_images(
            lambda: Bottleneck(nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8))
        ),
        {"channels": 2},
    ),
    "convolutions": (lambda: on_images(lambda: Bottleneck(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())), {"channels": 4}),
    "transposed convolutions": (
        lambda: on_images(lambda: Bottleneck(nn.ConvTranspose2d(8, 8, 3, 1, 1), nn.ReLU())),
        {"channels": 4},
    ),
    "grouped convolution": (
        lambda: on_images(lambda: Bottleneck(nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.ReLU())),
        {"channels": 6},
    ),
    "group norm": (
        lambda: on_images(lambda: Bottleneck(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())),
        {"channels": 4},
    ),
    "blur pool": (lambda: on_images(lambda: Bottleneck(nn.ReLU(), Blur(8))), {"channels": 2}),
    "fused qkv": (lambda: on_tokens(lambda: Attention(fused=True)), {"heads": 2}),
    "fused qkv, by input width": (lambda: on_tokens(lambda: Attention(fused=True, by_width=True)), {"heads": 2}),
    "separate q, k, v": (lambda: on_tokens(Attention), {"heads": 2}),
    "norms on queries and keys": (lambda: on_tokens(lambda: Attention(norms=True)), {"heads": 2}),
    "grouped key/value heads, repeated": (
        lambda: on_tokens(lambda: Attention(kv=2)),
        {"kv_groups": 2, "heads": 2},
    ),
    "grouped key/value heads, expanded": (
        lambda: on_tokens(lambda: Attention(kv=2, expand=True)),
        {"kv_groups": 2, "heads": 2},
    ),
    "batch times heads": (lambda: on_tokens(Flat), {"heads": 2}),
    "position biases of a module that is asked": (lambda: on_tokens(Asked), {"heads": 2}),
    "weights that nobody reads, a cache": (lambda: on_tokens(Telling), {"heads": 2}),
    "nn.MultiheadAttention": (lambda: on_tokens(lambda: Stock(False)), {"heads": 2}),
    "nn.MultiheadAttention with weights": (lambda: on_tokens(lambda: Stock(True)), {"heads": 2}),
    "nn.TransformerEncoderLayer": (lambda: on_tokens(encoder_layer), {"heads": 2, "hidden": 2}),
    "swin": (lambda: swin(1), {"heads": 2, "hidden": 2}),
    "swin v2": (lambda: swin(2), {"heads": 2, "hidden": 4}),
}

# What must be refused: how to make it, and what the reason must say.
REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], str]] = {
    "global response norm": (lambda: on_tokens(Grn), "couples all units"),
    "gMLP's gate": (lambda: on_tokens(SpatialGate), "couples all units"),
    "tied dictionary": (lambda: on_tokens(Ista), "tied dictionary"),
    "scale of the width": (lambda: on_tokens(lambda: Around(lambda x: x * x.shape[-1] ** -0.5)), "cannot run with"),
    "softmax over units": (lambda: on_tokens(lambda: Around(lambda x: x.softmax(-1))), "softmax couples all units"),
    "sum over units": (lambda: on_tokens(lambda: Around(lambda x: x / x.sum(-1, keepdim=True))), "couples all units"),
    "sum over units, read in Python": (
        lambda: on_tokens(lambda: Around(lambda x: x * x.sum(-1).tolist()[0][0])),
        "couples all units",
    ),
    "units shuffled": (lambda: on_tokens(lambda: Around(lambda x: x.roll(1, -1))), "addressed by roll"),
    "an operation without a rule": (
        lambda: on_tokens(lambda: Around(torch.tril)),
        "could not be followed",
    ),
    "weight standardisation": (
        lambda: on_images(lambda: chain(nn.Conv2d(WIDTH, 8, 1), nn.ReLU(), Standardised(8, WIDTH, 1))),
        "weight standardisation couples all units",
    ),
    "an output as wide as the input": (
        lambda: on_tokens(lambda: chain(nn.Linear(WIDTH, HIDDEN), nn.GELU(), ByInputWidth(), nn.Linear(HIDDEN, WIDTH))),
        "cannot run with fewer units",
    ),
    "a constant of this size": (
        lambda: on_tokens(lambda: Around(lambda x: x * torch.linspace(1, 2, HIDDEN).to(x))),
        "cannot run with fewer units",
    ),
}
