"""`hps.v2` against open_clip's network written out with PyTorch's own attention; the true size by count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rwopt.errors import UserError
from rwopt.objectives import hps
from rwopt.objectives.hps import NAME, config_of, converted, make, tiny
from rwopt.objectives.objective import Batch, Objective
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, normalise

PROMPTS = ["a red fox", "two cups, on a table", "a red fox"]


@pytest.fixture(scope="module")
def objective() -> Objective:
    return make(NAME, **tiny(NAME))


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), prompts=PROMPTS)


def written_out(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """Cosines [N] by open_clip's names."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x: Tensor, start: str, heads: int, causal: bool) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1) if causal else None
        for i in range(2):
            name = f"{start}transformer.resblocks.{i}"
            y = norm(x, f"{name}.ln_1").transpose(0, 1)
            out, _ = F.multi_head_attention_forward(
                y, y, y, y.shape[-1], heads, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"],
                None, None, False, 0.0, state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"],
                training=False, need_weights=False, attn_mask=mask,
            )  # fmt: skip
            x = x + out.transpose(0, 1)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
        return x

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = tower(norm(x, "visual.ln_pre"), "visual.", 1, False)
    picture = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    t = tower(state["token_embedding.weight"][ids] + state["positional_embedding"], "", 1, True)
    end = norm(t, "ln_final")[torch.arange(len(ids)), ids.argmax(1)]
    return F.cosine_similarity(picture, end @ state["text_projection"])


def test_scores_and_gradients_are_those_of_open_clips_network(objective: Objective, batch: Batch) -> None:
    letters = {chr(b): b - 33 for b in range(33, 127)}  # a word's last letter is another token

    def tokens(prompt: str) -> list[int]:
        words = prompt.replace(",", " ,").split()
        inside = [letters[c] + (256 if i == len(word) - 1 else 0) for word in words for i, c in enumerate(word)]
        return [512, *inside, 513] + [0] * (75 - len(inside))

    state = torch.load(tiny(NAME)["checkpoint"], weights_only=True)["state_dict"]
    images = batch.images.requires_grad_()
    expected = written_out(state, normalise(images, CLIP_MEAN, CLIP_STD), torch.tensor([tokens(p) for p in PROMPTS]))
    scores = objective(batch)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    slopes, wanted = (torch.autograd.grad(s.sum(), images)[0] for s in (scores, expected))
    torch.testing.assert_close(slopes, wanted, rtol=1e-3, atol=1e-5)


def test_it_sees_the_whole_of_a_wide_picture(objective: Objective, batch: Batch) -> None:
    wide = torch.rand(3, 3, 32, 96)
    edge = wide.clone()
    edge[..., :8] = 1 - edge[..., :8]  # outside the middle square
    assert (objective(replace(batch, images=wide)) - objective(replace(batch, images=edge))).abs().min() > 1e-4


def test_the_true_size_is_known_by_its_shapes() -> None:
    """ViT-H/14 on 224 pixels: 986.1 million numbers."""
    from transformers import CLIPModel

    with torch.device("meta"):
        state = {
            "visual.conv1.weight": torch.empty(1280, 3, 14, 14), "visual.positional_embedding": torch.empty(257, 1280),
            "visual.proj": torch.empty(1280, 1024), "positional_embedding": torch.empty(77, 1024),
            "token_embedding.weight": torch.empty(49408, 1024),
            **{f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": torch.empty(5120, 1280) for i in range(32)},
            **{f"transformer.resblocks.{i}.mlp.c_fc.weight": torch.empty(4096, 1024) for i in range(24)},
        }  # fmt: skip
        config = config_of(converted(state))
        model = CLIPModel(config)
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 16
    assert sum(p.numel() for p in model.parameters()) == 986_109_441


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = torch.load(tiny(NAME)["checkpoint"], weights_only=True)["state_dict"]
    for change, message in (
        ({"logit_scale": None}, r"lacks logit_scale: "),
        ({"visual.attnpool.weight": torch.ones(1)}, r"has too much visual\.attnpool\.weight: "),
        ({"visual.conv1.weight": None}, r"lacks vision_model\.embeddings\.patch_embedding\.weight: "),
    ):
        torch.save({key: v for key, v in {**state, **change}.items() if v is not None}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            make(NAME, **{**tiny(NAME), "checkpoint": str(tmp_path / "x.pt")})


def test_missing_parts_are_named() -> None:
    assert hps.missing(NAME, **tiny(NAME)) == ""
    line = hps.missing(NAME, checkpoint="no.pt")
    assert "HPS_v2.1_compressed.pt of xswu/HPSv2 (Apache-2.0, 1.97 GB)" in line
