"""The trainings of the emoji model on a handful of drawings: what starts where, what is frozen, what a batch holds."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from rwopt.tasks.cases import Case
from training.common import Batches
from training.emoji.drawings import SIDE, Drawings
from training.emoji.measure import attributes_alone
from training.emoji.stages import command_line
from training.emoji.train_diffusion import EMPTY, LENGTH, Corpus
from training.emoji.train_judges import partners
from training.emoji.train_vae import TrainDecoder, pruned
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


def test_channels_of_which_nothing_is_made_are_cut() -> None:
    """Latents are the same to rounding; reconstructions, too, where no bias meets the border's zeros."""
    old, x = small(4), torch.rand(8, 3, 64, 64)
    with torch.no_grad():
        old.post_quant_conv.weight[:, [0, 2]] = 0
        old.post_quant_conv.weight[:, 2] = 1e-5
        old.post_quant_conv.bias.zero_()
        few = pruned(old, x, least=1e-7)
        assert few.config.latent_channels == 2
        one, other = (vae.encode(x * 2 - 1).latent_dist for vae in (old, few))
        torch.testing.assert_close(other.mean, one.mean[:, [1, 3]])
        torch.testing.assert_close(other.logvar, one.logvar[:, [1, 3]])
        torch.testing.assert_close(few.decode(other.mean).sample, old.decode(one.mean).sample, atol=1e-3, rtol=0)
        old.post_quant_conv.bias.normal_(std=0.1)  # not in the span of what is kept: only the middle stays
        few = pruned(old, x, least=1e-7)
        z, inner = one.mean, slice(1, -1)
        first, then = (vae.decoder.conv_in(vae.post_quant_conv(v)) for vae, v in ((old, z), (few, z[:, [1, 3]])))
        torch.testing.assert_close(then[..., inner, inner], first[..., inner, inner], atol=1e-4, rtol=0)


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
    vae = small(4)
    vae.register_to_config(scaling_factor=2.0)
    corpus = Corpus(drawings, vae, seed=0, poses=1)
    trained = [i for i, look in enumerate(LOOKS) if split_of(look) == "train"]
    assert corpus.latents.shape == (len(trained), len(BACKGROUNDS), 1, 4, 8, 8)
    x, ids, noise, t = corpus.batch(2000, torch.Generator().manual_seed(0))
    assert (x.shape, ids.shape, noise.shape) == ((2000, 4, 8, 8), (2000, LENGTH), (2000, 4, 8, 8))
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


def test_a_resumed_run_sees_what_it_would_have_seen_and_processes_see_batches_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(start: int = 0) -> list[float]:
        return list(Batches(lambda rng: rng.random(), seed=3, steps=3, start=start))

    alone = draw()
    assert draw(1) == alone[1:]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert draw() == alone
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not {*draw()} & {*alone}
    assert draw(1) == draw()[1:]


def test_drawings_that_are_one(drawings: Drawings) -> None:
    """Here only the subject makes a difference, so that an edit of the skin would have nothing to show."""
    for one, other in product(range(len(LOOKS)), repeat=2):
        assert drawings.same(one, other) == (LOOKS[one].subject == LOOKS[other].subject)


@pytest.mark.parametrize(
    ("words", "shared", "said"),
    [
        (["--processes", "2", "--minutes", "9"], True, "--processes: give --steps, not --minutes"),
        (["--processes", "2"], False, "unrecognized arguments: --processes 2"),
    ],
)
def test_processes_that_would_not_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], shared: bool, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit, match="2"):
        command_line(None, 10, 4, 1e-3, shared=shared)
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", "--minutes", "9"])
    assert command_line(None, 10, 4, 1e-3, shared=shared).minutes == 9
