"""Small-channel twins of the U-Nets that people use, and the arguments of a call for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

from rwopt.unet.sites import ALL_KINDS, list_sites

TEXT = 12


@dataclass
class Twin:
    """`rest`: the arguments of a call that are neither the sample nor the timestep."""

    unet: Any
    x: Tensor
    rest: dict[str, Any] = field(default_factory=dict)

    def __call__(self, t: Any = 500, unet: Any = None, rows: slice = slice(None)) -> Tensor:
        return (self.unet if unet is None else unet)(self.x[rows], t, **self.args(rows)).sample

    def args(self, rows: slice = slice(None)) -> dict[str, Any]:
        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: cut(v) for k, v in value.items()}
            return None if value is None else value[rows]

        rest = cut(self.rest)
        if type(self.unet).__name__ == "UNetMotionModel":  # its text comes a frame
            rest["encoder_hidden_states"] = rest["encoder_hidden_states"].repeat_interleave(self.x.shape[2], 0)
        return rest

    def double(self) -> Twin:
        return self.to(torch.float64)

    def to(self, dtype: torch.dtype) -> Twin:
        def cast(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: cast(v) for k, v in value.items()}
            return None if value is None else value.to(dtype)

        self.unet.to(dtype)
        self.x, self.rest = self.x.to(dtype), cast(self.rest)
        return self


COMMON: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {"cross_attention_dim": TEXT, "attention_head_dim": 2}
NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (
        UNet2DConditionModel,
        CROSS
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
        },
    ),
    "sdxl": (
        UNet2DConditionModel,
        CROSS
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        },
    ),
    "if": (
        UNet2DConditionModel,
        CROSS
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "block_out_channels": (8, 16),
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "mid_block_scale_factor": 1.414,
        },
    ),
    "kandinsky": (
        UNet2DConditionModel,
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "block_out_channels": (8, 16),
            "resnet_time_scale_shift": "scale_shift",
            "cross_attention_dim": TEXT,
            "attention_head_dim": 4,
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": 10,
            "only_cross_attention": True,
        },
    ),
    "k": (
        UNet2DConditionModel,
        {
            "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
            "mid_block_type": None,
            "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
            "block_out_channels": (32, 32, 64, 64),
            "layers_per_block": 2,
            "norm_num_groups": None,
            "cross_attention_dim": TEXT,
            "attention_head_dim": 16,
            "act_fn": "gelu",
            "time_embedding_type": "fourier",
            "resnet_time_scale_shift": "scale_shift",
            "time_embedding_act_fn": "gelu",
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
        },
    ),
    "ddpm": (
        UNet2DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "attention_head_dim": 4,
            "mid_block_scale_factor": 1.5,
        },
    ),
    "ncsn++": (  # its blocks; with the time embedding of the others, which samplers drive
        UNet2DModel,
        {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "block_out_channels": (32, 32),
            "attention_head_dim": 4,
            "mid_block_scale_factor": 1.5,
        },
    ),
    "motion": (
        UNetMotionModel,
        {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "block_out_channels": (8, 16),
            "cross_attention_dim": TEXT,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
    ),
    "3d": (
        UNet3DConditionModel,
        CROSS
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (8, 16),
        },
    ),
    "svd": (
        UNetSpatioTemporalConditionModel,
        {
            "in_channels": 4,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "block_out_channels": (32, 64),
            "cross_attention_dim": TEXT,
            "num_attention_heads": 2,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "num_frames": 2,
        },
    ),
}


def make(name: str, seed: int = 0, rows: int = 2, **changes: Any) -> Twin:
    """A seeded twin in eval mode, with inputs; `changes` to its configuration."""
    kind, config = NETS[name]
    common = dict(COMMON)
    if name == "svd":
        common.pop("norm_num_groups")
    torch.manual_seed(seed)
    unet = kind(**(common | config | changes)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed + 1)
    shapes = {"motion": (4, 2, 8, 8), "3d": (4, 2, 8, 8), "svd": (2, 4, 8, 8), "k": (4, 16, 16), "ncsn++": (3, 8, 8)}
    x = torch.randn(rows, *shapes.get(name, (4, 8, 8)), generator=draw)
    rest: dict[str, Any] = {}
    if name not in ("ddpm", "ncsn++", "kandinsky"):
        rest["encoder_hidden_states"] = torch.randn(rows, 1 if name == "svd" else 5, TEXT, generator=draw)
    if name == "sdxl":
        rest["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 10, generator=draw),
            "time_ids": torch.ones(rows, 6),
        }
    if name == "kandinsky":
        rest["encoder_hidden_states"] = None
        rest["added_cond_kwargs"] = {"image_embeds": torch.randn(rows, 10, generator=draw)}
    if name == "svd":
        rest["added_time_ids"] = torch.ones(rows, 3)
    # Fresh convolutions of temporal layers are zero, which would hide mistakes.
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=draw)
    return Twin(unet, x, rest)


def make_small() -> Twin:
    """The twin of SD with one level and no middle: every kind of site, and two fifths fewer modules to trace."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return make("sd", **blocks, block_out_channels=(8,), mid_block_type=None)


def ids_of(unet: Any, kinds: tuple[str, ...] = ("transformer",)) -> list[str]:
    """All sites of those of these kinds that the U-Net has."""
    present = {site.kind for site in list_sites(unet, ALL_KINDS)}
    return [site.id for site in list_sites(unet, [kind for kind in kinds if kind in present])]


def state(unet: nn.Module) -> Any:
    """Everything that hooks could leave behind."""
    tables = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))]
    return [
        (name, sorted(vars(module)), sorted(module._buffers), [list(getattr(module, table) or ()) for table in tables])
        for name, module in unet.named_modules()
    ]
