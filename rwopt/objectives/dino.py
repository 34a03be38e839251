"""Likeness to the reference in the features of self-supervised transformers.

- `dino.identity`: cosine of the class tokens of a DINOv2 (Oquab et al. 2023, arXiv:2304.07193).
- `dino.structure`: how far the layout moved: mean squared difference of the two pictures' self-similarity, the cosines
  between the last layer's keys of all tokens of a DINO ViT-B/8 (Tumanyan et al. 2022, arXiv:2201.00424, equation 4;
  the "structure distance" of PIE-Bench, Ju et al. 2023, arXiv:2310.01506).

The published weights were on no machine that this was written and tested on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rwopt.errors import one_of
from rwopt.objectives.frozen import Frozen
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.preprocess import IMAGENET_MEAN, IMAGENET_STD, centre_crop, normalise, shorter
from rwopt.objectives.weights import Source, options, pretrained, scratch

_SOURCES = {
    "dino.identity": Source("model", "facebook/dinov2-base", "config.json", "Apache-2.0", 346_000_000, folder=True),
    "dino.structure": Source("model", "facebook/dino-vitb8", "config.json", "Apache-2.0", 343_000_000, folder=True),
}
PROTOCOLS = ("plain", "pie-bench")


def specs() -> Mapping[str, ObjectiveSpec]:
    facts = {
        "dino.identity": (True, (-1.0, 1.0), "DINOv2's cosine of picture and reference"),
        "dino.structure": (False, (0.0, 4.0), "distance of the layouts of picture and reference, in DINO's keys"),
    }
    out = {}
    for name, (higher, span, about) in facts.items():
        source = _SOURCES[name]
        out[name] = ObjectiveSpec(
            name, higher, True, span, frozenset({"reference"}), source.licence, about, weights=source.place,
            size=source.size,
        )  # fmt: skip
    return out


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return _SOURCES[name].missing(name, given.get("model", ""))


def make(name: str, **given: Any) -> Objective:
    """The objective. Options, all text:

    model: folder or hub id of a `Dinov2Model` or, for `dino.structure`, of a `ViTModel` with DINO's weights; protocol
    (`dino.structure`): "plain", or "pie-bench" for numbers like that benchmark's tables: its code gives values from 0
    to 255 to a normalisation made for 0 to 1, and resizes without an anti-aliasing filter.
    Raises `UserError` where weights are missing or of another network.
    """
    identity = name == "dino.identity"
    chosen = options(name, given, {"model": ""} | ({} if identity else {"protocol": PROTOCOLS[0]}))
    if not identity:
        one_of(PROTOCOLS, f"objective {name}: protocol", chosen["protocol"])
    place = _SOURCES[name].find(name, chosen["model"])
    if identity:
        return Objective(specs()[name], partial(_cosine, class_tokens(place)))
    return Objective(specs()[name], partial(_moved, self_similarity(place, chosen["protocol"])))


def _cosine(tokens: Frozen[Tensor], batch: Batch) -> Tensor:
    assert batch.reference is not None
    return (tokens(batch.images) * tokens(batch.reference)).sum(1)


def _moved(layout: Frozen[Tensor], batch: Batch) -> Tensor:
    assert batch.reference is not None
    return (layout(batch.images) - layout(batch.reference)).square().mean((1, 2))


@lru_cache(maxsize=2)
def class_tokens(place: str) -> Frozen[Tensor]:
    """Pictures -> unit class tokens [N, D] of a DINOv2 for their middle 224 pixels (shorter side 256)."""
    from transformers import Dinov2Model

    model = pretrained(Dinov2Model, place)

    def look(images: Tensor) -> Tensor:
        pixels = normalise(centre_crop(images, 224, before=256), IMAGENET_MEAN, IMAGENET_STD)
        return functional.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    return Frozen(model, look)


@lru_cache(maxsize=2)
def self_similarity(place: str, protocol: str) -> Frozen[Tensor]:
    """Pictures -> cosines [N, T, T] between the last layer's keys of all T tokens, heads joined, of the ViT of a folder
    or hub id. The shorter side becomes the network's own (224), the longer one at most 480."""
    from transformers import ViTModel

    model = pretrained(ViTModel, place, add_pooling_layer=False)
    # transformers 5 calls it k_proj, version 4 called it key
    keys = [module for name, module in model.named_modules() if name.split(".")[-1] in ("k_proj", "key")][-1]
    scale, antialias = (255, False) if protocol == "pie-bench" else (1, True)

    def look(images: Tensor) -> Tensor:
        found: list[Tensor] = []
        small = shorter(images, model.config.image_size, "bilinear", antialias, most=480)
        handle = keys.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            model(pixel_values=normalise(scale * small, IMAGENET_MEAN, IMAGENET_STD), interpolate_pos_encoding=True)
        finally:
            handle.remove()
        unit = functional.normalize(found[0], dim=-1)
        return unit @ unit.mT

    return Frozen(model, look)


def tiny(name: str) -> dict[str, Any]:
    """Options of the same architecture with two thin layers and random weights."""
    return {"model": str(scratch("dino", _write_tiny) / name)}


def _write_tiny(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    thin = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**thin, image_size=70, patch_size=14)).save_pretrained(folder / "dino.identity")
        config = ViTConfig(**thin, intermediate_size=64, image_size=32, patch_size=8)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "dino.structure")
