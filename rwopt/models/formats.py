"""Number formats: which one a network gets, and gradients through those that float16 would lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models.memory import LARGE, feature_map

FORMATS = ("float32", "bfloat16", "float16")


def device_of(device: str, key: str = "model.device") -> str:
    """A device by name; "auto": the GPU, if there is one. UserError, which names `key`, for one that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"{key}={device} is not to be had on this machine: use cpu or auto") from None
    return device


def unet_format_of(dtype: str, device: str) -> torch.dtype:
    """A U-Net's number format by name; "auto": bfloat16 where the processor behind `device` has it, else float32."""
    found: torch.dtype = getattr(torch, dtype if dtype != "auto" else "bfloat16" if has_bf16(device) else "float32")
    return found


def has_bf16(device: str) -> bool:
    """Whether the processor behind `device` computes in bfloat16."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())
    if device != "cpu":
        return False
    present: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return present and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def auto_vae_format(config: Any, side: int, unet: torch.dtype, bf16: bool) -> torch.dtype:
    """The number format of a VAE on a GPU (with or without bfloat16) beside a U-Net in format `unet`.

    side: of the latents. A `force_upcast` that only diffusers' default says, as Stable Diffusion 1.x has it, is none.
    """
    if unet == torch.float32 or feature_map(config, side, side, unet.itemsize) < LARGE:
        return torch.float32
    if not config.force_upcast or "force_upcast" in config.get("_use_default_values", ()):
        return unet
    return torch.bfloat16 if bf16 else torch.float32


def in_range(network: Callable[..., Tensor], number: torch.dtype, *inputs: Tensor | None) -> Tensor:
    """`network(*inputs)` for a network that computes in format `number` between float32 inputs and a float32 output.

    A mean over a picture's pixels has gradients of about 1e-6 each, and float16 ends at 6e-8: within such a network a
    gradient is multiplied by the power of two that makes its largest number about 1, and outside it is what it was.
    Other formats have float32's range, and are left alone.
    """
    if number != torch.float16 or not torch.is_grad_enabled():
        return network(*inputs)
    factor: list[Tensor] = []

    def enter(gradient: Tensor) -> Tensor:
        factor[:] = [torch.exp2(-gradient.abs().amax().clamp(min=2.0**-100).log2().floor())]
        return gradient * factor[0]

    def leave(gradient: Tensor) -> Tensor:
        return gradient / factor[0]

    own = [None if x is None else x.view_as(x) for x in inputs]  # the network's alone: others use the inputs, too
    for x in own:
        if x is not None and x.requires_grad:
            x.register_hook(leave)  # type: ignore[no-untyped-call]
    output = network(*own)
    if output.requires_grad:
        output.register_hook(enter)  # type: ignore[no-untyped-call]
    return output
