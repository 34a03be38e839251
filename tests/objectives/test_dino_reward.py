"""DINO's objectives against transformers' own outputs and the formulas of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Model, ViTModel

from rwopt.errors import UserError
from rwopt.objectives import dino
from rwopt.objectives.dino import make, tiny
from rwopt.objectives.objective import Batch
from rwopt.objectives.preprocess import IMAGENET_MEAN, IMAGENET_STD, centre_crop, normalise


def pictures(seed: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_identity_is_the_cosine_of_the_pooled_outputs() -> None:
    model = Dinov2Model.from_pretrained(tiny("dino.identity")["model"]).eval()
    images, reference = pictures(1, 256, 300), pictures(2, 256, 300)
    a, b = (model(normalise(centre_crop(x, 224, 256), IMAGENET_MEAN, IMAGENET_STD)).pooler_output
            for x in (images, reference))  # fmt: skip
    objective = make("dino.identity", **tiny("dino.identity"))
    scores = objective(Batch(images, reference=reference))
    torch.testing.assert_close(scores, torch.cosine_similarity(a, b))
    assert (scores < 0.9999).all()
    torch.testing.assert_close(objective(Batch(images, reference=images)), torch.ones(2))


def keys(model: Any, pixels: Tensor) -> Tensor:
    """The last layer's keys [N, T, D], from its input."""
    seen = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    named = dict(model.named_parameters())
    start = [name for name in named if "layernorm_before.weight" in name or "layer_norm1.weight" in name][-1]
    norm = torch.nn.functional.layer_norm(
        seen, seen.shape[-1:], named[start], named[start.replace("weight", "bias")], model.config.layer_norm_eps
    )
    key = [name for name in named if name.endswith((".k_proj.weight", ".key.weight"))][-1]
    return norm @ named[key].T + named[key.replace("weight", "bias")]


def written_out(model: Any, images: Tensor, reference: Tensor, scale: float) -> list[float]:
    """Mean squared difference of the cosines between all pairs of tokens, one picture and pair at a time."""
    out = []
    for i in range(len(images)):
        maps = []
        for x in (images, reference):
            k = keys(model, normalise(scale * x[i : i + 1], IMAGENET_MEAN, IMAGENET_STD))[0].double()
            maps.append(torch.stack([torch.cosine_similarity(row, k, dim=1) for row in k]))
        out.append(float((maps[0] - maps[1]).square().mean()))
    return out


@pytest.mark.parametrize(("protocol", "scale"), [("plain", 1.0), ("pie-bench", 255.0)])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@torch.no_grad()
def test_structure_is_the_formula(protocol: str, scale: float, size: tuple[int, int]) -> None:
    model = ViTModel.from_pretrained(tiny("dino.structure")["model"], add_pooling_layer=False).eval()
    images, reference = pictures(1, *size), pictures(2, *size)
    objective = make("dino.structure", **tiny("dino.structure"), protocol=protocol)
    scores = objective(Batch(images, reference=reference))
    assert scores.tolist() == pytest.approx(written_out(model, images, reference, scale), rel=1e-3)
    assert (objective(Batch(images, reference=images)) == 0).all()


def test_the_protocols_differ_in_filter_and_scale() -> None:
    batch = Batch(pictures(1, 80, 80), reference=pictures(2, 80, 80))
    plain, bench = (make("dino.structure", **tiny("dino.structure"), protocol=p)(batch) for p in dino.PROTOCOLS)
    assert (plain / bench - 1).abs().min() > 0.05


def test_layout_moves_more_than_brightness() -> None:
    """Random weights suffice for that: a flip moves the tokens, a darker picture keeps their order."""
    images = torch.nn.functional.interpolate(pictures(3, 4, 4), (64, 64), mode="bilinear")
    objective = make("dino.structure", **tiny("dino.structure"))
    darker, flipped = (objective(Batch(x, reference=images)) for x in (0.95 * images, images.flip(-1)))
    assert (darker < flipped).all()


def test_no_hook_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("dino.structure", **tiny("dino.structure"))
    frozen = dino.self_similarity(tiny("dino.structure")["model"], "plain")
    images = pictures(5).requires_grad_()
    objective(Batch(images, reference=pictures(6))).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in frozen.network.modules())


def test_missing_parts_and_wrong_options_are_named() -> None:
    assert "facebook/dino-vitb8 (Apache-2.0, 343 MB)" in dino.missing("dino.structure", model="no/where")
    with pytest.raises(UserError, match=r"protocol=pie_bench: did you mean pie-bench\?"):
        make("dino.structure", **tiny("dino.structure"), protocol="pie_bench")
    with pytest.raises(UserError, match=r"dino\.identity has no option protocol"):
        make("dino.identity", **tiny("dino.identity"), protocol="plain")
    with pytest.raises(UserError, match=r"dino\.identity lacks \S+ and \d+ more: it is of another network"):
        make("dino.structure", model=tiny("dino.identity")["model"])
