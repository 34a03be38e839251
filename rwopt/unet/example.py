"""Made-up inputs of one U-Net call, of the shapes that its configuration says: to trace a call, or to time one.

For `UNet2DConditionModel` as Stable Diffusion 1.x, 2.x and XL have it, with any number of channels, and for those that
are told the guidance scale (LCM). Names are those of ONNX pipelines: SDXL's pooled text and sizes stand beside others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError

_CLASS = "UNet2DConditionModel"
_PLAIN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
TIMESTEP = 500.0
"""What an example call is told."""


def check_plain(unet: Any, what: str) -> None:
    """Raise `UserError` for a U-Net whose inputs are not known here; `what` is made of one, "a graph is made of"."""
    kind, config = type(unet).__name__, unet.config
    if kind != _CLASS or config.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(f"unet={kind}: {what} a {_CLASS} of Stable Diffusion's kind")
    for name in _PLAIN:
        if config.get(name) is not None:
            raise UserError(f"the U-Net's {name} is {config[name]!r}: {what} one without")


def example_inputs(config: Any, size: Sequence[int], rows: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    """Name -> float32 input. config: of a U-Net that `check_plain` lets pass; size: height and width of latents.

    sample [rows, C, h, w], timestep [1], encoder_hidden_states [rows, tokens, D]; of SDXL also text_embeds [rows, P]
    and time_ids [rows, 6]; of LCM timestep_cond [rows, W].
    """
    text = config.cross_attention_dim
    text = text if isinstance(text, int) else text[0]
    inputs = {
        "sample": torch.randn(rows, config.in_channels, *size),
        "timestep": torch.tensor([TIMESTEP]),
        "encoder_hidden_states": torch.randn(rows, tokens, text),
    }
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.ones(rows, 6)}
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = torch.randn(rows, config.time_cond_proj_dim)
    return inputs


def keywords(inputs: Mapping[str, Tensor], like: Tensor) -> dict[str, Any]:
    """`example_inputs` but for sample and timestep, as keyword arguments of the U-Net, in the number format and on the
    device of `like`."""
    rest = {name: value.to(like) for name, value in inputs.items() if name not in ("sample", "timestep")}
    added = {name: rest.pop(name) for name in ("text_embeds", "time_ids") if name in rest}
    return {**rest, "added_cond_kwargs": added} if added else rest
