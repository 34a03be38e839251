"""`image_reward` against BLIP and the reward head written out from the papers, at a small size; the true size by count.

`benchmarks/reward_parity.py` holds it against the package itself.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rwopt.errors import UserError
from rwopt.objectives import image_reward
from rwopt.objectives.image_reward import DEVIATION, MEAN, NAME, configs_of, make, random_state, tiny
from rwopt.objectives.objective import Batch, Objective
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, normalise

PROMPTS = ["a red fox", "two cups, on a table", "a red fox"]


@pytest.fixture(scope="module")
def objective() -> Objective:
    return make(NAME, **tiny(NAME))


@pytest.fixture
def batch() -> Batch:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch(images, prompts=PROMPTS)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of [N, T, D] with `heads` heads; mask [N, T] of 0 and 1."""
    n, _, width = query.shape
    q, k, v = (x.reshape(n, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT / (width // heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, -1, width)


def written_out(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Rewards [N] by the published names: ViT with norms first, BERT with norms last and cross-attention, the head."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eye, read = "blip.visual_encoder", "blip.text_encoder"
    patches = state[f"{eye}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, patches, state[f"{eye}.patch_embed.proj.bias"], stride=patches.shape[-1])
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + state[f"{eye}.pos_embed"]
    for i in range(2):
        name = f"{eye}.blocks.{i}"
        qkv = linear(norm(x, f"{name}.norm1", 1e-6), f"{name}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(*qkv, heads=x.shape[-1] // 64), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    x = norm(x, f"{eye}.norm", 1e-6)
    places = state[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    t = norm(state[f"{read}.embeddings.word_embeddings.weight"][ids] + places, f"{read}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        name = f"{read}.encoder.layer.{i}"
        for kind, source, seen in (("attention", None, mask), ("crossattention", x, None)):
            start = f"{name}.{kind}"
            of = t if source is None else source
            parts = linear(t, f"{start}.self.query"), linear(of, f"{start}.self.key"), linear(of, f"{start}.self.value")
            found = linear(attention(*parts, heads=t.shape[-1] // 64, mask=seen), f"{start}.output.dense")
            t = norm(t + found, f"{start}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(t, f"{name}.intermediate.dense"))
        t = norm(t + linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm", 1e-12)
    y = t[:, 0]
    for i in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{i}")
    return (y[:, 0] - MEAN) / DEVIATION


def test_rewards_and_gradients_are_those_of_the_formulas(objective: Objective, batch: Batch) -> None:
    from transformers import BertTokenizerFast

    words = BertTokenizerFast.from_pretrained(tiny(NAME)["tokenizer"])(PROMPTS, padding=True, return_tensors="pt")
    state = torch.load(tiny(NAME)["checkpoint"], weights_only=True)
    images = batch.images.requires_grad_()
    expected = written_out(state, normalise(images, CLIP_MEAN, CLIP_STD), words.input_ids, words.attention_mask)
    scores = objective(batch)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    slopes, wanted = (torch.autograd.grad(s.sum(), images)[0] for s in (scores, expected))
    torch.testing.assert_close(slopes, wanted, rtol=1e-3, atol=1e-4)
    assert wanted.abs().amax((1, 2, 3)).min() > 0.01


def test_prompts_are_cut_to_35_tokens(objective: Objective, batch: Batch) -> None:
    words = [*"abcdefghijklmnopqrstuvwxyz0123456"]  # with both ends: 35

    def scores(*prompts: list[str]) -> Tensor:
        return objective(replace(batch, prompts=[" ".join(p) for p in prompts]))

    a, b, c = scores(words, words, words).tolist()
    longer = scores([*words, "z"], [*words, "q"], [*words[:-1], "z"]).tolist()
    assert longer[:2] == pytest.approx([a, b], abs=1e-5)
    assert longer[2] != pytest.approx(c, abs=1e-4)


def test_the_true_size_is_known_by_its_shapes() -> None:
    """ViT-L/16 on 224 pixels and a BERT-base with cross-attention; 446.7 million numbers with the two unused heads."""
    from transformers import BlipTextModel, BlipVisionModel

    with torch.device("meta"):
        state = {
            "vision.embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16),
            "vision.embeddings.position_embedding": torch.empty(1, 197, 1024),
            "text.embeddings.word_embeddings.weight": torch.empty(30524, 768),
            "text.embeddings.position_embeddings.weight": torch.empty(512, 768),
            **{f"vision.encoder.layers.{i}.mlp.fc1.weight": torch.empty(4096, 1024) for i in range(24)},
            **{f"text.encoder.layer.{i}.intermediate.dense.weight": torch.empty(3072, 768) for i in range(12)},
        }
        vision, text = configs_of(state)
        towers = (BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False))
        parts = (*towers, image_reward.aesthetic_layers(768))
    assert (vision.num_attention_heads, text.num_attention_heads, vision.image_size) == (16, 12, 224)
    numbers = sum(p.numel() for part in parts for p in part.parameters())
    unused = (1024 + 1) * 256 + (768 + 1) * 256
    assert round((numbers + unused) / 1e6, 1) == 446.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.layers.7.bias": None}, r"lacks 7\.bias"),
        ({"blip.text_encoder.encoder.layer.1.output.dense.bias": None}, r"lacks encoder\.layer\.1\.output\."),
        ({"blip.visual_encoder.blocks.0.attn.rel_pos": torch.ones(1)}, r"has too much encoder\.layers\.0\."),
        ({"blip.visual_encoder.cls_token": torch.ones(1, 1, 3)}, r"has other shapes of embeddings\.class_embedding"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = torch.load(tiny(NAME)["checkpoint"], weights_only=True)
    torch.save({key: v for key, v in {**state, **change}.items() if v is not None}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as caught:
        make(NAME, **{**tiny(NAME), "checkpoint": str(tmp_path / "x.pt")})
    assert "\n" not in str(caught.value)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"lacks vision\.\S+: it is of another network"):
        make(NAME, **{**tiny(NAME), "checkpoint": str(tmp_path / "x.pt")})


def test_what_was_loaded_is_on_record(objective: Objective) -> None:
    assert objective.spec.sha256 is not None
    assert make(NAME, **tiny(NAME), sha256=objective.spec.sha256[:12]).function is objective.function  # one network
    with pytest.raises(UserError, match=r"has sha256 \w+, not 123456: "):
        make(NAME, **tiny(NAME), sha256="123456")


def test_the_package_is_asked_only_where_it_imports() -> None:
    try:
        importlib.import_module("ImageReward.ImageReward")
    except Exception:
        with pytest.raises(UserError, match=r"backend=package does not import here \(\w+: .*transformers below 4\.56$"):
            make(NAME, **tiny(NAME), backend="package")
    else:
        pytest.skip("image-reward imports here: benchmarks/reward_parity.py compares both backends")
    with pytest.raises(UserError, match=r"backend=hf: did you mean"):
        make(NAME, **tiny(NAME), backend="hf")


def test_missing_parts_are_named_one_by_one() -> None:
    there = tiny(NAME)
    assert image_reward.missing(NAME, **there) == ""
    assert "ImageReward.pt of THUDM/ImageReward (Apache-2.0, 1.79 GB)" in image_reward.missing(NAME, checkpoint="no.pt")
    assert "option tokenizer" in image_reward.missing(NAME, checkpoint=there["checkpoint"], tokenizer="no/where")


def test_random_weights_have_the_published_names() -> None:
    state = random_state(64, 128, (1, 1), side=16, patch=8, words=9)
    for name in ("blip.visual_encoder.blocks.0.attn.qkv.weight", "blip.text_proj.weight", "mlp.layers.7.bias",
                 "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"):  # fmt: skip
        assert name in state
