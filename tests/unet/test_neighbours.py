"""FreeU and Skip-Tuning as schedules: equal to the originals, and switched by noise level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle import recompute
from helpers.small import make_tiny_unet
from helpers.twins import Twin, make
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule.noise import noise_table
from rwopt.unet.apply import apply
from rwopt.unet.neighbours import freeu, skip_tuning
from rwopt.unet.sites import list_sites, skip_channels

NOISE = {"beta_schedule": "scaled_linear"}
CONSTANTS = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}


def tiny(size: int) -> Twin:
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, 12, generator=draw)
    return Twin(make_tiny_unet(), torch.randn(2, 4, size, size, generator=draw), {"encoder_hidden_states": text})


@pytest.mark.parametrize("name", ["tiny", "tiny, 12 x 12", "sd", "sdxl", "motion", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_constant_variant_is_that_of_diffusers_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    twin = tiny(12 if "12" in name else 8) if name.startswith("tiny") else make(name)
    twin.unet.to(dtype)
    twin.x, twin.rest = twin.x.to(dtype), _to(twin.rest, dtype)
    plain = twin()
    with apply(twin.unet, freeu(twin.unet, **CONSTANTS, noise=NOISE)):
        ours = twin()
    for block in twin.unet.up_blocks:  # what enable_freeu() sets; the video classes have it as a method of their own
        for key, value in CONSTANTS.items():
            setattr(block, key, value)
    assert torch.equal(ours, twin())
    assert not torch.equal(ours, plain)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return {k: _to(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value.to(dtype)


@torch.no_grad()
def test_the_structure_variant_is_that_of_the_authors() -> None:
    twin = make("sd")
    with apply(twin.unet, freeu(twin.unet, **CONSTANTS, variant="structure", noise=NOISE)):
        ours = twin()
    for path, (stream, _) in skip_channels(twin.unet).items():
        if stream in (16, 8):
            gains = (1.3, 0.9) if stream == 16 else (1.4, 0.2)
            twin.unet.get_submodule(path).register_forward_pre_hook(_authors(stream, *gains))
    torch.testing.assert_close(ours, twin(), rtol=1e-5, atol=1e-6)


def _authors(stream: int, b: float, s: float) -> Any:
    """The authors' lines (free_lunch_utils.py), here as an own hook."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> Any:
        h, skip = args[0][:, :stream].clone(), args[0][:, stream:]
        mean = h.mean(1).unsqueeze(1)
        rows = mean.shape[0]
        high = torch.max(mean.view(rows, -1), dim=-1, keepdim=True)[0].unsqueeze(2).unsqueeze(3)
        low = torch.min(mean.view(rows, -1), dim=-1, keepdim=True)[0].unsqueeze(2).unsqueeze(3)
        h[:, : stream // 2] = h[:, : stream // 2] * ((b - 1) * (mean - low) / (high - low) + 1)
        freq = torch.fft.fftshift(torch.fft.fftn(skip, dim=(-2, -1)), dim=(-2, -1))
        row, column = freq.shape[-2] // 2, freq.shape[-1] // 2
        freq[..., row - 1 : row + 1, column - 1 : column + 1] *= s
        skip = torch.fft.ifftn(torch.fft.ifftshift(freq, dim=(-2, -1)), dim=(-2, -1)).real
        return (torch.cat([h, skip], 1), *args[1:])

    return hook


@torch.no_grad()
def test_skip_tuning_scales_each_skip() -> None:
    twin = make("sd").double()
    schedule = skip_tuning(twin.unet, 0.6, 0.9, noise=NOISE)
    assert list(schedule.sites) == [site.id for site in list_sites(twin.unet, ("skip",))]
    assert schedule.weights[0, [0, -1]].tolist() == [0.6, 0.9]
    with apply(twin.unet, schedule):
        ours = twin()
    named = dict(zip(schedule.sites, schedule.weights[0].tolist(), strict=True))
    expected = recompute(twin.unet, twin.x, 500, named, **twin.args())
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_window_of_noise_levels() -> None:
    twin, table = make("sd"), noise_table(NOISE)
    plain = {t: twin(t) for t in (900, 500, 100)}
    always = freeu(twin.unet, **CONSTANTS, noise=NOISE)
    with apply(twin.unet, always):
        acting = {t: twin(t) for t in plain}
    windowed = freeu(twin.unet, **CONSTANTS, window=(float(table[600]), float(table[300])), noise=NOISE)
    with apply(twin.unet, windowed):
        for t, inside in ((900, False), (500, True), (100, False)):
            assert torch.equal(twin(t), (acting if inside else plain)[t])
    with pytest.raises(UserError, match=r"window 1 \.\. 2 is empty"):
        skip_tuning(twin.unet, 0.5, window=(1.0, 2.0))
    with pytest.raises(UserError, match="'odd' is unknown"):
        freeu(twin.unet, **CONSTANTS, variant="odd")
