"""The contract: every model class under every sampler; exact, at the right noise level, gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracle import oracle_of, recompute
from helpers.samplers import SAMPLERS, VARIANTS, close, meant, ramp, sampled, sampler
from helpers.twins import NETS, Twin, ids_of, make, state
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import sigma_of, timestep_of
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import FREEU_KINDS, SITE_KINDS

WHOLE = ("transformer", "resnet", "skip")  # what mode output knows
CASES = [(SITE_KINDS, "residual"), (WHOLE, "output")]


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(0.3, 1.6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("kinds", "mode"), CASES)
def test_ones_the_oracle_rows_and_removal(name: str, kinds: tuple[str, ...], mode: str) -> None:
    twin = make(name).double()
    before, keys, plain = state(twin.unet), list(twin.unet.state_dict()), twin()
    ids = ids_of(twin.unet, kinds)
    weights = random(len(ids))
    named = dict(zip(ids, weights.tolist(), strict=True))
    expected = recompute(twin.unet, twin.x, 500, named, mode, **twin.args())
    rows = torch.stack([weights, random(len(ids), seed=3)])
    with Attachment(twin.unet, ids, mode) as attachment:
        call = lambda w: attachment(twin.x, 500, weights=w, **twin.args())  # noqa: E731
        assert torch.equal(call(None), plain)
        assert torch.equal(call(torch.ones(len(ids))), plain)
        assert torch.equal(call(torch.ones(2, len(ids))), plain)
        torch.testing.assert_close(call(weights), expected, rtol=1e-9, atol=1e-11)
        apart = [attachment(twin.x[i : i + 1], 500, weights=rows[i], **twin.args(slice(i, i + 1))) for i in (0, 1)]
        torch.testing.assert_close(call(rows), torch.cat(apart), rtol=1e-9, atol=1e-11)
    assert state(twin.unet) == before
    assert list(twin.unet.state_dict()) == keys
    assert torch.equal(twin(), plain)


def test_freeu_sites_change_no_bit_at_one() -> None:
    twin = make("sd")
    ids = ids_of(twin.unet, ("backbone", "structure", "low"))
    plain = twin()
    with Attachment(twin.unet, ids) as attachment:
        assert torch.equal(attachment(twin.x, 500, weights=torch.ones(len(ids)), **twin.args()), plain)
        assert torch.equal(attachment(twin.x, 500, weights=torch.ones(2, len(ids)), **twin.args()), plain)
        assert not torch.equal(attachment(twin.x, 500, weights=torch.full((len(ids),), 1.1), **twin.args()), plain)


# ------------------------------------------------------------------------------------------------- gradients


GRADIENTS = [(name, *case) for name in NETS for case in CASES] + [("sd", FREEU_KINDS, "residual")]


@pytest.mark.parametrize(("name", "kinds", "mode"), GRADIENTS)
def test_gradients_equal_finite_differences(name: str, kinds: tuple[str, ...], mode: str) -> None:
    """Two calls with other weights each; checkpointed inside, outside and not at all."""
    twin = make(name, rows=1).double()
    if name == "svd":
        kinds = WHOLE  # its branches under inner checkpointing are refused, see below
    ids = ids_of(twin.unet, kinds)
    attachment = Attachment(twin.unet, ids, mode)
    direction = torch.randn_like(twin.x)
    table = torch.stack([random(len(ids)), random(len(ids), seed=3)])
    table[0, ::2] = 1  # where a tuner starts, and where no bit of the output may change
    toward = torch.randn(table.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def loss(table: Tensor, outer: bool = False) -> Tensor:
        x = twin.x
        for t, row in zip((700, 200), table, strict=True):

            def step(x: Tensor, row: Tensor, t: int = t) -> Tensor:
                return x - 0.3 * attachment(x, t, weights=row, **twin.args())

            x = checkpoint(step, x, row, use_reentrant=False) if outer else step(x, row)
        return (x * direction).sum()

    def gradient(outer: bool = False) -> Tensor:
        leaf = table.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, outer), leaf)[0]

    plain = gradient()
    with torch.no_grad():
        h, near = (1e-2, 1e-3) if "low" in kinds else (1e-5, 1e-5)  # FreeU's filter computes in single precision
        difference = (loss(table + h * toward) - loss(table - h * toward)) / (2 * h)
    assert (plain * toward).sum().item() == pytest.approx(difference.item(), rel=near)
    torch.testing.assert_close(gradient(outer=True), plain, rtol=1e-7, atol=1e-9)
    if not twin.unet._supports_gradient_checkpointing:
        return
    twin.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain, rtol=1e-7, atol=1e-9)


def test_checkpointing_that_would_lose_weights_is_refused() -> None:
    twin = make("svd")
    twin.unet.enable_gradient_checkpointing()
    branch = Attachment(twin.unet, ["mid_block.attentions.0.self"])
    with pytest.raises(UserError, match="checkpoint whole U-Net calls"):
        branch(twin.x, 500, weights=torch.ones(1, requires_grad=True), **twin.args())
    branch.remove()

    twin = make("sd")
    attachment = Attachment(twin.unet, ["mid_block.attentions.0"])
    inside = twin.unet.mid_block.forward  # somebody checkpoints a block in a way of their own
    twin.unet.mid_block.forward = lambda *a, **k: checkpoint(lambda: inside(*a, **k), use_reentrant=False)
    out = attachment(twin.x, 500, weights=torch.ones(1, requires_grad=True), **twin.args())
    with pytest.raises(UserError, match="re-run by checkpointing without its weights"):
        out.sum().backward()


# ------------------------------------------------------------------------------------------------- samplers


@pytest.fixture(scope="module")
def twins() -> dict[str, Twin]:
    return {name: make(name).double() for name in NETS}


EVERY = [(name, how) for name in NETS for how in SAMPLERS] + [(name, how) for name in ("sd", "svd") for how in VARIANTS]


@pytest.mark.filterwarnings("ignore:Should have t")  # of DPM++ SDE's noise: one rounding outside of its range
@pytest.mark.parametrize(("name", "how"), EVERY)
@torch.no_grad()
def test_every_class_under_every_sampler(twins: dict[str, Twin], name: str, how: str) -> None:
    """All ones, an oracle, the noise levels, guidance in one batch or split, a schedule for each row, no trace."""
    twin = twins[name]
    pipe = SimpleNamespace(unet=twin.unet, scheduler=sampler(how))
    before, ids = state(twin.unet), ids_of(twin.unet, WHOLE)
    plain, _ = sampled(pipe, twin)
    with apply(pipe, Schedule.constant(ids, [10.0, 0.1])):
        assert torch.equal(sampled(pipe, twin)[0], plain)
    spy, other = ramp(ids), ramp(ids, seed=1)
    with apply(pipe, spy):
        spy.seen.clear()
        changed, levels = sampled(pipe, twin)
        seen = list(spy.seen)
        close(sampled(pipe, twin, split=True)[0], changed)
    assert state(twin.unet) == before
    assert not torch.allclose(changed, plain)

    def weights(schedule: Schedule) -> Callable[[Any], Any]:
        return lambda t: dict(zip(ids, schedule.at(meant(pipe.scheduler, t)), strict=True))

    close(sampled(SimpleNamespace(unet=oracle_of(twin.unet, weights(spy)), scheduler=pipe.scheduler), twin)[0], changed)

    with Attachment(twin.unet, ids) as attachment:

        def rows(x: Tensor, t: Any, **rest: Any) -> Any:
            table = np.stack([schedule.at(meant(pipe.scheduler, t)) for schedule in (spy, other)])
            return SimpleNamespace(sample=attachment(x, t, weights=torch.tensor(table), **rest))

        both, _ = sampled(SimpleNamespace(unet=rows, scheduler=pipe.scheduler), twin)
    with apply(pipe, other):
        close(both, torch.cat([changed[:1], sampled(pipe, twin)[0][1:]]))

    assert len(seen) == len(pipe.scheduler.timesteps) == {"pndm": 4, "heun": 5, "kdpm2": 5, "dpm++ sde": 5}.get(how, 3)
    if "edm" in how or "svd" in how:
        np.testing.assert_allclose(seen, levels, rtol=1e-4)
    else:  # at most half a timestep beside the sampler's, which some round when they tell the U-Net
        table = sigma_of(pipe.scheduler.alphas_cumprod.numpy())
        off = np.abs(timestep_of(seen, table) - timestep_of(levels, table)).max()
        assert off <= (0.51 if how.startswith(("dpm++ 2m", "unipc")) else 0.02)
