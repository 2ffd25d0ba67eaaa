"""Models of transformers: by id or local folder, rebuilt from their config class."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SecateurWarning, SourceError, reason
from secateur.models.hub import NO_HUB, library_call
from secateur.models.source import Features, ImageSpec, Library, Source, attach
from secateur.models.text import reads_images, reads_text, text_inputs, text_spec
from secateur.nn.weightless import empty_, unset_weights

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


def libraries():
    ensure_torchvision()
    try:
        import transformers
    except ImportError as e:
        raise SourceError(f"transformers cannot be imported ({e}): pip install 'secateur[hf]'") from e
    return transformers


def load(name: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A transformers model by hub id or local folder, in the class that its config names.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: hub id or folder.
        pretrained: False builds it from its config with random weights.
        weights: not used by transformers; pass a folder instead.
        kwargs: entries of the config to change (`num_labels`), or of `from_pretrained` (`dtype`, `revision`).

    Raises:
        SourceError: the model cannot be found or opened, or is of no known class.
    """
    transformers = libraries()
    if weights is not None:
        raise SourceError("transformers models take no weights file; give a folder with config.json and safetensors")
    if "img_size" in kwargs:
        raise SourceError("the image size of a transformers model is that of its config and cannot be chosen")
    try:
        with library_call(), quiet(transformers):
            config, rest = transformers.AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, trust_remote_code=False, **kwargs
            )
            rest.pop("trust_remote_code", None)
            check_whole(config, name, rest)
            model = _pretrained(config, name, rest) if pretrained else model_class(config)(config)
    except SourceError:
        raise
    except Exception as e:
        raise SourceError(
            f"could not load '{name}' with transformers ({reason(e)}); {NO_HUB} with config.json and model.safetensors"
        ) from e
    return attach(model.eval(), source(model, name))


def open_skeleton(folder: str) -> nn.Module:
    """The model that a local folder's config describes, its parameters on the meta device.

    Raises:
        SourceError: the config cannot be read, or is of no known class.
    """
    transformers = libraries()
    try:
        with library_call(), quiet(transformers), torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            check_whole(config, folder, {})
            with unset_weights():
                model = model_class(config)(config)
    except SourceError:
        raise
    except Exception as e:
        raise SourceError(f"could not build the model of '{folder}' without its weights ({reason(e)})") from e
    return attach(empty_(model.eval()), source(model, folder))


def check_whole(config: Any, name: str, options: Mapping[str, Any]) -> None:
    """Refuse checkpoints and ways of loading whose weights are no plain matrices.

    Raises:
        SourceError: the checkpoint is quantised, or is to be spread over devices.
    """
    quantised = getattr(config, "quantization_config", None) or options.get("quantization_config")
    if quantised:
        data = quantised if isinstance(quantised, dict) else vars(quantised)
        raise SourceError(
            f"'{name}' is quantised ({data.get('quant_method', 'some method')}), and packed weights cannot be cut; "
            "give the floating-point checkpoint, and quantise what was cut"
        )
    if spread := sorted({"tp_plan", "tp_size", "device_mesh"} & set(options)):
        raise SourceError(f"'{name}' cannot be cut in pieces on several devices; leave {', '.join(spread)} out")


def stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """For names in a model's state, those in a checkpoint that transformers would load them from.

    Tensors that it would put together from several, or take apart, are left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5 a checkpoint had the names of the state
        return {name: name for name in stored}
    transforms, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    out = {}
    for name in stored:
        new, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            out[new] = name
    return out


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No reports, which `load` gives itself in one line, and no bars where nobody looks."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _pretrained(config: Any, name: str, options: dict[str, Any]) -> Any:
    cls = model_class(config)
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True}
    model, info = cls.from_pretrained(name, **options)
    missing = sorted(info["missing_keys"])
    takes_pooling = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    if missing and takes_pooling and all("pooler." in key for key in missing):
        # The checkpoint has no pooler: better none than a random one, whose output would pass for the embedding.
        model, info = cls.from_pretrained(name, add_pooling_layer=False, **options)
        missing = sorted(info["missing_keys"])
    if missing:
        warnings.warn(
            f"'{name}' lacks {len(missing)} weights of {cls.__name__}, first '{missing[0]}': they were set at random",
            SecateurWarning,
            stacklevel=4,
        )
    return model


def model_class(config: Any) -> Any:
    """The class a config names as its architecture, else the base model of its type.

    Raises:
        SourceError: there is none.
    """
    transformers = libraries()
    for name in getattr(config, "architectures", None) or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    if type(config) not in transformers.MODEL_MAPPING:
        raise SourceError(f"transformers has no model class for a config of type '{config.model_type}'")
    return transformers.MODEL_MAPPING[type(config)]


def source(model: Any, name: str) -> Source:
    """The Source of a model that came from this id, folder or file."""
    data = model.config.to_dict()
    data["architectures"] = [type(model).__name__]
    if attention := getattr(model.config, "_attn_implementation", None):
        data["attn_implementation"] = attention  # results differ in the last bits from one to another
    if hasattr(model, "pooler") and model.pooler is None:
        data["add_pooling_layer"] = False
    image = _image_spec(model.config, name) if reads_images(model) else ImageSpec()
    text = text_spec(model, name) if reads_text(model) else None
    return Source("hf", name, json.loads(json.dumps(data, default=str)), image, text=text)


def _image_spec(config: Any, name: str) -> ImageSpec:
    """Size from the config; mean, standard deviation and crop from the image processor's file where there is one."""
    vision = getattr(config, "vision_config", None) or config
    size = _pair(getattr(vision, "image_size", None) or 224)
    channels = getattr(vision, "num_channels", 3)
    data = _processor(name)
    mean, std = data.get("image_mean") or 0.5, data.get("image_std") or 0.5
    if data.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    resize, crop = data.get("size"), 1.0
    shortest = resize.get("shortest_edge") if isinstance(resize, dict) else None
    if data.get("crop_size") and data.get("do_center_crop", True):
        size = _pair(data["crop_size"])
    if shortest:
        crop = min(1.0, min(size) / shortest)
    return ImageSpec(
        size,
        _per_channel(mean, channels),
        _per_channel(std, channels),
        crop,
        _RESAMPLE.get(data.get("resample", 3), "bicubic"),
        channels,
    )


def _processor(name: str) -> dict[str, Any]:
    """The image processor's settings; empty where there are none or they cannot be had."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    found: dict[str, Any] = {}
    if name:
        with suppress(Exception):
            found = get_image_processor_config(name)
        if not found:
            warnings.warn(
                f"'{name}' has no preprocessor_config.json: images are scaled to mean 0.5 and deviation 0.5",
                SecateurWarning,
                stacklevel=2,
            )
    return found


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge") or 224
        return int(size.get("height") or side), int(size.get("width") or side)
    return (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1]))


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),) * channels


def recognise(model: Any) -> Source | None:
    """The Source of a transformers model made elsewhere."""
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "config"):
        return None
    name = getattr(model, "name_or_path", "")
    with library_call():
        return source(model, name or type(model).__name__)


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights.

    Raises:
        SourceError: the installed transformers does not know the model.
    """
    transformers = libraries()
    data = dict(source.config)
    attention, pooling = data.pop("attn_implementation", None), data.pop("add_pooling_layer", True)
    try:
        config = transformers.CONFIG_MAPPING[data["model_type"]].from_dict(data)
        config._attn_implementation = attention
        return model_class(config)(config, **({} if pooling else {"add_pooling_layer": False}))
    except SourceError:
        raise
    except Exception as e:
        raise SourceError(
            f"transformers could not build a model of type '{data.get('model_type')}' ({reason(e)}); is it up to date?"
        ) from e


def forward(model: Any, batch: Any) -> Any:
    """The vision tower of a CLIP-like model, else the whole model; a dict is passed by its names."""
    if isinstance(batch, dict):
        return model(**batch)
    if reads_text(model):
        return model(**text_inputs(model, batch))
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=batch)
    return model(**{getattr(model, "main_input_name", "pixel_values"): batch})


def features(model: Any, batch: Tensor) -> Features:
    if reads_text(model):
        return _text_features(model, batch)
    if hasattr(model, "get_image_features"):
        out, base = model.get_image_features(pixel_values=batch), None
    else:
        out, base = _with_base(model, {getattr(model, "main_input_name", "pixel_values"): batch})
    if isinstance(out, Tensor):
        return Features(out.flatten(1))
    logits = getattr(out, "logits", None)
    logits = logits if isinstance(logits, Tensor) and logits.dim() == 2 else None
    out = base if base is not None else out
    tokens = getattr(out, "last_hidden_state", None)
    if tokens is None and getattr(out, "hidden_states", None):
        tokens = out.hidden_states[-1]
    pooled = getattr(out, "pooler_output", None)
    if tokens is None and pooled is None:
        return Features(next(t for t in out.values() if isinstance(t, Tensor)).flatten(1), logits=logits)
    if tokens is not None and tokens.dim() == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
        embedding = tokens.mean(1) if pooled is None else pooled.flatten(1)
        return Features(embedding, tokens, logits)
    if tokens is None:
        return Features(pooled.flatten(1), logits=logits)  # type: ignore[union-attr]
    prefix = _prefix_tokens(model)
    embedding = pooled if pooled is not None else (tokens[:, 0] if prefix else tokens.mean(1))
    return Features(embedding.flatten(1), tokens[:, prefix:], logits)


def _text_features(model: Any, batch: Tensor) -> Features:
    """Tokens after the last norm, their mean, and the prediction of a language model for every token."""
    out, base = _with_base(model, text_inputs(model, batch))
    logits = getattr(out, "logits", None)
    tokens = next(t for t in (base if base is not None else out).values() if isinstance(t, Tensor) and t.dim() == 3)
    return Features(tokens.mean(1), tokens, logits)


def _with_base(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """What a model gives, and what the model below its head gave meanwhile: its tokens are those after the last norm,
    which `hidden_states` are not."""
    inner = getattr(model, "base_model", model)
    seen: list[Any] = []
    handle = inner.register_forward_hook(lambda _module, _args, out: seen.append(out)) if inner is not model else None
    try:
        out = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    return out, seen[-1] if seen and hasattr(seen[-1], "last_hidden_state") else None


def _prefix_tokens(model: nn.Module) -> int:
    """CLS, distillation and register tokens, counted from the embedding module's parameters."""
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    count = 0
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in names:
            count += p.shape[1] if p.dim() == 3 else 1
    return count


LIBRARY = Library(forward, features)
