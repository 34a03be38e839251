"""`image_reward`: how well people would like a picture for its prompt (Xu et al. 2023, arXiv:2304.05977).

BLIP (ViT-L/16 on 224 pixels, BERT-base with cross-attention to it) and five linear layers on the text's first token;
scores are normalised with the paper's mean and deviation, so that 0 is an average picture. Prompts are cut to 35
tokens, as in the published code.

The published checkpoint is loaded into transformers' own BLIP modules, which compute the same numbers as the package
`image-reward` (`benchmarks/reward_parity.py` holds both against each other), and differentiably on batches. The package
itself is the other backend: it needs an environment of its own, since it runs with no transformers from 4.56 on, nor
without torchvision. The published weights were on no machine that this was written and tested on.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwopt.errors import UserError, one_of
from rwopt.objectives.clip import aesthetic_layers
from rwopt.objectives.frozen import Frozen, still
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, normalise
from rwopt.objectives.weights import Source, filled, measured, options, pretrained, read_state, scratch, tokenizer

NAME = "image_reward"
BACKENDS = ("transformers", "package")
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TOKENS = 35

_FILE = Source("checkpoint", "THUDM/ImageReward", "ImageReward.pt", "Apache-2.0", 1_790_000_000)
_WORDS = Source("tokenizer", "google-bert/bert-base-uncased", "vocab.txt", "Apache-2.0", 232_000, folder=True)

_HEAD = 64
"""Width of one attention head in a ViT-L and in a BERT-base, which shapes do not tell."""

_RENAMES = (
    (r"^mlp\.layers\.", "mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.(cls_token)$", "vision.embeddings.class_embedding"),
    (r"^vision\.(pos_embed)$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
)
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # BLIP's contrastive heads, which the reward does not ask


class ImageReward:
    """A frozen BLIP with its reward head. `images` gives what it sees of pictures, once for the same ones."""

    def __init__(self, vision: Any, text: Any, head: nn.Module, words: Any) -> None:
        self.text, self.words = text, words
        self.head = head
        side: int = vision.config.image_size
        parts = nn.ModuleDict({"vision": vision, "text": text, "head": head})

        def look(images: Tensor) -> Tensor:
            pixels = normalise(centre_crop(images, side), CLIP_MEAN, CLIP_STD)
            seen: Tensor = vision(pixel_values=pixels).last_hidden_state
            return seen

        self.images = Frozen(parts, look)

    def __call__(self, batch: Batch) -> Tensor:
        """Rewards [N] of pictures, each for its own prompt."""
        assert batch.prompts is not None
        seen = self.images(batch.images)
        tokens = worded(self.words, batch.prompts, batch.images.device)
        # the text attends to all of the picture, and both ways to itself
        found = self.text(**tokens, encoder_hidden_states=seen, is_decoder=False).last_hidden_state[:, 0]
        rewards: Tensor = (self.head(found).squeeze(1) - MEAN) / DEVIATION
        return rewards


def worded(words: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Tokens [N, 35] of prompts, with their mask."""
    found = words(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").to(device)
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict under the names of transformers' BLIP: `vision.`, `text.`, `mlp.`."""
    out = {}
    for key, value in state.items():
        if not key.startswith(_UNUSED):
            for pattern, new in _RENAMES:
                key = re.sub(pattern, new, key)
            out[key] = value
    return out


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights under a name, without that name."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def configs_of(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """`BlipVisionConfig` and `BlipTextConfig` of a converted state dict, read off its shapes."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def depth(prefix: str) -> int:
        return len({key.split(".")[3] for key in state if key.startswith(prefix)})

    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    places = state["vision.embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=depth("vision.encoder.layers."), num_attention_heads=width // _HEAD,
        image_size=patch * round(places**0.5), patch_size=patch, layer_norm_eps=1e-6, hidden_act="gelu",
    )  # fmt: skip
    words, broad = state["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=words, hidden_size=broad, encoder_hidden_size=width,
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=depth("text.encoder.layer."), num_attention_heads=broad // _HEAD,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]), layer_norm_eps=1e-12,
        hidden_act="gelu", bos_token_id=words - 2, sep_token_id=min(102, words - 1),
    )  # fmt: skip
    return vision, text


def specs() -> Mapping[str, ObjectiveSpec]:
    spec = ObjectiveSpec(
        NAME, True, True, (float("-inf"), float("inf")), frozenset({"prompts"}), _FILE.licence,
        "ImageReward: what people would like for the prompt, 0 is average, about -2 to 2",
        weights=f"{_FILE.place}/{_FILE.file}", size=_FILE.size + _WORDS.size,
    )  # fmt: skip
    return {NAME: spec}


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return _FILE.missing(name, given.get("checkpoint", "")) or _WORDS.missing(name, given.get("tokenizer", ""))


def make(name: str, **given: Any) -> Objective:
    """The objective. Options, all text:

    checkpoint: the published file; tokenizer: folder or hub id of BERT's uncased tokenizer; backend: "transformers", or
    "package" for `image-reward` (the extra of that name); sha256: what the file must have, "" for no such demand.
    Raises `UserError` where weights are missing or of another network, or the package does not import.
    """
    chosen = options(name, given, {"checkpoint": "", "tokenizer": "", "backend": BACKENDS[0], "sha256": ""})
    one_of(BACKENDS, f"objective {name}: backend", chosen["backend"])
    words = _WORDS.find(name, chosen["tokenizer"])
    path, digest = _FILE.checked(name, chosen["checkpoint"], chosen["sha256"])
    return Objective(replace(specs()[name], sha256=digest), shared(path, words, chosen["backend"], digest))


@lru_cache(maxsize=2)
def shared(path: str, words: str, backend: str, digest: str) -> Callable[[Batch], Tensor]:
    """One network for a file of that content."""
    from transformers import BertTokenizerFast, BlipTextModel, BlipVisionModel

    found = tokenizer(BertTokenizerFast, words)
    if backend == "package":
        return by_package(path, found)
    state = converted(read_state(path))
    with measured(path):
        vision, text = configs_of(state)
    return ImageReward(
        pretrained(BlipVisionModel, path, config=vision, state_dict=part(state, "vision")),
        pretrained(BlipTextModel, path, config=text, state_dict=part(state, "text"), add_pooling_layer=False),
        filled(aesthetic_layers(text.hidden_size), path, part(state, "mlp")),
        found,
    )


def by_package(path: str, words: Any) -> Callable[[Batch], Tensor]:
    """The same reward by the package's own network. It would load any file without a word; here all keys must fit.

    Raises `UserError` if the package does not import.
    """
    try:
        kind = import_module("ImageReward.ImageReward").ImageReward
        blip: Any = import_module("ImageReward.models.BLIP.blip_pretrain")
    except Exception as error:  # it breaks in many ways beside newer transformers, and without torchvision
        raise UserError(
            f"objective {NAME}: backend=package does not import here ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}): use backend=transformers, or pip install rwopt[image-reward] in "
            "an environment of its own with transformers below 4.56"
        ) from None
    original, blip.init_tokenizer = blip.init_tokenizer, lambda: words  # its own asks the hub
    try:
        with tempfile.TemporaryDirectory() as folder:
            network = kind(str(_write_config(Path(folder))), "cpu")
    finally:
        blip.init_tokenizer = original
    still(filled(network, path, read_state(path)))

    def score(batch: Batch) -> Tensor:
        assert batch.prompts is not None
        network.device = batch.images.device
        network.to(network.device)
        tokens = worded(words, batch.prompts, network.device)
        pixels = normalise(centre_crop(batch.images.float(), 224), CLIP_MEAN, CLIP_STD)
        rewards: Tensor = network.score_gard(tokens["input_ids"], tokens["attention_mask"], pixels)
        return rewards.squeeze(1)

    return score


def _write_config(folder: Path) -> Path:
    """What the package reads of its text encoder, a BERT-base with two further words and cross-attention."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    facts = {"vocab_size": 30524, "layer_norm_eps": 1e-12, "encoder_width": 1024, "add_cross_attention": True}
    path = folder / "med_config.json"
    path.write_text(json.dumps({"model_type": "bert", **sizes, **facts}), encoding="utf-8")
    return path


def tiny(name: str) -> dict[str, Any]:
    """Options of the same architecture with two thin layers, a tokenizer of single letters and random weights."""
    folder = scratch("image-reward", _write_tiny)
    return {"checkpoint": str(folder / "tiny.pt"), "tokenizer": str(folder)}


def _write_tiny(folder: Path) -> None:
    write_wordpieces(folder)
    torch.save(random_state(64, 128, (2, 2), side=32, patch=8, words=81), folder / "tiny.pt")


def write_wordpieces(folder: Path) -> None:
    """A BERT tokenizer whose pieces are single letters and digits."""
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def random_state(
    vision: int, text: int, depth: tuple[int, int], side: int, patch: int, words: int
) -> dict[str, Tensor]:
    """Random weights under the published names: widths and layers of both, pixels of a picture's
    and a patch's side, size of the vocabulary."""
    random = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) / math.sqrt(shape[-1])

    def linear(name: str, width: int, out: int) -> dict[str, Tensor]:
        return {f"{name}.weight": new(out, width), f"{name}.bias": 0.1 * new(out)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.1 * new(width), f"{name}.bias": new(width)}

    eye, read = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{eye}.cls_token": new(1, 1, vision), f"{eye}.pos_embed": new(1, (side // patch) ** 2 + 1, vision),
        f"{eye}.patch_embed.proj.weight": new(vision, 3, patch, patch), f"{eye}.patch_embed.proj.bias": new(vision),
        **norm(f"{eye}.norm", vision),
        f"{read}.embeddings.word_embeddings.weight": new(words, text),
        f"{read}.embeddings.position_embeddings.weight": new(512, text),
        f"{read}.embeddings.position_ids": torch.arange(512)[None],
        **norm(f"{read}.embeddings.LayerNorm", text),
        **linear("blip.vision_proj", vision, 256), **linear("blip.text_proj", text, 256),
    }  # fmt: skip
    for i in range(depth[0]):
        name = f"{eye}.blocks.{i}"
        state |= {
            **norm(f"{name}.norm1", vision), **linear(f"{name}.attn.qkv", vision, 3 * vision),
            **linear(f"{name}.attn.proj", vision, vision), **norm(f"{name}.norm2", vision),
            **linear(f"{name}.mlp.fc1", vision, 4 * vision), **linear(f"{name}.mlp.fc2", 4 * vision, vision),
        }  # fmt: skip
    for i in range(depth[1]):
        name = f"{read}.encoder.layer.{i}"
        for kind, source in (("attention", text), ("crossattention", vision)):
            inputs = (("self.query", text), ("self.key", source), ("self.value", source), ("output.dense", text))
            for layer, width in inputs:
                state |= linear(f"{name}.{kind}.{layer}", width, text)
            state |= norm(f"{name}.{kind}.output.LayerNorm", text)
        state |= {
            **linear(f"{name}.intermediate.dense", text, 4 * text),
            **linear(f"{name}.output.dense", 4 * text, text), **norm(f"{name}.output.LayerNorm", text),
        }  # fmt: skip
    sizes = (text, 1024, 128, 64, 16, 1)
    for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        state |= linear(f"mlp.layers.{i}", a, b)
    return state
