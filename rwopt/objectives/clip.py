"""Rewards that are read off a CLIP: agreement with the prompt, likeness to the reference, aesthetics, human preference.

- `clip.t`: cosine of picture and prompt (CLIP-T); `clip.i`: cosine of picture and reference (CLIP-I).
- `laion.v1`, `laion.v2`: LAION's aesthetic predictors, about 1 to 10, a linear layer and five of them (without
  activations, as published) on the unit embedding of the picture.
- `pickscore`: exp(logit scale) times the cosine of picture and prompt, by a CLIP that was trained on choices of people
  (Kirstain et al. 2023, "Pick-a-Pic", arXiv:2305.01569).

CLIP: Radford et al. 2021, arXiv:2103.00020. Objectives that name the same folder share one network, and one forward
pass for the same pictures. Of a prompt, CLIP reads the first 77 tokens. The published weights were on no machine that
these objectives were written and tested on: tests hold them against transformers' own `CLIPModel` at small sizes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rwopt.errors import UserError
from rwopt.objectives.frozen import Frozen, still
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, normalise
from rwopt.objectives.weights import ANY, Source, filled, options, pretrained, read_state, scratch, tokenizer

_L14 = Source("model", "openai/clip-vit-large-patch14", "config.json", "MIT", 1_710_000_000, folder=True)
_PICK = Source("model", "yuvalkirstain/PickScore_v1", "config.json", "code MIT; weights: see their page", 3_940_000_000,
               folder=True)  # fmt: skip
_H14_WORDS = Source("tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer_config.json", "MIT", 3_000_000,
                    folder=True)  # fmt: skip
_V1 = Source("head", "https://github.com/LAION-AI/aesthetic-predictor", "sa_0_4_vit_l_14_linear.pth", "MIT", 3_871)
_V2 = Source("head", "https://github.com/christophschuhmann/improved-aesthetic-predictor",
             "sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0", 3_714_759,
             "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0")  # fmt: skip

_SOURCES = {"clip.t": (_L14,), "clip.i": (_L14,), "laion.v1": (_L14, _V1), "laion.v2": (_L14, _V2),
            "pickscore": (_PICK, _H14_WORDS)}  # fmt: skip
_COSINE, _OPEN = (-1.0, 1.0), (float("-inf"), float("inf"))
_FACTS: dict[str, tuple[tuple[float, float], tuple[str, ...], str]] = {
    "clip.t": (_COSINE, ("prompts",), "CLIP's cosine of picture and prompt"),
    "clip.i": (_COSINE, ("reference",), "CLIP's cosine of picture and reference"),
    "laion.v1": (_OPEN, (), "LAION's aesthetic score, version 1, about 1 to 10"),
    "laion.v2": (_OPEN, (), "LAION's improved aesthetic score, about 1 to 10"),
    "pickscore": ((-100.0, 100.0), ("prompts",), "PickScore: what people choose, about 15 to 25"),
}


class Clip:
    """A frozen transformers `CLIPModel`: unit embeddings of pictures [N, D] and of prompts, each computed once.

    fit: makes squares of a given side of pictures.
    """

    def __init__(self, model: Any, words: Any, fit: Callable[[Tensor, int], Tensor] = centre_crop) -> None:
        self.model, self.words = model, words
        side: int = model.config.vision_config.image_size

        def look(images: Tensor) -> Tensor:
            pixels = normalise(fit(images, side), CLIP_MEAN, CLIP_STD)
            return _unit(model.get_image_features(pixel_values=pixels))

        self.images = Frozen(model, look)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def texts(self, prompts: list[str], device: torch.device) -> Tensor:
        """Unit embeddings [N, D] of prompts, cut to the tokens that the network reads."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.words(new, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            found = _unit(self.model.to(device).get_text_features(input_ids=tokens.input_ids.to(device)))
            self._texts.update(zip(new, found, strict=True))
        return torch.stack([self._texts[prompt].to(device) for prompt in prompts])

    def cosine(self, batch: Batch) -> Tensor:
        """Cosine [N] of pictures and prompts."""
        assert batch.prompts is not None
        return (self.images(batch.images) * self.texts(batch.prompts, batch.images.device)).sum(1)

    def scaled(self, batch: Batch) -> Tensor:
        """`cosine` times the network's own exp(logit scale): the diagonal of its logits."""
        cosine = self.cosine(batch)  # first, since it puts the network on the pictures' device
        scale: Tensor = self.model.logit_scale.exp()
        return scale * cosine


def _unit(found: Any) -> Tensor:
    """Rows of length 1; transformers 5 wraps what version 4 gave plainly."""
    return functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1)


def aesthetic_layers(width: int) -> nn.Sequential:
    """LAION's improved predictor, width -> 1, of linear layers alone; ImageReward ends in the same ones. Their numbers
    in the published files count dropout layers, which do nothing here."""
    sizes = (width, 1024, 128, 64, 16, 1)
    pairs = zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)
    return nn.Sequential(OrderedDict((str(i), nn.Linear(a, b)) for i, a, b in pairs))


def specs() -> Mapping[str, ObjectiveSpec]:
    out = {}
    for name, (span, needs, about) in _FACTS.items():
        sources = _SOURCES[name]
        main = sources[-1] if name.startswith("laion") else sources[0]
        licence = main.licence if main is sources[0] else f"{main.licence} (CLIP: {sources[0].licence})"
        out[name] = ObjectiveSpec(
            name, True, True, span, frozenset(needs), licence, about, sha256=main.sha256 or None,
            weights=main.file if main is not sources[0] else main.place, size=sum(s.size for s in sources),
        )  # fmt: skip
    return out


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return next((line for s in _SOURCES[name] if (line := s.missing(name, given.get(s.option, "")))), "")


def make(name: str, **given: Any) -> Objective:
    """The objective. Options, all text:

    model: folder or hub id of a CLIP in transformers' layout (for `laion.*` a ViT-L/14, that of the heads); tokenizer:
    folder or hub id, "" for the model's own, or for `pickscore` that of the CLIP that it comes from; head (`laion.*`):
    the published file; sha256: what that file must have, "" for the published one's, "any" for whatever it is.
    Raises `UserError` where weights are missing, are of another network or have another checksum.
    """
    laion = name.startswith("laion")
    chosen = options(name, given, {"model": "", "tokenizer": ""} | ({"head": "", "sha256": ""} if laion else {}))
    absent = missing(name, **chosen)
    if absent:
        raise UserError(absent)
    first, *rest = _SOURCES[name]
    place = first.find(name, chosen["model"])
    words = _H14_WORDS.find(name, chosen["tokenizer"]) if name == "pickscore" else chosen["tokenizer"] or place
    clip, spec = shared(place, words), specs()[name]
    functions: dict[str, Callable[[Batch], Tensor]] = {
        "clip.t": clip.cosine, "clip.i": partial(_likeness, clip), "pickscore": clip.scaled,
    }  # fmt: skip
    if not laion:
        return Objective(spec, functions[name])
    layers = aesthetic_layers if name == "laion.v2" else partial(nn.Linear, out_features=1)
    path, digest = rest[0].checked(name, chosen["head"], chosen["sha256"])
    state = {key.removeprefix("layers."): value for key, value in read_state(path).items()}
    head = still(filled(layers(clip.model.config.projection_dim), path, state))

    def aesthetics(batch: Batch) -> Tensor:
        scores: Tensor = head.to(batch.images.device)(clip.images(batch.images)).squeeze(1)
        return scores

    return Objective(replace(spec, sha256=digest), aesthetics)


def _likeness(clip: Clip, batch: Batch) -> Tensor:
    assert batch.reference is not None
    return (clip.images(batch.images) * clip.images(batch.reference)).sum(1)


@lru_cache(maxsize=4)
def shared(place: str, words: str) -> Clip:
    """The CLIP of a folder or hub id, one for all objectives that name the same."""
    from transformers import AutoTokenizer, CLIPModel

    return Clip(pretrained(CLIPModel, place), tokenizer(AutoTokenizer, words))


def tiny(name: str) -> dict[str, Any]:
    """Options of the same architecture with two thin layers, a tokenizer of single letters and random weights."""
    folder = scratch("clip", _write_tiny)
    if not name.startswith("laion"):
        return {"model": str(folder), "tokenizer": str(folder)}
    return {"model": str(folder), "head": str(folder / f"{name}.safetensors"), "sha256": ANY}


def tiny_config() -> Any:
    """Of a thin `CLIPModel` for pictures of 32 pixels and the words of `write_letters`."""
    from transformers import CLIPConfig

    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**layers, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)


def write_letters(folder: Path) -> None:
    """A CLIP tokenizer whose words are single bytes."""
    from transformers import CLIPTokenizer

    # GPT-2's alphabet: printable bytes are themselves, the others come after all 8-bit characters
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(tiny_config()).save_pretrained(folder)
        write_letters(folder)
        save_file(nn.Linear(48, 1).state_dict(), folder / "laion.v1.safetensors")
        head = nn.ModuleDict({"layers": aesthetic_layers(48)})
        save_file(head.state_dict(), folder / "laion.v2.safetensors")
