"""Attachment and apply: exactness, an independent oracle, gradients, removal, threads, real pipelines."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwopt.apply import Attachment, apply
from rwopt.errors import UserError
from rwopt.schedule import Schedule, noise_table
from rwopt.sites import KINDS, list_sites

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CASES = [((kind,), "residual") for kind in KINDS] + [(("transformer",), "output"), (KINDS, "residual")]


def inputs(rows: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(rows, 5, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), 500, text.to(dtype)


def ids_of(unet: nn.Module, kinds: tuple[str, ...] = ("transformer",)) -> list[str]:
    return [site.id for site in list_sites(unet, kinds)]


def random_weights(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Around 1, and outside [0, 1] on both sides."""
    return torch.empty(shape, dtype=dtype).uniform_(-0.7, 2.0, generator=torch.Generator().manual_seed(seed))


def oracle(unet: nn.Module, ids: list[str], weights: list[float], mode: str) -> nn.Module:
    """A copy of the U-Net whose modules' forwards are rewritten by hand, without hooks."""
    net = copy.deepcopy(unet)

    def scaled(module: nn.Module, weight: float) -> None:
        original = module.forward
        module.forward = lambda *args, **kwargs: weight * original(*args, **kwargs)  # type: ignore[method-assign]

    def weighed_transformer(module: nn.Module, weight: float) -> None:
        original = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            y = original(x, *args, **kwargs)[0]
            return (weight * y if mode == "output" else (1 - weight) * x + weight * y,)

        module.forward = forward  # type: ignore[method-assign]

    for name, weight in zip(ids, weights, strict=True):
        path, _, kind = name.rpartition(".")
        if kind in ("self", "cross", "ff"):
            for block in net.get_submodule(path).transformer_blocks:  # type: ignore[union-attr]
                scaled({"self": block.attn1, "cross": block.attn2, "ff": block.ff}[kind], weight)
        else:
            weighed_transformer(net.get_submodule(name), weight)
    return net


def hooks_of(unet: nn.Module) -> list[Any]:
    return [
        hook
        for module in unet.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    ]


# ---------------------------------------------------------------- Attachment


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
    expected = oracle(tiny_unet, ids, weights.tolist(), mode)(x, t, text).sample
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


# --------------------------------------------------------------------- apply


class Spy(Schedule):
    """Records the sigmas at which it is looked up."""

    def at(self, sigma: Any) -> Any:
        self.provenance.setdefault("seen", []).append(np.asarray(sigma))  # type: ignore[attr-defined]
        return super().at(sigma)

    @property
    def seen(self) -> list[float]:
        return [float(sigma) for sigma in self.provenance.get("seen", [])]


def ramp(unet: nn.Module, kind: type[Schedule] = Schedule, **fields: Any) -> Any:
    """Weights that depend on the noise level and the site, over kinds of both sorts."""
    ids = ids_of(unet, ("transformer", "cross"))
    sigmas = np.array([12.0, 3.0, 1.0, 0.2, 0.04])
    weights = np.random.default_rng(0).uniform(0, 2, (5, len(ids)))
    return kind(tuple(ids), sigmas, weights, **fields)


def pipeline(unet: nn.Module, scheduler: Any, kind: Any = StableDiffusionPipeline) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = kind(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int = 5, guidance: float = 4.0, **extra: Any) -> Tensor:
    _x, _, text = inputs()
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **extra,
    ).images


def test_a_pipeline_equals_a_loop_with_explicit_weights(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """The whole way: file, look-up, guidance in one batch, DDIM steps; against a loop written out here."""
    scheduler = DDIMScheduler(**SD)
    pipe = pipeline(tiny_unet, scheduler)
    path = ramp(tiny_unet).save(tmp_path / "schedule.json")
    start = inputs(1, seed=9)[0]
    with apply(pipe, path):
        actual = run(pipe, latents=start)
    schedule = Schedule.load(path)
    _, _, text = inputs()
    x, table = start, noise_table(SD)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        net = oracle(tiny_unet, list(schedule.sites), schedule.at(float(table[t])).tolist(), "residual")
        negative, positive = (net(x, t, part).sample for part in (text[1:], text[:1]))
        x = scheduler.step(negative + 4 * (positive - negative), t, x).prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-4)


def test_a_plain_schedule_changes_no_bit(tiny_unet: UNet2DConditionModel) -> None:
    pipe = pipeline(tiny_unet, EulerDiscreteScheduler(**SD))
    plain = run(pipe)
    with apply(pipe, Schedule.constant(ids_of(tiny_unet, KINDS), [10, 1, 0.1])):
        assert torch.equal(run(pipe), plain)


@pytest.fixture
def weighed(tiny_unet: UNet2DConditionModel) -> Iterator[tuple[UNet2DConditionModel, Schedule, Attachment]]:
    """A bare U-Net in double precision with a schedule on it, and a second one to call with explicit weights."""
    tiny_unet.double()
    schedule = ramp(tiny_unet, noise=SD)
    explicit = Attachment(copy.deepcopy(tiny_unet), schedule.sites)
    with apply(tiny_unet, schedule):
        yield tiny_unet, schedule, explicit


@pytest.mark.parametrize("form", ["int", "float", "0-d", "[1]", "half", "keyword", "all positional"])
def test_every_form_of_the_timestep(weighed: tuple[Any, Schedule, Attachment], form: str) -> None:
    unet, schedule, explicit = weighed
    x, _, text = inputs(dtype=torch.float64)
    t: Any = {
        "int": 500,
        "float": 500.0,
        "[1]": torch.tensor([500]),
        "half": torch.tensor(500.0).bfloat16(),
    }.get(form, torch.tensor(500))
    weights = torch.tensor(schedule.at(float(noise_table(SD)[500])), dtype=torch.float32)
    expected = explicit(x, t, text, weights)
    if form == "keyword":
        actual = unet(sample=x, timestep=t, encoder_hidden_states=text).sample
    elif form == "all positional":
        actual = unet(x, t, text, None, None, None, {}).sample
    else:
        actual = unet(x, t, text).sample
    assert torch.equal(actual, expected)


def test_timesteps_between_integers_and_one_a_row(weighed: tuple[Any, Schedule, Attachment]) -> None:
    unet, schedule, explicit = weighed
    x, _, text = inputs(dtype=torch.float64)
    times = torch.tensor([700.5, 33.25])
    table = np.log(noise_table(SD))
    sigmas = np.exp([(table[700] + table[701]) / 2, 0.75 * table[33] + 0.25 * table[34]])
    expected = explicit(x, times, text, torch.tensor(schedule.at(sigmas), dtype=torch.float32))
    torch.testing.assert_close(unet(x, times, text).sample, expected, rtol=1e-6, atol=1e-8)


def test_two_schedules_stack_and_each_handle_removes_its_own(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    x, t, text = inputs(dtype=torch.float64)
    plain = tiny_unet(x, t, text).sample
    ids = ids_of(tiny_unet)
    half, third, product = (Schedule.constant(ids, [1.0], value, noise=SD) for value in (0.5, 0.3, 0.15))
    with apply(tiny_unet, product):
        expected = tiny_unet(x, t, text).sample
    with apply(tiny_unet, half):
        alone = tiny_unet(x, t, text).sample
    first, second = apply(tiny_unet, half), apply(tiny_unet, third)
    torch.testing.assert_close(tiny_unet(x, t, text).sample, expected)
    second.remove()
    second.remove()
    assert torch.equal(tiny_unet(x, t, text).sample, alone)
    first.remove()
    assert torch.equal(tiny_unet(x, t, text).sample, plain)
    assert not hooks_of(tiny_unet)


def test_none_takes_everything_off_but_foreign_hooks(tiny_unet: UNet2DConditionModel) -> None:
    foreign = tiny_unet.register_forward_pre_hook(lambda *_: None)
    handles = [apply(tiny_unet, ramp(tiny_unet, noise=SD)) for _ in range(3)]
    apply(tiny_unet, None).remove()
    assert len(hooks_of(tiny_unet)) == 1
    for handle in handles:
        handle.remove()
    foreign.remove()
    assert not hooks_of(tiny_unet)


def test_a_swapped_scheduler_brings_its_own_noise_table(tiny_unet: UNet2DConditionModel) -> None:
    pipe = pipeline(tiny_unet, DDIMScheduler(**SD))
    spy = ramp(tiny_unet, Spy)
    x, t, text = inputs()
    with apply(pipe, spy):
        pipe.unet(x, t, text)
        pipe.scheduler = DDIMScheduler(beta_schedule="linear")
        pipe.unet(x, t, text)
    linear = noise_table({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    assert spy.seen == pytest.approx([noise_table(SD)[500], linear[500]], rel=1e-4)


def test_gradient_checkpointing_under_apply(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    _, _, text = inputs(dtype=torch.float64)
    gradients = []
    with apply(tiny_unet, ramp(tiny_unet, noise=SD)):
        for checkpointing in (False, True):
            if checkpointing:
                tiny_unet.enable_gradient_checkpointing()
            x = inputs(dtype=torch.float64)[0].requires_grad_()
            state = x - tiny_unet(x, 800, text).sample
            (state - tiny_unet(state, 100, text).sample).square().sum().backward()
            gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_bad_targets_are_refused_and_nothing_stays(tiny_unet: UNet2DConditionModel) -> None:
    foreign = Schedule.constant([f"up_blocks.8.attentions.{j}" for j in range(9)], [1.0], noise=SD)
    with pytest.raises(UserError, match="9 of 9 sites are absent") as error:
        apply(tiny_unet, foreign)
    assert "down_blocks.0.attentions.0" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="UNet2DConditionModel has no noise table"):
        apply(tiny_unet, ramp(tiny_unet))
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        apply(tiny_unet, "none.json")
    assert not hooks_of(tiny_unet)
