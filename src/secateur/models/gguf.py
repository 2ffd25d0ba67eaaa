"""GGUF files as input: read, and their weights dequantised, through transformers and the gguf package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import SourceError, reason
from secateur.models.hf import libraries, quiet, source
from secateur.models.hub import library_call
from secateur.models.source import attach


def load(path: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """The language model in a GGUF file, in floating point.

    Args:
        path: the file.
        pretrained: False builds it from the file's configuration with random weights.
        weights: not used; the file is the weights.
        kwargs: of `from_pretrained` (`dtype`).

    Raises:
        SourceError: the gguf package is missing, or the file is damaged or of an architecture that is not known.
    """
    transformers, file = libraries(), Path(path)
    if find_spec("gguf") is None:
        raise SourceError("reading GGUF files needs the gguf package: pip install 'secateur[hf]'")
    if weights is not None or "img_size" in kwargs:
        raise SourceError(f"'{path}' holds its own weights and reads text; leave --weights and --image-size out")
    try:
        with library_call(), quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            if pretrained:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, trust_remote_code=False, **kwargs
                )
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:
        raise SourceError(
            f"'{path}' could not be opened ({reason(e)}); give the model in safetensors, or another conversion of it"
        ) from e
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are floating point now
    return attach(model.eval(), source(model, path))
