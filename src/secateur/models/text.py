"""Models of transformers that read text: what they want, how they are called, and their tokenizers."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import SourceError, reason
from secateur.models.hub import library_call
from secateur.models.source import TextSpec

_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def reads_images(model: Any) -> bool:
    """Whether there is an image side to feed."""
    return hasattr(model, "get_image_features") or getattr(model, "main_input_name", "") == "pixel_values"


def reads_text(model: Any) -> bool:
    """Whether token ids are all that it needs."""
    return not reads_images(model) and getattr(model, "main_input_name", "") == "input_ids"


def text_spec(model: Any, name: str) -> TextSpec:
    """What the config says, with the tokenizer expected where the model came from."""
    config = model.config.get_text_config()
    context = next((getattr(config, n) for n in _CONTEXT if isinstance(getattr(config, n, None), int)), None)
    file = Path(name)
    gguf = file.name if file.suffix.lower() == ".gguf" else ""
    vocabulary = int(getattr(config, "vocab_size", 0))
    return TextSpec(str(file.parent) if gguf else name, gguf, vocabulary, context, _causal(model))


def _causal(model: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return type(model).__name__ in names.values() and not model.config.is_encoder_decoder


def text_inputs(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass without a cache over token ids [B, T]."""
    inputs: dict[str, Any] = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


@lru_cache(maxsize=4)
def tokenizer(spec: TextSpec) -> Any:
    """The tokenizer of a model that reads text.

    Raises:
        SourceError: there is none, or it cannot be opened.
    """
    from secateur.models.hf import libraries, quiet

    transformers = libraries()
    where = spec.tokenizer + (f"/{spec.gguf}" if spec.gguf else "")
    try:
        with library_call(), quiet(transformers):
            options = {"gguf_file": spec.gguf} if spec.gguf else {}
            return transformers.AutoTokenizer.from_pretrained(spec.tokenizer, trust_remote_code=False, **options)
    except Exception as e:
        raise SourceError(
            f"no tokenizer could be opened from '{where}' ({reason(e)}); put tokenizer.json beside the weights, or "
            "give token ids instead of text"
        ) from e
