"""Where a model came from: enough to rebuild its skeleton and to feed it images or text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.errors import SourceError

_ATTRIBUTE = "secateur_source"
EXAMPLE_TOKENS = 64


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images: resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        size: height and width in pixels.
        crop: share of the shorter side that the crop keeps.
        interpolation: "bicubic", "bilinear", "nearest" or "lanczos".
        channels: 3, or 1 for greyscale models.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bicubic"
    channels: int = 3


@dataclass(frozen=True)
class TextSpec:
    """How a model wants its text: as token ids.

    Attributes:
        tokenizer: hub id or folder that holds its tokenizer.
        gguf: the file in that folder that holds it, for models that came as GGUF.
        vocabulary: number of token ids that the model knows.
        context: most tokens that it was made for, None if it does not say.
        causal: it predicts the next token.
    """

    tokenizer: str = ""
    gguf: str = ""
    vocabulary: int = 0
    context: int | None = None
    causal: bool = False


@dataclass(frozen=True)
class Source:
    """A model's origin.

    Attributes:
        library: "timm", "hf", "open_clip" or "module" (the user's own).
        name: the id or path it was loaded from, or its class.
        config: the library's own configuration, as JSON-able data.
        image: how it wants its images.
        weights: file or tag the weights came from, where the id does not say it.
        text: how it wants its text, for models that read text and no images.
    """

    library: str = "module"
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    image: ImageSpec = field(default_factory=ImageSpec)
    weights: str | None = None
    text: TextSpec | None = None

    @property
    def input(self) -> ImageSpec | TextSpec:
        """How the model wants what it reads."""
        return self.text or self.image

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Source:
        """What `to_dict` gave.

        Raises:
            ValueError: fields are missing or of another type.
        """
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(data)


@dataclass(frozen=True)
class Features:
    """What a model says about a batch.

    Attributes:
        embedding: [B, D], one vector per image: the CLS token after the last norm, or the model's own pooling; per
            text, the mean of its tokens.
        patches: [B, N, D], patch tokens, positions of the last feature map, or text tokens; None if the model hides
            them.
        logits: [B, C] of a classifier, [B, N, C] of a language model, or None.
    """

    embedding: Tensor
    patches: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Library:
    """What Secateur needs from a model library; one instance per library, see the modules beside this one.

    Attributes:
        forward: run the part of the model that sees images (or text), for tracing and measuring.
        features: run it and say what came out.
    """

    forward: Callable[[nn.Module, Any], Any]
    features: Callable[[nn.Module, Any], Features]


def attach(model: nn.Module, source: Source) -> nn.Module:
    object.__setattr__(model, _ATTRIBUTE, source)
    return model


def source_of(model: nn.Module) -> Source:
    """The Source attached at loading; for a module of the user's own, one that says so."""
    source = getattr(model, _ATTRIBUTE, None)
    if source is None:
        from secateur.models.recognise import recognise

        source = recognise(model)
        attach(model, source)
    return source


def library_of(model: nn.Module) -> Library:
    """The functions that go with a model's library."""
    from secateur.models import hf, open_clip, timm, user

    return {"timm": timm, "hf": hf, "open_clip": open_clip, "module": user}[source_of(model).library].LIBRARY


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the image side of a model (or all of one that reads text); images follow the model's floating-point type."""
    return library_of(model).forward(model, _as_wanted(model, batch))


def features(model: nn.Module, batch: Any) -> Features:
    """Run a model on images, or token ids, and return embedding, patches and logits, whatever its library."""
    return library_of(model).features(model, _as_wanted(model, batch))


def _as_wanted(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        return batch
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), batch.dtype)
    return batch.to(dtype)


def example_input(model: nn.Module, batch: int = 2) -> Tensor:
    """Random images of the size that a model wants, [B, C, H, W], or random tokens, [B, T], on its device.

    Raises:
        SourceError: the model reads something else.
    """
    import torch

    from secateur.models import hf

    spec, generator = source_of(model).input, torch.Generator().manual_seed(0)
    parameter = next(model.parameters(), torch.empty(0))
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    if isinstance(spec, TextSpec):
        tokens = min(EXAMPLE_TOKENS, spec.context or EXAMPLE_TOKENS)
        first = min(16, spec.vocabulary - 1)  # padding and its like come before
        return torch.randint(first, spec.vocabulary, (batch, tokens), generator=generator).to(device)
    if library_of(model) is hf.LIBRARY and not hf.reads_images(model):
        raise SourceError(
            f"{type(model).__name__} reads {getattr(model, 'main_input_name', 'something else')}, neither images nor "
            "text: give an example input, inspect(model, example=...)"
        )
    images = torch.randn(batch, spec.channels, *spec.size, generator=generator)
    return images.to(device=device, dtype=parameter.dtype if parameter.is_floating_point() else None)
