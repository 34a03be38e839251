"""Small-channel twins of the U-Nets that people use, a call for each, and what they compute, written a second time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
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

from rwopt.sites import skip_channels

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
            return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value[rows]

        rest = cut(self.rest)
        if type(self.unet).__name__ == "UNetMotionModel":  # its text comes a frame
            rest["encoder_hidden_states"] = rest["encoder_hidden_states"].repeat_interleave(self.x.shape[2], 0)
        return rest

    def double(self) -> Twin:
        self.unet.double()
        self.x = self.x.double()

        def wide(value: Any) -> Any:
            return {k: wide(v) for k, v in value.items()} if isinstance(value, dict) else value.double()

        self.rest = wide(self.rest)
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


def make(name: str, seed: int = 0, rows: int = 2) -> Twin:
    """A seeded twin in eval mode, with inputs."""
    kind, changes = NETS[name]
    common = dict(COMMON)
    if name == "svd":
        common.pop("norm_num_groups")
    torch.manual_seed(seed)
    unet = kind(**(common | changes)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed + 1)
    shape = {"motion": (4, 2, 8, 8), "3d": (4, 2, 8, 8), "svd": (2, 4, 8, 8), "k": (4, 16, 16)}.get(name, (4, 8, 8))
    x = torch.randn(rows, *shape, generator=draw)
    rest: dict[str, Any] = {}
    if name != "ddpm":
        rest["encoder_hidden_states"] = torch.randn(rows, 1 if name == "svd" else 5, TEXT, generator=draw)
    if name == "sdxl":
        rest["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 10, generator=draw),
            "time_ids": torch.ones(rows, 6),
        }
    if name == "svd":
        rest["added_time_ids"] = torch.ones(rows, 3)
    # Fresh convolutions of temporal layers are zero, which would hide mistakes.
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=draw)
    return Twin(unet, x, rest)


# ------------------------------------------------------------------- the oracle: forwards rewritten by hand, no hooks


def patched(unet: nn.Module, weights: Mapping[str, float], mode: str = "residual") -> Any:
    """A copy of the U-Net that computes with these weights."""
    net: Any = copy.deepcopy(unet)
    joins = skip_channels(unet)
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        if kind.isdigit():
            _transformer(net.get_submodule(name), weight, mode)
        elif kind in ("self", "cross", "ff"):
            attribute = {"self": "attn1", "cross": "attn2", "ff": "ff"}[kind]
            for module_name, module in net.get_submodule(path).named_modules():
                spatial = "temporal" not in module_name
                if spatial and hasattr(module, attribute) and type(module).__name__ != "Transformer2DModel":
                    _scaled(getattr(module, attribute), weight)
        elif kind == "resnet" and mode == "output":
            _scaled(net.get_submodule(path), weight)
        elif kind == "resnet":
            for module_name, module in net.get_submodule(path).named_modules():
                if module_name.endswith("conv2"):
                    _scaled(module, weight)
        elif kind == "skip":
            _skip(net.get_submodule(path), joins[path][0], weight)
        else:
            raise NotImplementedError(kind)
    return net


def _scaled(module: Any, weight: float) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: weight * original(*args, **kwargs)


def _transformer(module: Any, weight: float, mode: str) -> None:
    original, divisor = module.forward, getattr(module, "rescale_output_factor", 1.0)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        out = original(*args, **kwargs)
        y = out if isinstance(out, Tensor) else out[0]
        y = weight * y if mode == "output" else (1 - weight) * x / divisor + weight * y
        return y if isinstance(out, Tensor) else (y,)

    module.forward = MethodType(forward, module)


def _skip(module: Any, stream: int, weight: float) -> None:
    original = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = ["input_tensor"] if "input_tensor" in kwargs else ["hidden_states"]
        x = args[0] if args else kwargs.pop(names[0])
        x = torch.cat([x[:, :stream], weight * x[:, stream:]], 1)
        return original(x, *args[1:], **kwargs)

    module.forward = MethodType(forward, module)


# ----------------------------------------------------- the same for Stable Diffusion, from the blocks' layers upwards


def recompute(unet: Any, x: Tensor, t: int, text: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Mode residual on a Stable Diffusion twin: every block written out, no forward of a block is called."""
    w = lambda name: weights.get(name, 1.0)  # noqa: E731

    def resnet(path: str, x: Tensor, emb: Tensor) -> Tensor:
        m = unet.get_submodule(path)
        h = m.conv1(m.nonlinearity(m.norm1(x)))
        h = m.norm2(h + m.time_emb_proj(m.nonlinearity(emb))[:, :, None, None])
        h = m.conv2(m.nonlinearity(h))
        x = x if m.conv_shortcut is None else m.conv_shortcut(x)
        return (x + w(f"{path}.resnet") * h) / m.output_scale_factor

    def transformer(path: str, x: Tensor) -> Tensor:
        m = unet.get_submodule(path)
        rows, _, height, width = x.shape
        h = m.proj_in(m.norm(x)).permute(0, 2, 3, 1).reshape(rows, height * width, -1)
        for block in m.transformer_blocks:
            h = h + w(f"{path}.self") * block.attn1(block.norm1(h))
            h = h + w(f"{path}.cross") * block.attn2(block.norm2(h), encoder_hidden_states=text)
            h = h + w(f"{path}.ff") * block.ff(block.norm3(h))
        h = m.proj_out(h.reshape(rows, height, width, -1).permute(0, 3, 1, 2))
        return x + w(path) * h

    emb = unet.time_embedding(unet.time_proj(torch.full((len(x),), t)).to(x.dtype))
    x = unet.conv_in(x)
    skips = [x]
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            x = resnet(f"down_blocks.{i}.resnets.{j}", x, emb)
            if hasattr(block, "attentions"):
                x = transformer(f"down_blocks.{i}.attentions.{j}", x)
            skips.append(x)
        if block.downsamplers is not None:
            x = block.downsamplers[0].conv(x)
            skips.append(x)
    x = resnet("mid_block.resnets.0", x, emb)
    x = resnet("mid_block.resnets.1", transformer("mid_block.attentions.0", x), emb)
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            path = f"up_blocks.{i}.resnets.{j}"
            x = resnet(path, torch.cat([x, w(f"{path}.skip") * skips.pop()], 1), emb)
            if hasattr(block, "attentions"):
                x = transformer(f"up_blocks.{i}.attentions.{j}", x)
        if block.upsamplers is not None:
            x = block.upsamplers[0].conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
