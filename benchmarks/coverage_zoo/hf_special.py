"""The few transformers classes that need more than their default config made narrow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Not run at all, and why.
LEFT_OUT = {
    "dinat": "needs the natten extension, which is built for one version of CUDA and torch",
    "shieldgemma2": "a language model that is asked about an image: it needs a text prompt",
}


def image(config: Any, size: int) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(2, channels if isinstance(channels, int) else 3, size, size)


def video(config: Any, size: int) -> Tensor:
    frames = getattr(getattr(config, "vision_config", config), "num_frames", None)
    return torch.randn(2, frames or 4, 3, size, size)


def clip_of(name: str) -> Callable[[Any, int], Any]:
    return lambda config, size: {name: video(config, size)}


def patches(config: Any, size: int) -> dict[str, Tensor]:
    """Images of any shape as rows of patches (NaFlex)."""
    vision = getattr(config, "vision_config", config)
    side = int(vision.num_patches**0.5)
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(2, side * side, width),
        "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side], [side, side]]),
    }


def tiles(config: Any, size: int) -> dict[str, Tensor]:
    """One image of up to four tiles an example."""
    return {
        "pixel_values": torch.randn(2, 1, config.max_num_tiles, 3, size, size),
        "aspect_ratio_ids": torch.tensor([[5], [6]]),
        "aspect_ratio_mask": torch.ones(2, 1, config.max_num_tiles, dtype=torch.long),
    }


def captioned(config: Any, size: int) -> dict[str, Tensor]:
    return {"pixel_values": image(config, size), "input_ids": torch.randint(3, 900, (2, 6))}


def matched(config: Any, size: int) -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    return captioned(config, size) | {"attention_mask": mask, "use_image_text_matching_head": True}


def task(config: Any, size: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 1000, (2, config.task_seq_len), generator=torch.Generator().manual_seed(0))
    return {"pixel_values": image(config, size), "task_inputs": tokens}


@dataclass(frozen=True)
class Special:
    """What a class needs.

    Attributes:
        config: arguments for the config class.
        then: values set after the widths were divided; a function of the image size gives more.
        inputs: makes the input from config and image size.
        divisors: of the widths, in the order in which they are tried.
        sizes: of the images, likewise.
        method: called instead of the model.
    """

    config: dict[str, Any] = field(default_factory=dict)
    then: dict[str, Any] | Callable[[int], dict[str, Any]] = field(default_factory=dict)
    inputs: Callable[[Any, int], Any] = image
    divisors: tuple[int, ...] = (4, 2, 1)
    sizes: tuple[int, ...] = (64, 96, 128, 224)
    method: str | None = None


_SMALL_EFFICIENTNET = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}


def _asymmetric() -> dict[str, Any]:
    """Kernels of the intra-class blocks of PP-OCR, as released: 7, 5 and 3 long, upright, lying and square."""
    out: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, k in (("long", 7), ("mid", 5), ("short", 3)):
        out[f"vertical_long_to_small_conv_{name}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
        out[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, k], [1, 1], [0, k // 2]]
        out[f"symmetric_conv_long_{name}ratio"] = [[k, k], [1, 1], [k // 2, k // 2]]
    return out


_OCR = Special(
    config={"intraclass_block_config": _asymmetric(), "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]},
)
_LCNET = {
    "model_type": "pp_lcnet_v4",
    "stem_channels": [3, 12, 24],
    "block_configs": [
        [[3, 24, 24, 1, True]],
        [[3, 24, 24, 2, False], [3, 24, 24, 1, False]],
        [[3, 24, 48, 2, False], [3, 48, 48, 1, True]],
        [[3, 48, 96, 2, False], [3, 96, 96, 1, True]],
    ],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SPECIAL: dict[str, Special] = {
    "BeitForSemanticSegmentation": Special(config={"out_indices": [3, 5, 7, 11]}),
    "efficientnet": Special(then=_SMALL_EFFICIENTNET, divisors=(1,)),
    "align": Special(config={"vision_config": _SMALL_EFFICIENTNET}, divisors=(1,)),
    "cohere2_vision": Special(
        config={
            "alignment_intermediate_size": 4096,
            "text_config": {"model_type": "cohere2", "num_hidden_layers": 1, "hidden_size": 1024},
        }
    ),
    "blip-2": Special(
        config={"vision_config": {"num_hidden_layers": 4}, "text_config": {"num_hidden_layers": 1}}, inputs=captioned
    ),
    "Blip2ForImageTextRetrieval": Special(
        config={
            "vision_config": {"num_hidden_layers": 4},
            "text_config": {"num_hidden_layers": 1},
            "qformer_config": {"use_qformer_text_input": True, "num_hidden_layers": 4},
        },
        inputs=matched,
    ),
    "prompt_depth_anything": Special(config={"depth_estimation_type": "metric"}),  # the other ends in ReLU: all zero
    "depth_pro": Special(
        config={
            "merge_padding_value": 1,
            "patch_size": 64,
            **{f"{k}_model_config": {"model_type": "dinov2", "image_size": 64} for k in ("image", "patch", "fov")},
        },
        then=lambda size: {"patch_size": size},
        inputs=lambda config, size: image(config, 4 * size),
        sizes=(64,),
    ),
    "imagegpt": Special(inputs=lambda config, size: torch.randint(0, 500, (2, 64))),
    "llama4": Special(
        config={"hidden_size": 1408, "num_hidden_layers": 4},
        inputs=lambda config, size: {"pixel_values": image(config, size)},
        sizes=(112,),
    ),
    "mlcd": Special(config={"num_hidden_layers": 4}),
    "mllama": Special(inputs=tiles, sizes=(56,)),
    "timesformer": Special(inputs=video),
    "videomae": Special(inputs=video),
    "videomt": Special(inputs=video),
    "vivit": Special(config={"num_frames": 4}, inputs=video),
    "vjepa2": Special(config={"frames_per_clip": 4}, inputs=clip_of("pixel_values_videos")),
    "videoprism_vision_model": Special(
        config={"num_frames": 4, "num_spatial_layers": 3}, inputs=clip_of("pixel_values_videos"), sizes=(72,)
    ),
    "videoprism": Special(
        config={"vision_config": {"num_frames": 4, "num_spatial_layers": 3}},
        inputs=clip_of("pixel_values_videos"),
        sizes=(72,),
        method="get_video_features",
    ),
    "PerceiverForImageClassificationFourier": Special(config={"num_cross_attention_heads": 1}),
    "PerceiverForImageClassificationConvProcessing": Special(config={"num_cross_attention_heads": 1}),
    "siglip2": Special(inputs=patches),
    "Siglip2Model": Special(inputs=patches, method="get_image_features"),
    "Sapiens2ForSemanticSegmentation": Special(
        config={"head_config": {"upsample_out_channels": [64, 64], "conv_out_channels": [64]}, "num_hidden_layers": 18}
    ),
    "lw_detr": Special(config={"projector_scale_factors": [1.0]}, sizes=(128, 256)),
    "pp_ocrv5_server_det": _OCR,
    "pp_ocrv6_medium_det": Special(config=_OCR.config | {"backbone_config": _LCNET}, divisors=(1,)),
    "pp_ocrv6_small_det": Special(
        config={"backbone_config": _LCNET, "layer_list_out_channels": [24, 24, 48, 96]}, divisors=(1,)
    ),
    "pp_doclayout_v2": Special(config={"class_thresholds": [0.5, 0.5], "class_order": [0, 1]}),
    "oneformer": Special(inputs=task),
    "timm_backbone": Special(config={"backbone": "resnet18"}),
}
