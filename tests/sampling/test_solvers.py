"""Solvers: each stock scheduler as oracle, data whose ideal denoiser is known, gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from rwopt.sampling.solvers import SOLVERS, Levels, Memory, Number
from rwopt.schedule.samplers import SAMPLERS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS = ("epsilon", "v_prediction")
COUNTS = (1, 2, 3, 5, 8)
STOCK: dict[str, Any] = {
    "DDIMScheduler": DDIMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
    "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler,
    "LCMScheduler": LCMScheduler,
    "TCDScheduler": TCDScheduler,
}
Network = Callable[[Tensor, float], Tensor]


def network(x: Tensor, t: float) -> Tensor:
    """A made-up U-Net: smooth in both, and different in every number."""
    tilt = torch.linspace(-1, 1, x[0].numel()).to(x).view(x[0].shape)
    return torch.tanh(0.9 * x + tilt + 0.003 * t) + 0.3 * torch.sin(2 * x.flip(-1) - 0.01 * t)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def draws(count: int, seed: int = 7) -> list[Tensor]:
    """Fresh noise, as a scheduler draws it from a generator of that seed."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 4, 4, generator=g) for _ in range(count)]


def scheduler_of(name: str, kind: str, **changes: Any) -> Any:
    sampler = SAMPLERS[name]
    return STOCK[sampler.scheduler](**{**SD, "prediction_type": kind, **sampler.options, **changes})


@dataclass
class Run:
    """What a stock scheduler made of the network, and the levels at which it did so."""

    end: Tensor
    levels: Levels
    told: list[float]


def stock_run(scheduler: Any, x: Tensor, seed: int = 7) -> Run:
    """From variance-preserving latents at its first level; those of Euler's are variance-exploding on the way."""
    ts, abar = scheduler.timesteps, scheduler.alphas_cumprod
    whole = not ts.is_floating_point()
    exploding = hasattr(scheduler, "is_scale_input_called")
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        levels = Levels.at(sigmas[:-1].double().tolist(), ts.tolist(), abar)
    else:
        shares = abar[ts].double()
        signal, noise = shares.sqrt().tolist(), (1 - shares).sqrt().tolist()
        levels = Levels([*signal, 1.0], [*noise, 0.0], ts.tolist(), abar)
    if exploding:
        x = x * (sigmas[0] ** 2 + 1) ** 0.5  # type: ignore[index]
    g = torch.Generator().manual_seed(seed)
    noisy = isinstance(scheduler, EulerAncestralDiscreteScheduler | LCMScheduler | TCDScheduler)
    for t in ts:
        out = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, int(t) if whole else t, x, **({"generator": g} if noisy else {})).prev_sample
    return Run(x, levels, ts.tolist())


def clean_in(out: Tensor, x: Tensor, signal: Number, noise: Number, kind: str) -> Tensor:
    return signal * x - noise * out if kind == "v_prediction" else (x - noise * out) / signal


def our_run(name: str, levels: Levels, x: Tensor, told: list[float], kind: str, fresh: list[Tensor] | None) -> Tensor:
    memory = Memory()
    for i, t in enumerate(told):
        clean = clean_in(network(x, t), x, levels.signal[i], levels.noise[i], kind)
        last = i == len(levels) - 1
        x, memory = SOLVERS[name](levels, i, x, clean, memory, None if fresh is None or last else fresh[i])
    return x


def agrees(name: str, scheduler: Any, kind: str, tolerance: float = 2e-5) -> None:
    x = start()
    run = stock_run(scheduler, x)
    fresh = draws(len(run.told)) if SAMPLERS[name].noisy else None
    got = our_run(name, run.levels, x, run.told, kind, fresh)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, run.end, rtol=tolerance, atol=tolerance)


# --- stock schedulers


def test_there_is_a_solver_for_every_sampler() -> None:
    assert list(SOLVERS) == list(SAMPLERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_trailing_grid_equals_stock(name: str, steps: int, kind: str) -> None:
    scheduler = scheduler_of(name, kind, timestep_spacing="trailing")
    if name == "ddim" and 1000 % steps:  # there stock DDIM steps to T // N below, which is beside the next call's level
        scheduler = scheduler_of("dpmpp_2m", kind, timestep_spacing="trailing", solver_order=1)
    scheduler.set_timesteps(steps)
    agrees(name, scheduler, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "uni_pc", "euler"])
def test_karras_grid_equals_stock(name: str, steps: int, kind: str) -> None:
    scheduler = scheduler_of(name, kind, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    agrees(name, scheduler, kind)


@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("name", ["dpmpp_2m", "uni_pc", "euler", "euler_ancestral", "ddim", "lcm", "tcd"])
def test_zero_terminal_snr_equals_stock(name: str, steps: int) -> None:
    scheduler = scheduler_of(name, "v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler.set_timesteps(steps)
    # Euler's latents are 4096 times as large at first, and lose that in single precision
    agrees(name, scheduler, "v_prediction", 2e-3 if name.startswith("euler") else 2e-5)


@pytest.mark.parametrize("steps", [16, 40])
@pytest.mark.parametrize("name", ["dpmpp_2m", "uni_pc"])
def test_many_steps_equal_stock(name: str, steps: int) -> None:
    """Some rules of stock schedulers are for fewer than 15 steps only."""
    scheduler = scheduler_of(name, "v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    agrees(name, scheduler, "v_prediction", 1e-4)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_timesteps_of_ones_own_equal_stock(name: str) -> None:
    scheduler = scheduler_of(name, "epsilon")
    # 0.7 times 700, 360 and 90 is whole in single precision alone; LCM's boundary condition is felt at 1 and 0
    scheduler.set_timesteps(timesteps=[999, 700, 360, 90, 1, 0])
    agrees(name, scheduler, "epsilon")


def test_ddims_own_timesteps_are_dpm_solvers_of_first_order() -> None:
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type="epsilon", solver_order=1)
    scheduler.set_timesteps(timesteps=[999, 800, 310, 17])
    agrees("ddim", scheduler, "epsilon")


def test_ancestral_sampling_is_ddim_with_eta_one() -> None:
    scheduler = scheduler_of("ddim", "epsilon", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    x, g = start(), torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), int(t), x, eta=1.0, generator=g).prev_sample
    run = stock_run(scheduler, start())  # for its levels
    got = our_run("euler_ancestral", run.levels, start(), run.told, "epsilon", draws(5))
    torch.testing.assert_close(got, x, rtol=2e-5, atol=2e-5)


def test_noise_is_asked_for() -> None:
    levels = Levels.at([10.0, 1.0], [900, 400], [0.9] * 1000)
    for name, sampler in SAMPLERS.items():
        if sampler.noisy:
            with pytest.raises(ValueError, match="fresh noise"):
                SOLVERS[name](levels, 0, start(), start(), (), None)


def test_levels() -> None:
    levels = Levels.at([3.0, 0.75])
    assert len(levels) == 2
    assert levels.signal == pytest.approx([0.1**0.5, 0.8, 1.0])
    assert levels.noise == pytest.approx([0.9**0.5, 0.6, 0.0])
    assert levels.lam(1) == pytest.approx(-np.log(0.75))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_a_function(name: str) -> None:
    """It changes nothing that it is given, and gives the same again."""
    levels = Levels.at([10.0, 3.0, 1.0, 0.2], [900.0, 600.0, 400.0, 100.0], torch.linspace(0.999, 0.01, 1000))
    x, clean, fresh = start(), start().tanh(), start().cos()
    memory = Memory()
    for i in range(4):
        given = [y.clone() for y in (x, clean, fresh, *memory)]
        first, kept = SOLVERS[name](levels, i, x, clean, memory, fresh)
        again, _ = SOLVERS[name](levels, i, x, clean, memory, fresh)
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(given, (x, clean, fresh, *memory), strict=True))
        x, memory, clean = first, kept, clean.sin()


# --- data whose ideal denoiser is known: x0 ~ N(MEAN, STD^2), independent in each number

MEAN, STD = 0.4, 0.5


def ideal(x: Tensor, signal: Number, noise: Number) -> Tensor:
    return MEAN + signal * STD**2 * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2)


def error_at_last_level(name: str, steps: int) -> float:
    """Against the probability-flow equation, which these solvers discretise; the last step is of first order in all.

    UniPC's corrector makes its order one higher than that of its predictor.
    """
    sigmas = np.exp(np.linspace(np.log(20), np.log(0.05), steps)).tolist()
    levels, x, memory = Levels.at(sigmas), start(torch.float64), Memory()
    unit = (x - levels.signal[0] * MEAN) / (levels.signal[0] ** 2 * STD**2 + levels.noise[0] ** 2) ** 0.5
    for i in range(steps - 1):
        x, memory = SOLVERS[name](levels, i, x, ideal(x, levels.signal[i], levels.noise[i]), memory, None)
    s, n = levels.signal[-2], levels.noise[-2]
    return float((x - s * MEAN - unit * (s**2 * STD**2 + n**2) ** 0.5).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2), ("uni_pc", 3)])
def test_order_of_convergence(name: str, order: int) -> None:
    errors = [error_at_last_level(name, steps) for steps in (41, 81, 161)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert slopes == pytest.approx([order] * 2, abs=0.1)


def test_noisy_solvers_sample_the_data() -> None:
    """From pure noise in many small steps: mean and spread, within chance."""
    sigmas = np.exp(np.linspace(np.log(80), np.log(0.01), 100)).tolist()
    levels = Levels.at(sigmas)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4096, generator=g, dtype=torch.float64)
    for i in range(100):
        fresh = torch.randn(4096, generator=g, dtype=torch.float64)
        x, _ = SOLVERS["euler_ancestral"](levels, i, x, ideal(x, levels.signal[i], levels.noise[i]), (), fresh)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / 64)
    assert float(x.std()) == pytest.approx(STD, rel=0.06)


# --- a learned clock


def clocked(name: str, logs: Tensor, x: Tensor) -> Tensor:
    """The end of a run whose levels, and what the network sees of them, hang on ln sigma [N]."""
    sigmas = list(logs.exp())
    ts = list(800.5 + 150 * (logs - 2.5))
    abar = torch.linspace(0.9999, 0.002, 1000, dtype=torch.float64)
    levels = Levels.at(sigmas, ts, abar)
    memory, z = Memory(), x
    for i in range(len(levels)):
        clean = clean_in(network(x, 0.0) + 0.1 * logs[i], x, levels.signal[i], levels.noise[i], "v_prediction")
        x, memory = SOLVERS[name](levels, i, x, clean, memory, (i - z).cos() if SAMPLERS[name].noisy else None)
    return x


@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_of_the_levels_equals_finite_differences(name: str) -> None:
    x = start(torch.float64)[:1, :1]
    logs = torch.tensor([2.5, 0.9, 0.1, -1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: clocked(name, z, x), (logs,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_in_single_precision_is_finite_and_keeps_the_format(name: str, count: int) -> None:
    logs = torch.tensor([2.5, 0.9, -1.5][:count], requires_grad=True)
    end = clocked(name, logs, start())
    assert end.dtype == torch.float32
    (slope,) = torch.autograd.grad(end.square().mean(), logs)
    assert slope.dtype == torch.float32
    assert slope.isfinite().all()
    assert (slope != 0).all()


def test_tensors_and_numbers_give_the_same() -> None:
    sigmas = [12.0, 4.0, 1.0, 0.2]
    for name in SOLVERS:
        plain = Levels.at(sigmas, [950.0, 720.0, 400.0, 60.0], torch.linspace(0.9999, 0.002, 1000))
        tensors = replace(
            plain,
            signal=[torch.tensor(s, dtype=torch.float64) for s in plain.signal],
            noise=[torch.tensor(s, dtype=torch.float64) for s in plain.noise],
        )
        a, b = (our_run(name, at, start(), [9.0, 7.0, 4.0, 1.0], "v_prediction", draws(4)) for at in (plain, tensors))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
