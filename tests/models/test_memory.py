"""Counting on fake tensors against PyTorch's own tracker, and what keeps activations few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import VAE
from diffusers import AutoencoderKL
from helpers.small import make_tiny_unet
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from rwopt.models import Model, memory
from rwopt.models.memory import LARGE, Live, call_bytes, checkpointed_blocks, counting, feature_map, twin
from rwopt.unet.sites import list_sites


def switches(net: nn.Module) -> list[bool]:
    return [m.gradient_checkpointing for m in net.modules() if hasattr(m, "gradient_checkpointing")]


def test_storages_count_while_they_live_and_once() -> None:
    with Live() as live:
        a = torch.empty(1000)  # 4000 bytes are 8 x 512
        assert live.now == 4096
        view = a[:10].add_(1).view(5, 2)
        assert live.now == 4096
        del a
        assert live.now == 4096
        b = torch.empty(128) + torch.empty(128)
        assert (live.now, live.peak) == (4096 + 512, 4096 + 3 * 512)
        del view, b
        assert live.now == 0
    torch.empty(1000)
    assert live.now == 0


@pytest.mark.parametrize("inner", [False, True])
def test_the_count_is_pytorchs_own(inner: bool) -> None:
    """`MemTracker` takes no frozen networks, so none of rwopt's, and many seconds for a U-Net; it does not round up."""

    def work() -> None:
        layers = [nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1)]
        y, blocks = torch.empty(8, 4, 32, 32), [nn.Sequential(*layers[:3]), nn.Sequential(*layers[2:])]
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False) if inner else block(y)
        y.square().sum().backward()  # type: ignore[no-untyped-call]

    with counting() as live:
        work()
    with torch._subclasses.FakeTensorMode(), MemTracker() as theirs:
        work()
    (found,) = (device["Total"] for device in theirs.get_tracker_snapshot("peak").values())
    assert found <= live.peak < 1.01 * found


def test_a_twin_is_like_its_original_and_takes_nothing() -> None:
    real = make_tiny_unet().to(torch.bfloat16)
    with counting():
        fake = twin(real)
        assert [(n, p.shape, p.dtype) for n, p in fake.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in real.named_parameters()
        ]
        assert not any(p.requires_grad for p in fake.parameters())
        x, text = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16), torch.empty(2, 5, 12, dtype=torch.bfloat16)
        assert fake(x, 3, text).sample.shape == x.shape


def test_a_call_takes_memory_in_proportion_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("tiny", make_tiny_unet(), None, None, None, None, torch.device("cpu"))
    sites = tuple(site.id for site in list_sites(model.unet))
    two, eight = (call_bytes(model.unet, sites, "residual", (n, 4, 32, 32), (n, 5, 12)) for n in (2, 8))
    assert eight == pytest.approx(4 * two, rel=0.02)
    row = model.row_bytes(sites, "residual", torch.Size([4, 32, 32]), torch.Size([5, 12]))
    assert row == two / 2
    monkeypatch.setattr(memory, "_count_call", None)  # found once
    assert model.row_bytes(sites, "residual", torch.Size([4, 32, 32]), torch.Size([5, 12])) == row


def test_which_decoders_are_large(avatars: Model) -> None:
    assert feature_map(avatars.vae.config, 8, 8, 4) == 16 * 64 * 64 * 4
    assert feature_map(avatars.vae.config, *avatars.latent_shape[1:], 4) < LARGE / 10
    with torch.device("meta"):
        config = AutoencoderKL(**VAE).config
    assert feature_map(config, 64, 64, 2) == 128 * 512 * 512 * 2
    assert [feature_map(config, side, side, 2) >= LARGE for side in (8, 15, 16, 64)] == [False, False, True, True]
    tiny = {"decoder_block_out_channels": (64, 64, 64, 64)}  # AutoencoderTiny
    assert feature_map(tiny, 64, 64, 2) == 64 * 512 * 512 * 2


@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_ends_with_its_block(before: bool) -> None:
    unet = make_tiny_unet()
    if before:
        unet.enable_gradient_checkpointing()
    kept = switches(unet)
    assert set(kept) == {before}
    with checkpointed_blocks(unet):
        assert all(switches(unet))
    assert switches(unet) == kept
    with pytest.raises(ZeroDivisionError), checkpointed_blocks(unet):
        1 / 0  # noqa: B018
    assert switches(unet) == kept


def small_vae() -> Any:
    """8 x 8 latents to 16 x 16 pictures."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def test_a_large_decoder_takes_pictures_one_by_one_where_gradients_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("small", None, small_vae(), None, None, None, torch.device("cpu"))
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes: list[tuple[int, bool]] = []
    model.vae.decoder.register_forward_pre_hook(
        lambda decoder, args: sizes.append((len(args[0]), decoder.gradient_checkpointing))
    )

    def gradient(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = model.decode(z[rows])
        return pictures, torch.autograd.grad(pictures.square().mean(), z)[0][rows]

    whole, alone = gradient(slice(None)), gradient(slice(0, 1))
    assert sizes == [(3, False), (1, False)]
    monkeypatch.setattr("rwopt.models.model.LARGE", 0)
    sizes.clear()
    pictures, found = gradient(slice(None))
    assert sizes == [(1, True)] * 6  # once forward, once in the backward pass
    torch.testing.assert_close(pictures, whole[0], rtol=0, atol=1e-6)
    assert float((found - whole[1]).norm() / whole[1].norm()) < 3e-6  # other batch sizes round differently
    assert all(torch.equal(a, b) for a, b in zip(gradient(slice(0, 1)), alone, strict=True))  # the same one: to the bit
    sizes.clear()
    with torch.no_grad():
        model.decode(z)
    model.decode(z.detach())
    assert sizes == [(3, False)] * 2
    assert not any(switches(model.vae))


def test_a_block_that_holds_others_is_run_again_as_it_was_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 holds a block against what it saved the first time, and refuses one that saves other things."""
    monkeypatch.setattr("rwopt.models.model.LARGE", 0)
    model = Model("small", None, small_vae(), None, None, None, torch.device("cpu"))
    middle, runs = model.vae.decoder.mid_block, list[bool]()
    middle.register_forward_pre_hook(lambda middle, _: runs.append(middle.gradient_checkpointing))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.autograd.grad(model.decode(z).square().mean(), z)
    assert len(runs) >= 3  # first, in the picture's second run, in its own
    assert all(runs)


def test_the_pictures_activations_are_not_alive_together(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae()

    def peak(pictures: int) -> int:
        with torch.enable_grad(), counting() as live:
            model = Model("small", None, twin(vae), None, None, None, torch.device("cpu"))
            z = torch.empty(pictures, 4, 64, 64, requires_grad=True)
            before = live.peak = live.now
            torch.autograd.grad(model.decode(z).square().mean(), z)
            return live.peak - before

    grows = peak(8) - peak(1)
    monkeypatch.setattr("rwopt.models.model.LARGE", 0)
    assert peak(8) - peak(1) < grows / 10
    assert peak(1) < 0.8 * grows / 7
