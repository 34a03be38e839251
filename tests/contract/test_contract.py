"""The contract: every model class under every sampler; exact, at the right noise level, gone without a trace."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.twins import NETS, Twin, make, patched, recompute
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwopt.apply import Attachment, apply
from rwopt.errors import UserError
from rwopt.schedule import Schedule, noise_block, sigma_of, timestep_of
from rwopt.sites import ALL_KINDS, SITE_KINDS, list_sites

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WHOLE = ("transformer", "resnet", "skip")  # what mode output knows
CASES = [(SITE_KINDS, "residual"), (WHOLE, "output")]


def ids_of(unet: Any, kinds: tuple[str, ...]) -> list[str]:
    present = {site.kind for site in list_sites(unet, ALL_KINDS)}
    return [site.id for site in list_sites(unet, [kind for kind in kinds if kind in present])]


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(0.3, 1.6, generator=torch.Generator().manual_seed(seed))


def state(unet: nn.Module) -> Any:
    """Everything that hooks could leave behind."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, sorted(module.__dict__), [len(getattr(module, table)) for table in tables], sorted(module._buffers))
        for name, module in unet.named_modules()
    ]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("kinds", "mode"), CASES)
def test_ones_the_oracle_rows_and_removal(name: str, kinds: tuple[str, ...], mode: str) -> None:
    twin = make(name).double()
    before, keys, plain = state(twin.unet), list(twin.unet.state_dict()), twin()
    ids = ids_of(twin.unet, kinds)
    weights = random(len(ids))
    expected = twin(unet=patched(twin.unet, dict(zip(ids, weights.tolist(), strict=True)), mode))
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


def test_stable_diffusion_equals_a_second_implementation() -> None:
    twin = make("sd").double()
    ids = ids_of(twin.unet, SITE_KINDS)
    weights = random(len(ids))
    expected = recompute(
        twin.unet, twin.x, 500, twin.rest["encoder_hidden_states"], dict(zip(ids, weights.tolist(), strict=True))
    )
    with Attachment(twin.unet, ids) as attachment:
        actual = attachment(twin.x, 500, weights=weights, **twin.args())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("kinds", "mode"), CASES)
def test_gradients_equal_finite_differences(name: str, kinds: tuple[str, ...], mode: str) -> None:
    """Two calls with other weights each; checkpointed inside, outside and not at all."""
    twin = make(name, rows=1).double()
    if name == "svd":
        kinds = WHOLE  # its branches under inner checkpointing are refused, see below
    ids = ids_of(twin.unet, kinds)
    attachment = Attachment(twin.unet, ids, mode)
    direction = torch.randn_like(twin.x)
    table = torch.stack([random(len(ids)), random(len(ids), seed=3)])
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
        difference = (loss(table + 1e-5 * toward) - loss(table - 1e-5 * toward)) / 2e-5
    assert (plain * toward).sum().item() == pytest.approx(difference.item(), rel=1e-5)
    torch.testing.assert_close(gradient(outer=True), plain, rtol=1e-8, atol=1e-10)
    if not twin.unet._supports_gradient_checkpointing:
        return
    twin.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain, rtol=1e-8, atol=1e-10)


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


SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "v, zero snr": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "edm": ("EDMEulerScheduler", {}),
    "svd euler": (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
}


class Spy(Schedule):
    """Keeps the sigmas at which it is looked up."""

    def at(self, sigma: Any) -> Any:
        self.provenance["seen"].append(float(sigma))
        return super().at(sigma)


def sampler(name: str) -> Any:
    kind, options = SAMPLERS[name]
    noise = {} if kind.startswith("EDM") else SD
    return getattr(diffusers, kind)(**noise, **options)


def sampled(pipe: Any, twin: Twin, steps: int = 3) -> tuple[Tensor, list[float]]:
    """A plain loop; also the noise level of each call, as told by the sampler itself."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x, levels = twin.x * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t).item()
        if "timestep_type" in scheduler.config or type(scheduler).__name__ == "EDMEulerScheduler":
            levels.append(float(scheduler.sigmas[i]))
        elif scale < 1 - 1e-9:  # the sampler divides by sqrt(sigma^2 + 1)
            levels.append((1 / scale**2 - 1) ** 0.5)
        elif hasattr(scheduler, "sigmas"):
            levels.append(float(scheduler.sigmas[i]))
        else:
            levels.append(float(sigma_of(scheduler.alphas_cumprod.numpy())[int(t)]))
        scheduler.is_scale_input_called = True
        out = pipe.unet(scheduler.scale_model_input(x, t), t, **twin.args()).sample
        takes = "generator" in scheduler.step.__code__.co_varnames
        x = scheduler.step(out, t, x, **({"generator": draw} if takes else {})).prev_sample
    return x, levels


@pytest.fixture(scope="module")
def twins() -> dict[str, Twin]:
    return {name: make(name) for name in NETS}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("how", SAMPLERS)
@torch.no_grad()
def test_every_class_under_every_sampler(twins: dict[str, Twin], name: str, how: str) -> None:
    twin = twins[name]
    pipe = SimpleNamespace(unet=twin.unet, scheduler=sampler(how))
    before, ids = state(twin.unet), ids_of(twin.unet, ("transformer", "resnet", "skip"))
    plain, _ = sampled(pipe, twin)
    with apply(pipe, Schedule.constant(ids, [10.0, 0.1])):
        assert torch.equal(sampled(pipe, twin)[0], plain)
    weights = np.random.default_rng(0).uniform(0.6, 1.4, (4, len(ids)))
    spy = Spy(tuple(ids), np.array([12.0, 3.0, 0.5, 0.05]), weights, provenance={"seen": []})
    with apply(pipe, spy):
        spy.provenance["seen"].clear()
        changed, levels = sampled(pipe, twin)
    assert state(twin.unet) == before
    assert not torch.equal(changed, plain)
    seen = spy.provenance["seen"]
    assert len(seen) == len(pipe.scheduler.timesteps) == {"pndm": 4, "heun": 5, "kdpm2": 5}.get(how, 3)
    if "edm" in how or "svd" in how:
        np.testing.assert_allclose(seen, levels, rtol=1e-4)
    else:  # some samplers tell the U-Net a timestep that they rounded
        table = sigma_of(pipe.scheduler.alphas_cumprod.numpy())
        off = np.abs(timestep_of(seen, table) - timestep_of(levels, table)).max()
        assert off <= (0.51 if how.startswith(("dpm", "unipc")) else 0.02)


def test_sampling_equals_sampling_with_the_oracle() -> None:
    twin = make("sd").double()
    ids = ids_of(twin.unet, WHOLE)
    schedule = Schedule(tuple(ids), np.array([12.0, 0.1]), random(2, len(ids)).numpy())
    pipe = SimpleNamespace(unet=twin.unet, scheduler=sampler("euler"))
    with apply(pipe, schedule), torch.no_grad():
        actual, levels = sampled(pipe, twin)
    calls = iter(levels)

    def oracle(x: Tensor, t: Tensor, **rest: Any) -> Any:
        weights = dict(zip(ids, schedule.at(next(calls)).tolist(), strict=True))
        return patched(twin.unet, weights)(x, t, **rest)

    with torch.no_grad():
        expected, _ = sampled(SimpleNamespace(unet=oracle, scheduler=sampler("euler")), twin)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sharing


def schedules(unet: Any, count: int) -> list[Schedule]:
    ids = ids_of(unet, SITE_KINDS)
    return [
        Schedule(tuple(ids), np.array([12.0, 0.1]), np.random.default_rng(i).uniform(0.6, 1.4, (2, len(ids))))
        for i in range(count)
    ]


def test_eight_threads_on_one_unet_each_see_their_own_schedule() -> None:
    twin = make("sd")
    pipes = [SimpleNamespace(unet=twin.unet, scheduler=sampler("euler")) for _ in range(8)]
    alone = []
    for pipe, schedule in zip(pipes, schedules(twin.unet, 8), strict=True):
        with apply(pipe, schedule), torch.no_grad():
            alone.append(sampled(pipe, twin)[0])
    assert not torch.equal(alone[0], alone[1])
    handles = [apply(pipe, schedule) for pipe, schedule in zip(pipes, schedules(twin.unet, 8), strict=True)]
    together: dict[int, Tensor] = {}
    gate = threading.Barrier(8)

    def work(index: int) -> None:
        gate.wait()
        with torch.no_grad():
            together[index] = sampled(pipes[index], twin)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[index], alone[index]) for index in range(8))
    with pytest.raises(UserError, match="8 pipelines put a schedule on this U-Net"):
        twin()
    for handle in handles:
        handle.remove()


def test_pipelines_that_share_a_scheduler_too_are_refused() -> None:
    twin = make("sd")
    first = SimpleNamespace(unet=twin.unet, scheduler=sampler("euler"))
    second = copy.copy(first)
    one, two = schedules(twin.unet, 2)
    with apply(first, one), pytest.raises(UserError, match="give each its own scheduler"):
        apply(second, two)


# ------------------------------------------------------------------------------------------- what people do to a U-Net


def bare(unet: Any) -> Schedule:
    (schedule,) = schedules(unet, 1)
    noise = noise_block(sampler("ddim"))
    return Schedule(schedule.sites, schedule.sigmas, schedule.weights, noise=noise)


@pytest.mark.parametrize("how", ["torch.compile", "unet.compile"])
@torch.no_grad()
def test_compiled_is_one_graph_without_recompilation(how: str) -> None:
    from torch._dynamo.testing import CompileCounter

    twin, counter = make("sd"), CompileCounter()
    times = torch.arange(990, 0, -20)  # 50 steps
    with apply(twin.unet, bare(twin.unet)):
        expected = [twin(t) for t in times[::10]]
        torch._dynamo.reset()
        unet = twin.unet
        if how == "torch.compile":
            unet = torch.compile(unet, backend=counter, fullgraph=True)
        else:
            unet.compile(backend=counter, fullgraph=True)
        actual = [twin(t, unet) for t in times][::10]
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(UserError, match="compiled and would ignore"):
        apply(unet, bare(twin.unet))
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_that_a_compiled_graph_ignores_are_noticed() -> None:
    twin = make("sd")
    torch._dynamo.reset()
    compiled = torch.compile(twin.unet, backend="eager")
    twin(unet=compiled)
    with apply(twin.unet, bare(twin.unet)), pytest.raises(UserError, match="attach, then compile"):
        twin(unet=compiled)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    twin = make("sd")
    expected = {}
    schedule = bare(twin.unet)
    with apply(twin.unet, schedule):
        expected = twin()
    twin.unet.to(dtype)
    twin.x, twin.rest = twin.x.to(dtype), {name: value.to(dtype) for name, value in twin.rest.items()}
    plain = twin()
    with apply(twin.unet, schedule):
        actual = twin()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)
    with apply(twin.unet, Schedule.constant(schedule.sites, [1.0], noise=schedule.noise)):
        assert torch.equal(twin(), plain)


def test_attention_slicing_and_freeu_at_the_same_time() -> None:
    twin = make("sd")
    schedule = bare(twin.unet)
    weights = dict(zip(schedule.sites, schedule.at(1.0).tolist(), strict=True))
    constant = Schedule(schedule.sites, np.array([1.0]), np.array([list(weights.values())]), noise=schedule.noise)
    with apply(twin.unet, constant):
        expected = twin()
        twin.unet.set_attention_slice(1)
        torch.testing.assert_close(twin(), expected, rtol=1e-4, atol=1e-5)
        twin.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
        torch.testing.assert_close(twin(), twin(unet=patched_freeu(twin.unet, weights)), rtol=1e-4, atol=1e-5)


def patched_freeu(unet: Any, weights: dict[str, float]) -> Any:
    net = copy.deepcopy(unet)
    apply(net, None)
    for module in net.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return patched(net, weights)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after(order: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv2", "conv_shortcut"], init_lora_weights=False)
    twin = make("sd")
    schedule = bare(twin.unet)
    torch.manual_seed(0)
    if order == "before":
        twin.unet.add_adapter(config)
    with apply(twin.unet, schedule):
        if order == "after":
            twin.unet.add_adapter(config)
        actual = twin()
    assert list_sites(twin.unet, SITE_KINDS) == list_sites(make("sd").unet, SITE_KINDS)
    names = dict(zip(schedule.sites, schedule.at(sigma_at_500()).tolist(), strict=True))
    torch.testing.assert_close(actual, twin(unet=patched(twin.unet, names)), rtol=1e-4, atol=1e-5)


def sigma_at_500() -> float:
    return float(sigma_of(sampler("ddim").alphas_cumprod.numpy())[500])


def test_a_controlnet_is_left_alone() -> None:
    with torch.device("meta"):
        net = diffusers.ControlNetModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=8)
    with pytest.raises(UserError, match="ControlNetModel has no up blocks"):
        list_sites(net)
