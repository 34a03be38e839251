"""Exactness, an independent oracle, gradients, removal, threads."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from helpers.oracle import recompute
from helpers.small import hooks_of, inputs
from helpers.twins import ids_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.errors import UserError
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import KINDS, list_sites

CASES = [((kind,), "residual") for kind in KINDS] + [(("transformer",), "output"), (KINDS, "residual")]


def random_weights(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Around 1, and outside [0, 1] on both sides."""
    return torch.empty(shape, dtype=dtype).uniform_(-0.7, 2.0, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kinds", "mode"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ones_is_bit_identical(
    tiny_unet: UNet2DConditionModel, kinds: tuple[str, ...], mode: str, dtype: torch.dtype
) -> None:
    tiny_unet.to(dtype)
    x, t, text = inputs(dtype=dtype)
    plain = tiny_unet(x, t, text).sample
    with Attachment(tiny_unet, ids_of(tiny_unet, kinds), mode) as attachment:
        count = len(attachment.sites)
        assert torch.equal(attachment(x, t, text), plain)
        assert torch.equal(attachment(x, t, text, torch.ones(count)), plain)
        assert torch.equal(attachment(x, t, text, torch.ones(2, count)), plain)
        assert not torch.equal(attachment(x, t, text, torch.full((count,), 1.5)), plain)


@pytest.mark.parametrize(("kinds", "mode"), CASES)
def test_equals_an_oracle_without_hooks(tiny_unet: UNet2DConditionModel, kinds: tuple[str, ...], mode: str) -> None:
    tiny_unet.double()
    ids = ids_of(tiny_unet, kinds)[::-1]  # columns in an order of our own
    x, t, text = inputs(dtype=torch.float64)
    weights = random_weights(len(ids), dtype=torch.float64)
    given = dict(zip(ids, weights.tolist(), strict=True))
    expected = recompute(tiny_unet, x, t, given, mode, encoder_hidden_states=text)
    actual = Attachment(tiny_unet, ids, mode)(x, t, text, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_weight_zero_skips_a_site_exactly(tiny_unet: UNet2DConditionModel) -> None:
    x, t, text = inputs()
    skipped = copy.deepcopy(tiny_unet)
    skipped.mid_block.attentions[0].forward = lambda x, *args, **kwargs: (x,)
    attachment = Attachment(tiny_unet, ["mid_block.attentions.0"])
    assert torch.equal(attachment(x, t, text, torch.zeros(1)), skipped(x, t, text).sample)


@pytest.mark.parametrize(("kinds", "mode"), CASES)
def test_rows_have_their_own_weights(tiny_unet: UNet2DConditionModel, kinds: tuple[str, ...], mode: str) -> None:
    tiny_unet.double()
    x, t, text = inputs(3, torch.float64)
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, kinds), mode)
    weights = random_weights(3, len(attachment.sites), dtype=torch.float64)
    together = attachment(x, t, text, weights)
    apart = torch.cat([attachment(x[i : i + 1], t, text[i : i + 1], weights[i]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["residual", "output"])
@pytest.mark.parametrize("checkpointing", ["none", "inner", "inner, train", "outer", "outer and inner"])
def test_gradients_equal_finite_differences(tiny_unet: UNet2DConditionModel, mode: str, checkpointing: str) -> None:
    """Three calls in a row with other weights each: state left over from the last one would show at once."""
    tiny_unet.double().train("train" in checkpointing)
    if "inner" in checkpointing:
        tiny_unet.enable_gradient_checkpointing()
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS if mode == "residual" else ("transformer",)), mode)
    x, _, text = inputs(dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table = 1 + 0.3 * torch.randn(3, 2, len(attachment.sites), generator=torch.Generator().manual_seed(6)).double()

    def loss(table: Tensor) -> Tensor:
        state = x
        for t, weights in zip((900, 500, 100), table, strict=True):
            if "outer" in checkpointing:
                out = checkpoint(attachment, state, t, text, weights, use_reentrant=False)
            else:
                out = attachment(state, t, text, weights)
            state = state - 0.3 * out
        return (state * direction).sum()

    (gradient,) = torch.autograd.grad(loss(table.requires_grad_()), table)
    step = 1e-5
    toward = torch.randn(table.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for call in range(3):  # each by itself, so that no two errors cancel
        move = torch.zeros_like(table)
        move[call] = step * toward[call]
        with torch.no_grad():
            difference = (loss(table + move) - loss(table - move)) / (2 * step)
        assert (gradient * move).sum().item() / step == pytest.approx(difference.item(), rel=1e-6)


def test_checkpointing_really_ran_again(tiny_unet: UNet2DConditionModel) -> None:
    """Guards the test above: were nothing recomputed, it would prove nothing."""
    runs = {"inner": 0}
    block = tiny_unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.register_forward_hook(lambda *_: runs.__setitem__("inner", runs["inner"] + 1))
    tiny_unet.enable_gradient_checkpointing()
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    x, t, text = inputs()
    attachment(x, t, text, torch.ones(len(attachment.sites), requires_grad=True)).sum().backward()
    assert runs["inner"] == 2


def test_gradients_of_a_half_precision_net_reach_full_precision_weights(
    tiny_unet: UNet2DConditionModel,
) -> None:
    tiny_unet.to(torch.bfloat16)
    x, t, text = inputs(dtype=torch.bfloat16)
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    weights = torch.ones(2, len(attachment.sites), requires_grad=True)
    out = attachment(x, t, text, weights)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32
    assert (weights.grad != 0).all()


@pytest.mark.parametrize("kinds", [("transformer",), KINDS])
def test_removal_leaves_no_trace(tiny_unet: UNet2DConditionModel, kinds: tuple[str, ...]) -> None:
    x, t, text = inputs()
    before, plain = copy.deepcopy(tiny_unet.state_dict()), tiny_unet(x, t, text).sample
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, kinds))
    assert list(tiny_unet.state_dict()) == list(before)
    assert hooks_of(tiny_unet)
    attachment(x, t, text, random_weights(len(attachment.sites)))
    attachment.remove()
    attachment.remove()
    after = tiny_unet.state_dict()
    assert not hooks_of(tiny_unet)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(tiny_unet(x, t, text).sample, plain)
    with pytest.raises(UserError, match="was removed"):
        attachment(x, t, text, torch.ones(len(attachment.sites)))


def test_two_threads_share_a_unet(tiny_unet: UNet2DConditionModel) -> None:
    x, t, text = inputs()
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    tables = [random_weights(len(attachment.sites), seed=seed) for seed in (1, 2)]
    expected = [attachment(x, t, text, table) for table in tables]
    equal: list[bool] = []

    def work(index: int) -> None:
        for _ in range(15):
            equal.append(torch.equal(attachment(x, t, text, tables[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(equal) == 30
    assert all(equal)


def test_attention_never_sees_the_weights(tiny_unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture) -> None:
    x, t, text = inputs()
    seen: list[set[str]] = []
    for site in list_sites(tiny_unet):
        for block in tiny_unet.get_submodule(site.path).transformer_blocks:
            block.attn1.register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    tiny_unet(x, t, text)
    plain, own = list(seen), {"scale": 1.0}
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            attachment = Attachment(tiny_unet, ["mid_block.attentions.0.ff", "mid_block.attentions.0"])
            seen.clear()
            attachment(x, t, text, torch.full((2,), 0.5), cross_attention_kwargs=own)
    finally:
        diffusers_logging.disable_propagation()
    assert seen == plain
    assert not caplog.records
    assert own == {"scale": 1.0}


def test_without_weights_the_call_is_passed_on_as_it_is(tiny_unet: UNet2DConditionModel) -> None:
    x, t, text = inputs()
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    carried: list[Any] = []
    transformer = tiny_unet.mid_block.attentions[0]
    transformer.register_forward_pre_hook(lambda m, a, k: carried.append(k["cross_attention_kwargs"]), with_kwargs=True)
    attachment(x, t, text)
    assert carried == [None]


def test_a_part_called_by_itself_is_plain(tiny_unet: UNet2DConditionModel) -> None:
    transformer = tiny_unet.mid_block.attentions[0]
    x, text = torch.randn(2, 16, 2, 2), torch.randn(2, 5, 12)
    plain = transformer(x, text).sample
    attachment = Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    attachment(*inputs(), random_weights(len(attachment.sites)))
    assert torch.equal(transformer(x, text).sample, plain)


def test_a_copy_works_with_hooks_on(tiny_unet: UNet2DConditionModel) -> None:
    x, t, text = inputs()
    plain = tiny_unet(x, t, text).sample
    Attachment(tiny_unet, ids_of(tiny_unet, KINDS))
    assert torch.equal(copy.deepcopy(tiny_unet)(x, t, text).sample, plain)


def test_bad_attachments_are_refused(tiny_unet: UNet2DConditionModel) -> None:
    x, t, text = inputs()
    with pytest.raises(UserError, match="mode 'skip' is unknown"):
        Attachment(tiny_unet, ["mid_block.attentions.0"], "skip")
    with pytest.raises(UserError, match="absent"):
        Attachment(tiny_unet, ["mid_block.attentions.7"])
    with pytest.raises(UserError, match="more than once"):
        Attachment(tiny_unet, ["mid_block.attentions.0"] * 2)
    with pytest.raises(UserError, match=r"branch site mid_block\.attentions\.0\.ff"):
        Attachment(tiny_unet, ["mid_block.attentions.0.ff"], "output")
    with pytest.raises(UserError, match="compiled"):
        Attachment(torch.compile(tiny_unet), ["mid_block.attentions.0"])  # type: ignore[arg-type]
    assert not hooks_of(tiny_unet)
    with Attachment(tiny_unet, ["mid_block.attentions.0"]) as attachment:
        for shape in ((2,), (3, 1), (2, 2), ()):
            with pytest.raises(UserError, match="do not fit"):
                attachment(x, t, text, torch.ones(shape))
