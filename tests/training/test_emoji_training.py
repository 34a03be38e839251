"""The trainings of the emoji model on a handful of drawings: what starts where, what is frozen, what a batch holds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from rwopt.tasks.cases import Case
from training.emoji.drawings import SIDE, Drawings
from training.emoji.measure import attributes_alone
from training.emoji.train_diffusion import EMPTY, LENGTH, Corpus
from training.emoji.train_judges import partners
from training.emoji.train_vae import CHANNELS, TrainDecoder, TrainVAE, widened
from training.emoji.world import BACKGROUNDS, Look, split_of
from training.measuring import as_labels

LOOKS = [Look(style, subject, skin, "man") for style, subject, skin in
         product(("3d", "flat"), ("cook", "pilot", "judge"), ("light", "dark"))]  # fmt: skip


def small(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip


@pytest.fixture
def drawings() -> Drawings:
    """Squares whose colour tells the subject, on nothing."""
    pixels = torch.zeros(len(LOOKS), 4, SIDE, SIDE, dtype=torch.uint8)
    for i, look in enumerate(LOOKS):
        pixels[i, ("cook", "pilot", "judge").index(look.subject), 20:60, 20:60] = 255
        pixels[i, 3, 20:60, 20:60] = 255
    return Drawings(LOOKS, pixels)


def test_a_vae_with_more_channels_is_the_same_function_at_first() -> None:
    old = small(4)
    wide, x = widened(old, 6).eval(), torch.rand(2, 3, 32, 32)
    assert wide.config.latent_channels == 6
    with torch.no_grad():
        one, other = (vae.encode(x).latent_dist for vae in (old, wide))
        torch.testing.assert_close(other.mean[:, :4], one.mean)
        torch.testing.assert_close(other.logvar[:, :4], one.logvar)
        torch.testing.assert_close(wide.decode(other.mean).sample, old.decode(one.mean).sample)
        assert other.mean[:, 4:].std() > 0  # they say something, from which they can learn


def test_every_channel_learns(drawings: Drawings) -> None:
    """From the second step on: until then nothing is made of what the new ones say."""
    module = TrainVAE(widened(small(4), 6), steps=10, rate=1e-2)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    pictures = drawings.compose(*drawings.draw(torch.arange(len(LOOKS)), 4, torch.Generator().manual_seed(0)))
    (optimizer, *_), _ = module.configure_optimizers()
    for step in range(2):
        optimizer.zero_grad()
        module.training_step(pictures, step).backward()
        optimizer.step()
    for layer in (module.vae.encoder.conv_out, module.vae.quant_conv):
        assert bool((layer.weight.grad.flatten(1).abs().amax(1) > 0).all())  # what comes out: means and variances
    for layer in (module.vae.post_quant_conv, module.vae.decoder.conv_in):
        assert bool((layer.weight.grad.abs().amax((0, 2, 3)) > 0).all())  # what goes in


def test_the_decoder_learns_alone(drawings: Drawings) -> None:
    module = TrainDecoder(small(4), steps=10, rate=1e-2)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    pictures = drawings.compose(*drawings.draw(torch.arange(len(LOOKS)), 4, torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in module.vae.state_dict().items()}
    (optimizer, *_), _ = module.configure_optimizers()
    module.training_step(pictures, 0).backward()
    optimizer.step()
    for name, value in module.vae.state_dict().items():
        fixed = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, before[name]) == fixed, name


def test_batches_hold_latents_of_the_captions(
    drawings: Drawings, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("training.emoji.train_diffusion.CACHE", tmp_path)
    vae = small(CHANNELS)
    vae.register_to_config(scaling_factor=2.0)
    corpus = Corpus(drawings, vae, seed=0, poses=1)
    trained = [i for i, look in enumerate(LOOKS) if split_of(look) == "train"]
    assert corpus.latents.shape == (len(trained), len(BACKGROUNDS), 1, CHANNELS, 8, 8)
    x, ids, noise, t = corpus.batch(2000, torch.Generator().manual_seed(0))
    assert (x.shape, ids.shape, noise.shape) == ((2000, CHANNELS, 8, 8), (2000, LENGTH), (2000, CHANNELS, 8, 8))
    assert t.tolist() == sorted(t.tolist())
    assert (int(t[0]), int(t[-1])) == (0, 999)
    said = corpus.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert np.mean([not text for text in said]) == pytest.approx(EMPTY, abs=0.02)
    spots = corpus.latents.float().flatten(0, 2).flatten(1)
    rows = torch.cdist(x.flatten(1), spots).argmin(1)  # which drawing over which background it is
    for text, row in zip(said[:200], rows.tolist(), strict=False):
        look, colour = LOOKS[trained[row // len(BACKGROUNDS)]], list(BACKGROUNDS)[row % len(BACKGROUNDS)]
        words = text.split()
        assert not words or look.subject in words
        assert not {*BACKGROUNDS} & {*words} or colour in words


def test_partners_differ_in_one_attribute(drawings: Drawings) -> None:
    rows = torch.arange(len(LOOKS))
    found = partners(drawings, rows)
    for i, others in enumerate(found.tolist()):
        for j in others:
            fields = [getattr(LOOKS[i], n) != getattr(LOOKS[j], n) for n in ("style", "subject", "skin")]
            assert fields in ([True, False, False], [False, False, True])


def test_what_does_not_apply_has_no_label() -> None:
    def case(hidden: list[str]) -> Case:
        return Case(id="a", caption="a", target={"hair": "bald", "skin": "dark"}, hidden=tuple(hidden))

    cases, attributes = [case([]), case(["hair"])], {"skin": ["light", "dark"], "hair": ["plain", "red", "bald"]}
    assert as_labels(cases, attributes).tolist() == [[1, 2], [1, -1]]
    assert attributes_alone({"subject": 0.1, "skin": 0.8, "hair": 1.0}) == pytest.approx(0.9)
