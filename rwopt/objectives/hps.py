"""`hps.v2`: Human Preference Score v2.1, the cosine of picture and prompt by a CLIP ViT-H/14 that learned what people
prefer (Wu et al. 2023, arXiv:2306.09341).

The published file has open_clip's names; here they become those of transformers' `CLIPModel`, the same architecture, so
that neither open_clip nor its torchvision is needed. `benchmarks/reward_parity.py` holds both against each other. The
published weights were on no machine that this was written and tested on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.objectives.clip import Clip, write_letters
from rwopt.objectives.objective import Objective, ObjectiveSpec
from rwopt.objectives.preprocess import letterbox
from rwopt.objectives.weights import Source, measured, options, pretrained, read_state, scratch, tokenizer

NAME = "hps.v2"
_FILE = Source("checkpoint", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "Apache-2.0", 1_970_000_000)
_WORDS = Source("tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer_config.json", "MIT", 3_000_000,
                folder=True)  # fmt: skip

_VISION_HEAD, _TEXT_HEAD = 80, 64
"""Width of one attention head in a ViT-H/14, which shapes do not tell."""

_RENAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.", "vision_model.encoder."),
    (r"^transformer\.", "text_model.encoder."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.resblocks\.", ".layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's `CLIP` under the names of transformers' `CLIPModel`: renamed, projections transposed,
    the three attention inputs taken apart."""
    out = {}
    for key, value in state.items():
        if key in ("visual.proj", "text_projection"):
            value = value.T.contiguous()
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        if ".in_proj_" in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            out[key] = value
    return out


def config_of(state: Mapping[str, Tensor]) -> Any:
    """The `CLIPConfig` of a converted state dict, read off its shapes."""
    from transformers import CLIPConfig

    def tower(side: str, head: int) -> dict[str, Any]:
        layers = {key.split(".")[3] for key in state if key.startswith(f"{side}.encoder.layers.")}
        wide, width = state[f"{side}.encoder.layers.0.mlp.fc1.weight"].shape
        sizes = {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": len(layers)}
        return {**sizes, "num_attention_heads": width // head, "hidden_act": "gelu"}

    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    places = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    words = len(state["text_model.embeddings.token_embedding.weight"])
    length = len(state["text_model.embeddings.position_embedding.weight"])
    side = patch * round(places**0.5)
    return CLIPConfig(
        vision_config={**tower("vision_model", _VISION_HEAD), "patch_size": patch, "image_size": side},
        text_config={
            **tower("text_model", _TEXT_HEAD), "vocab_size": words, "max_position_embeddings": length,
            "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0,
        },
        projection_dim=len(state["visual_projection.weight"]),
    )  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    about = "HPSv2.1: what people prefer, cosine of picture and prompt, about 0.2 to 0.35"
    spec = ObjectiveSpec(
        NAME, True, True, (-1.0, 1.0), frozenset({"prompts"}), _FILE.licence, about,
        weights=f"{_FILE.place}/{_FILE.file}", size=_FILE.size + _WORDS.size,
    )  # fmt: skip
    return {NAME: spec}


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return _FILE.missing(name, given.get("checkpoint", "")) or _WORDS.missing(name, given.get("tokenizer", ""))


def make(name: str, **given: Any) -> Objective:
    """The objective. Options, all text: checkpoint: the published file; tokenizer: folder or hub id of any CLIP's
    tokenizer (they are all the same); sha256: what the file must have, "" for no such demand.

    Raises `UserError` where weights are missing or of another network.
    """
    chosen = options(name, given, {"checkpoint": "", "tokenizer": "", "sha256": ""})
    words = _WORDS.find(name, chosen["tokenizer"])
    path, digest = _FILE.checked(name, chosen["checkpoint"], chosen["sha256"])
    return Objective(replace(specs()[name], sha256=digest), _shared(path, words, digest).cosine)


@lru_cache(maxsize=1)
def _shared(path: str, words: str, digest: str) -> Clip:
    """One network for a file of that content."""
    from transformers import AutoTokenizer, CLIPModel

    state = converted(read_state(path))
    with measured(path):
        config = config_of(state)
    model = pretrained(CLIPModel, path, config=config, state_dict=state)
    return Clip(model, tokenizer(AutoTokenizer, words), letterbox)


def tiny(name: str) -> dict[str, Any]:
    """Options of the same architecture with two thin layers, a tokenizer of single letters and random weights."""
    folder = scratch("hps", _write_tiny)
    return {"checkpoint": str(folder / "tiny.pt"), "tokenizer": str(folder)}


def _write_tiny(folder: Path) -> None:
    write_letters(folder)
    torch.save({"state_dict": random_state(80, 64)}, folder / "tiny.pt")


def random_state(vision: int, text: int, words: int = 514, out: int = 48) -> dict[str, Tensor]:
    """Random weights under open_clip's names: two layers of those widths, pictures of 32 pixels, patches of 8."""
    random = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) / math.sqrt(shape[-1])

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.1 * new(width), f"{name}.bias": new(width)}

    def linear(name: str, width: int, wide: int) -> dict[str, Tensor]:
        return {f"{name}.weight": new(wide, width), f"{name}.bias": new(wide)}

    def block(name: str, width: int) -> dict[str, Tensor]:
        inputs = {f"{name}.attn.in_proj_weight": new(3 * width, width), f"{name}.attn.in_proj_bias": new(3 * width)}
        return {
            **norm(f"{name}.ln_1", width), **inputs, **linear(f"{name}.attn.out_proj", width, width),
            **norm(f"{name}.ln_2", width), **linear(f"{name}.mlp.c_fc", width, 4 * width),
            **linear(f"{name}.mlp.c_proj", 4 * width, width),
        }  # fmt: skip

    state = {
        "positional_embedding": new(77, text), "text_projection": new(text, out), "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": new(words, text), **norm("ln_final", text),
        "visual.class_embedding": new(vision), "visual.positional_embedding": new(17, vision),
        "visual.proj": new(vision, out), "visual.conv1.weight": new(vision, 3, 8, 8),
        **norm("visual.ln_pre", vision), **norm("visual.ln_post", vision),
    }  # fmt: skip
    for layer in range(2):
        state |= block(f"transformer.resblocks.{layer}", text)
        state |= block(f"visual.transformer.resblocks.{layer}", vision)
    return state
