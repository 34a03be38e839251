"""CLIP's rewards against transformers' own `CLIPModel`, and heads against their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from rwopt.errors import UserError
from rwopt.objectives import clip
from rwopt.objectives.clip import make, shared, specs, tiny
from rwopt.objectives.objective import Batch
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, normalise

PROMPTS = ["a red fox, in the snow", "two cups", "a red fox, in the snow"]


def pictures(seed: int) -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> Batch:
    return Batch(pictures(1), reference=pictures(2), prompts=PROMPTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return CLIPModel.from_pretrained(tiny("clip.t")["model"]).eval()


def logits(model: Any, images: Tensor, prompts: list[str]) -> Tensor:
    """The network's own scaled cosines [pictures, prompts]."""
    words = AutoTokenizer.from_pretrained(tiny("clip.t")["model"])(prompts, padding=True, return_tensors="pt")
    out: Tensor = model(**words, pixel_values=normalise(images, CLIP_MEAN, CLIP_STD)).logits_per_image
    return out


def test_prompts_are_scored_as_by_the_networks_own_logits(model: Any, batch: Batch) -> None:
    images = batch.images.requires_grad_()
    expected = logits(model, images, PROMPTS).diagonal()
    scores = make("pickscore", **tiny("pickscore"))(batch)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(make("clip.t", **tiny("clip.t"))(batch), expected / model.logit_scale.exp())
    slopes, wanted = (torch.autograd.grad(s.sum(), images)[0] for s in (scores, expected))
    torch.testing.assert_close(slopes, wanted, rtol=1e-3, atol=1e-4)


def test_likeness_is_the_cosine_of_image_embeddings(model: Any, batch: Batch) -> None:
    assert batch.reference is not None
    rows = [model.get_image_features(normalise(x, CLIP_MEAN, CLIP_STD)) for x in (batch.images, batch.reference)]
    rows = [row if isinstance(row, Tensor) else row.pooler_output for row in rows]
    objective = make("clip.i", **tiny("clip.i"))
    torch.testing.assert_close(objective(batch), torch.cosine_similarity(*rows))
    torch.testing.assert_close(objective(replace(batch, reference=batch.images)), torch.ones(3))


def test_heads_are_linear_in_the_unit_embedding(batch: Batch) -> None:
    network = shared(*[tiny("clip.t")["model"]] * 2)
    unit = network.images(batch.images).double()
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3, dtype=torch.double))
    one = load_file(tiny("laion.v1")["head"])
    expected = unit @ one["weight"].double().T + one["bias"]
    scores = make("laion.v1", **tiny("laion.v1"))(batch)
    torch.testing.assert_close(scores, expected[:, 0].float(), atol=1e-5, rtol=1e-4)
    five, x = load_file(tiny("laion.v2")["head"]), unit
    for i in (0, 2, 4, 6, 7):
        x = x @ five[f"layers.{i}.weight"].double().T + five[f"layers.{i}.bias"]
    scores = make("laion.v2", **tiny("laion.v2"))(batch)
    torch.testing.assert_close(scores, x[:, 0].float(), atol=1e-5, rtol=1e-4)


def test_the_published_heads_have_that_many_numbers() -> None:
    assert sum(p.numel() for p in clip.aesthetic_layers(768).parameters()) == 927_969  # a file of 3.71 MB
    assert specs()["laion.v2"].sha256 == "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


def test_all_of_one_folder_share_a_network_and_a_pass(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = shared(*[tiny("clip.t")["model"]] * 2), {"pictures": 0, "texts": 0}

    def counted(name: str, kind: str) -> None:
        original = getattr(network.model, name)

        def call(*args: Any, **given: Any) -> Any:
            calls[kind] += 1
            return original(*args, **given)

        monkeypatch.setattr(network.model, name, call)

    counted("get_image_features", "pictures")
    counted("get_text_features", "texts")
    new = replace(batch, images=pictures(11), reference=pictures(12), prompts=["words never seen", "nor these", "one"])
    for _ in range(2):
        for name in ("clip.t", "clip.i", "laion.v1", "laion.v2"):
            make(name, **tiny(name))(new)
    assert calls == {"pictures": 2, "texts": 1}


def test_a_prompt_is_read_as_alone_in_any_order(batch: Batch) -> None:
    objective = make("clip.t", **tiny("clip.t"))
    scores = objective(batch)
    order = [2, 0, 1]
    moved = objective(replace(batch, images=batch.images[order], prompts=[PROMPTS[i] for i in order]))
    torch.testing.assert_close(moved, scores[order])
    long = "a long tale of foxes " * 20
    assert objective(replace(batch, prompts=[long] * 3)).isfinite().all()


def test_heads_of_another_clip_are_refused(tmp_path: Path) -> None:
    save_file(nn.Linear(768, 1).state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"head\.safetensors has other shapes of weight"):
        make("laion.v1", **{**tiny("laion.v1"), "head": str(tmp_path / "head.safetensors")})
    with pytest.raises(UserError, match=r"v1\.safetensors lacks 0\.bias and 9 more"):
        make("laion.v2", **{**tiny("laion.v2"), "head": tiny("laion.v1")["head"]})
    with pytest.raises(UserError, match=r"laion\.v2: \S+ has sha256 \w+, not 21dd590f"):
        make("laion.v2", **{**tiny("laion.v2"), "sha256": ""})


def test_missing_parts_and_unknown_options_are_named() -> None:
    there = tiny("clip.t")["model"]
    assert clip.missing("clip.t", model=there) == ""
    line = clip.missing("laion.v2", model=there)
    assert "sac+logos+ava1-l14-linearMSE.pth" in line
    assert "set the objective's option head" in line
    with pytest.raises(UserError, match=r"^objective clip\.t lacks its model, no/where is no folder"):
        make("clip.t", model="no/where")
    with pytest.raises(UserError, match=r"clip\.t has no option head: it takes model, tokenizer"):
        make("clip.t", head="x")


@pytest.mark.parametrize("name", list(specs()))
def test_what_it_declares(name: str) -> None:
    spec = specs()[name]
    assert spec.differentiable
    assert spec.weights
    assert spec.size > 1e9
    assert clip.missing(name, **tiny(name)) == ""
