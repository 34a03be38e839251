"""Models: what the stock pipeline's parts say, noise levels, number formats; and the judges' network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers.embedded import models
from helpers.tiny import save_tiny_pipeline
from torch.nn import functional

import rwopt.models as models_room
from rwopt.embedded import FOLDERS
from rwopt.errors import UserError
from rwopt.models import Model, load_model
from rwopt.models.judge import Judge, Verdict
from rwopt.schedule.noise import noise_block, noise_table
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import Case
from rwopt.unet.attachment import Attachment

PROMPTS = ["portrait, tan skin, long red hair, glasses", "", "portrait, beard"]
PROMPTS.append(PROMPTS[0])


def test_encoding_equals_the_stock_pipeline(avatars: Model) -> None:
    stock = StableDiffusionPipeline(
        avatars.vae, avatars.text_encoder, avatars.tokenizer, avatars.unet, avatars.scheduler, None, None,
        requires_safety_checker=False,
    )  # type: ignore[no-untyped-call] # fmt: skip
    expected, _ = stock.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    got = avatars.encode(PROMPTS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0], got[3])
    assert torch.equal(got[[2, 1]], avatars.encode([PROMPTS[2], PROMPTS[1]]))  # order is the caller's, not the memory's
    assert not got.requires_grad
    assert avatars.encode(["portrait " * 200]).shape == got[:1].shape  # too long is cut, as stock does


def test_pictures_and_latents(avatars: Model) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    z = avatars.latents(pictures)
    assert z.shape == (3, *avatars.latent_shape)
    assert z.dtype == torch.float32
    with torch.no_grad():
        expected = avatars.vae.encode(pictures * 2 - 1).latent_dist.mean * avatars.vae.config.scaling_factor
        raw = avatars.vae.decode(z / avatars.vae.config.scaling_factor).sample
    torch.testing.assert_close(z, expected)
    back = avatars.decode(z)
    assert back.shape == pictures.shape
    assert back.dtype == torch.float32
    assert 0 <= float(back.min()) <= float(back.max()) <= 1
    torch.testing.assert_close(back, ((raw + 1) / 2).clamp(0, 1))
    torch.testing.assert_close(avatars.decode(z, batch=2), back, rtol=1e-4, atol=1e-5)


def test_decoding_is_differentiable_where_gradients_are_on(avatars: Model) -> None:
    z = torch.randn(1, *avatars.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.autograd.grad(avatars.decode(z).mean(), z)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not avatars.decode(z).requires_grad


def test_noise_levels_are_those_of_schedules(avatars: Model) -> None:
    table = noise_table(noise_block(avatars.scheduler))
    steps = [0, 1, 250, 500, 998, 999]
    np.testing.assert_allclose([avatars.sigma(t) for t in steps], table[steps], rtol=1e-4)  # abar is float32
    assert len(avatars.alphas_cumprod) == len(table) == 1000
    np.testing.assert_allclose(((1 - avatars.alphas_cumprod) / avatars.alphas_cumprod).sqrt(), table, rtol=1e-4)


def test_parts_are_frozen_and_whole(avatars: Model) -> None:
    for part in (avatars.unet, avatars.vae, avatars.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
        assert all(p.dtype == torch.float32 for p in part.parameters())
    card = avatars.card()
    assert card["base_model"] == "avatars"
    assert card["unet_class"] == "UNet2DConditionModel"
    assert len(card["config_sha256"]) == 64


def test_bfloat16_is_close_to_float32(avatars: Model) -> None:
    small = load_model("avatars", device="cpu", dtype="bfloat16")
    assert small.dtype == torch.bfloat16
    assert next(small.vae.parameters()).dtype == next(small.text_encoder.parameters()).dtype == torch.float32
    assert small.card() == avatars.card()
    x = torch.randn(2, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    text = avatars.encode(PROMPTS[:2])
    assert torch.equal(small.encode(PROMPTS[:2]), text)
    with torch.no_grad(), Attachment(avatars.unet, ()) as exactly, Attachment(small.unet, ()) as roundly:
        exact = exactly(x, 600, text)
        rounded = roundly(x.bfloat16(), 600, text.bfloat16()).float()
    # 8 bits of significand: 0.4 % a rounding, which add up to a few per cent over some hundred layers
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("name", models())
def test_stock_diffusers_loads_and_samples_an_embedded_model_with_no_argument(name: str) -> None:
    """Stored in half precision; the text encoder's configuration says float32, since transformers 5 goes by it."""
    pipe = DiffusionPipeline.from_pretrained(FOLDERS[name])
    model = load_model(name, "cpu", "float32")
    generator = torch.Generator().manual_seed(0)
    picture = pipe("a portrait", num_inference_steps=4, generator=generator, output_type="np").images[0]
    assert picture.shape == (*model.picture_size, 3) == (64, 64, 3)
    assert picture.std() > 0.05
    assert pipe.text_encoder.dtype == pipe.unet.dtype == pipe.vae.dtype == torch.float32
    with torch.no_grad():
        text, _ = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    torch.testing.assert_close(text, model.encode(PROMPTS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "latents"), [([8, 12], (8, 12)), (None, (8, 8)), (8, (8, 8))])
def test_sizes_in_every_form(tmp_path: Path, size: Any, latents: tuple[int, int]) -> None:
    place = save_tiny_pipeline(tmp_path)
    config = json.loads((place / "unet" / "config.json").read_text())
    (place / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": size}))
    model = load_model(str(place), "cpu", "float32")
    assert model.latent_shape == (4, *latents)
    assert model.picture_size == tuple(8 * n for n in latents)
    pictures = make_task("generation", model, [Case("a", "portrait")], 2).images(Dials())
    assert pictures.shape == (1, 3, *model.picture_size)


def test_the_end_of_a_prompt_that_does_nothing(avatars: Model) -> None:
    short = "portrait, pale skin, long red hair, mint background"
    assert avatars.lost_words(short) == ""
    long = "portrait, " * 15 + short
    lost = avatars.lost_words(long)
    assert lost.replace(" ", "").endswith("mintbackground")
    assert torch.equal(avatars.encode([long]), avatars.encode(["portrait, " * 15 + "portrait"]))
    kept = avatars.tokenizer(long, truncation=True, max_length=avatars.tokenizer.model_max_length).input_ids
    assert len(kept) == avatars.tokenizer.model_max_length


# --- the judges' network


@pytest.mark.parametrize("name", ["scorer", "judge"])
@pytest.mark.parametrize("model", models())
def test_verdict(model: str, name: str) -> None:
    judge = Judge.load(name, model)
    assert not any(p.requires_grad for p in judge.parameters())
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    verdict = judge(pictures)
    assert verdict.realism.shape == (3,)
    torch.testing.assert_close(verdict.embedding.norm(dim=1), torch.ones(3))
    for attribute, values in judge.attributes.items():
        assert verdict.logits[attribute].shape == (3, len(values))
        shares = [verdict.probability(attribute, judge.indices(attribute, [v] * 3)) for v in values]
        torch.testing.assert_close(torch.stack(shares).sum(0), torch.ones(3))
    larger = judge(pictures.repeat_interleave(2, -1).repeat_interleave(2, -2))  # any size is judged at its own
    assert larger.realism.shape == (3,)


@pytest.mark.parametrize("model", models())
def test_the_held_out_judge_is_another_network(model: str) -> None:
    scorer, judge = Judge.load("scorer", model), Judge.load("judge", model)
    assert scorer.width != judge.width
    assert scorer.attributes == judge.attributes


def test_temperature_divides_logits() -> None:
    judge = Judge({"mouth": ["smile", "serious"], "eyes": ["calm", "wide"]}, width=8, embedding=4).eval()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = judge(pictures).logits
    judge.temperature[1] = 2.0
    after = judge(pictures).logits
    assert torch.equal(after["mouth"], before["mouth"])
    torch.testing.assert_close(after["eyes"], before["eyes"] / 2)


def test_a_judge_is_saved_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge({"mouth": ["smile", "serious"]}, width=8, embedding=4, hidden=12).eval()
    judge.save(tmp_path / "mine")
    again = Judge.load(tmp_path / "mine")
    assert (again.attributes, again.size, again.real.in_features) == (judge.attributes, 64, 12)
    for name, value in judge.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())


def test_a_judge_sees_pictures_of_its_own_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge({"mouth": ["smile", "serious"]}, width=8, embedding=4, size=96)
    judge.save(tmp_path / "judge")
    again = Judge.load("judge", str(tmp_path))
    assert again.size == 96
    pictures = torch.rand(2, 3, 48, 80)
    fitted = functional.interpolate(pictures, (96, 96), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(again(pictures).realism, again(fitted).realism)
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    del config["size"]  # as judges were written before they had one: it means 64, whose neck is smaller
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch for neck"):
        Judge.load("judge", str(tmp_path))
    with pytest.raises(UserError, match="judge: size=72: give a multiple of 16"):
        Judge({"mouth": ["smile"]}, size=72)


def test_among_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 2.0]])
    verdict = Verdict({"mouth": logits}, torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1))
    value = torch.tensor([2, 3])
    assert [verdict.among("mouth", value, k).tolist() for k in (1, 2)] == [[False, True], [True, True]]
    order = logits.argsort(1, descending=True)
    for index in range(4):
        for k in range(1, 5):
            expected = (order[:1, :k] == index).any(1)  # the row without ties
            assert torch.equal(verdict.among("mouth", torch.tensor([index, index]), k)[:1], expected)


def test_unknown_judges_and_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use scorer, judge, or such a folder"):
        Judge.load(tmp_path)
    with pytest.raises(UserError, match=r"^model .* has no scorer: use avatars.*, or a folder with scorer/ and "):
        Judge.load("scorer", str(tmp_path))
    judge = Judge({"mouth": ["smile", "serious"]}, width=8, embedding=4)
    with pytest.raises(UserError, match="attribute mouth=grin is unknown to the judges: use smile, serious"):
        judge.indices("mouth", ["smile", "grin"])


@pytest.mark.parametrize("name", models())
def test_an_embedded_model_is_small(name: str) -> None:
    size = sum(f.stat().st_size for f in FOLDERS[name].rglob("*") if f.is_file())
    assert size < 60e6


def test_the_folder_of_the_default_model_has_a_name() -> None:
    assert {path.name for path in models_room.EMBEDDED.iterdir()} >= {"unet", "vae", "tokenizer", "scorer", "judge"}
