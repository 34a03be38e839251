"""What the parts of `gpu.py` measure on: true architectures with random weights in a sampling loop, or small ones.

Stable Diffusion 1.5 at 512 x 512 and XL at 1024 x 1024, float16 on a GPU. Time, kernels and memory do not depend on
the weights.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from architectures import POOLED, SD15, XL
from diffusers import EulerDiscreteScheduler
from overhead import CONSTANTS, full, ramp, small
from torch import Tensor

from rwopt.unet.apply import apply
from rwopt.unet.neighbours import freeu
from rwopt.unet.sites import BRANCHES, SITE_KINDS, branch_modules, list_sites

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MODELS: dict[str, dict[str, Any]] = {"SD1.5": SD15 | {"sample_size": 64}, "SDXL": XL | POOLED | {"sample_size": 128}}
LITTLE = {  # in --small; there too SDXL has 210 branches
    "SD1.5": {"sample_size": 8},
    "SDXL": {"sample_size": 8, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16},
}
LESS: dict[str, dict[str, Any]] = {  # in --small, for compilers and gradients, which take long
    "SD1.5": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (0, 0)},
    "SDXL": {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (0, 0),
             "transformer_layers_per_block": (1, 2)},
}  # fmt: skip
BATCHES = {"SD1.5": (2, 16), "SDXL": (2, 8)}
LITTLE_BATCHES = {"SD1.5": (1, 2), "SDXL": (1,)}
PLAIN, AGAIN, FREEU, FREEU_SCHEDULE = "plain", "plain again", "FreeU of diffusers", "FreeU as a schedule"
METHODS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    AGAIN: (),  # what the clock itself is worth
    "transformers": ("transformer",),
    "branches": tuple(BRANCHES),
    "resnets": ("resnet",),
    "skips": ("skip",),
    "all kinds": SITE_KINDS,
    FREEU: (),
    FREEU_SCHEDULE: (),
}
"""Name -> kinds of site that a schedule weighs."""


@dataclass(frozen=True)
class Place:
    """Where it runs, and until when, by `time.monotonic`."""

    device: torch.device
    small: bool
    until: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.cuda else torch.float32

    @property
    def steps(self) -> int:
        """U-Net calls of a picture."""
        return 2 if self.small else 4

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def cells(self, sizes: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Batch sizes, each with the moment at which it should be done: they share the time that is left."""
        for turn, size in enumerate(sizes):
            yield size, time.monotonic() + self.left / (len(sizes) - turn)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Of the wall clock, until the device is done."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def network(place: Place, make: Callable[..., Any], dtype: torch.dtype) -> Any:
    """What `make` makes, with random weights: on the device and in `dtype` at once, frozen."""
    standard = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with place.device:
            return make().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(standard)


class Bench:
    """A U-Net in a sampling loop with a scheduler of diffusers whose time steps lie on the device.

    Euler's step needs no value from the device: a plain picture waits for it only to bring the time steps there.
    """

    def __init__(self, place: Place, name: str, less: bool = False) -> None:
        config = MODELS[name] | (LITTLE[name] if place.small else {}) | (LESS[name] if place.small and less else {})
        make = functools.partial(small, config) if place.small else functools.partial(full, config, place.dtype)
        self.place, self.batches = place, (LITTLE_BATCHES if place.small else BATCHES)[name]
        self.unet = network(place, make, place.dtype)
        scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1)
        self.pipe = SimpleNamespace(unet=self.unet, scheduler=scheduler)
        self.schedules: dict[str, Any] = {}
        self.take(2)

    def take(self, rows: int) -> None:
        """Inputs of U-Net calls with `rows` rows."""
        config, draw = self.unet.config, torch.Generator().manual_seed(1)
        noise = torch.randn(rows, 4, config.sample_size, config.sample_size, generator=draw)
        text = torch.randn(rows, 77, config.cross_attention_dim, generator=draw)
        self.noise, text = (x.to(self.place.device, self.place.dtype) for x in (noise, text))
        self.rest = {"encoder_hidden_states": text, **added(config, self.noise)}
        self.start()

    def start(self, steps: int | None = None) -> None:
        self.pipe.scheduler.set_timesteps(steps or self.place.steps, device=self.place.device)

    def call(self, i: int, net: Any = None) -> Tensor:
        """The U-Net's output at step `i` of those that were started."""
        output: Tensor = (net or self.unet)(self.noise, self.pipe.scheduler.timesteps[i], **self.rest).sample
        return output

    def picture(self, net: Any = None, steps: int | None = None) -> Tensor:
        """A whole run of the sampler."""
        scheduler = self.pipe.scheduler
        self.start(steps)
        x: Tensor = self.noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = (net or self.unet)(scheduler.scale_model_input(x, t), t, **self.rest).sample
            x = scheduler.step(out, t, x).prev_sample
        return x

    def schedule(self, method: str) -> Any:
        if method not in self.schedules:
            freeus = method == FREEU_SCHEDULE
            self.schedules[method] = freeu(self.unet, **CONSTANTS) if freeus else ramp(self.unet, METHODS[method])
        return self.schedules[method]

    @contextmanager
    def on(self, method: str) -> Iterator[None]:
        """With `method` at work."""
        if method == FREEU:
            self.unet.enable_freeu(**CONSTANTS)
            try:
                yield
            finally:
                self.unet.disable_freeu()
        elif METHODS[method] or method == FREEU_SCHEDULE:
            with apply(self.pipe, self.schedule(method)):
                yield
        else:
            yield

    def places(self, method: str) -> tuple[int, int]:
        """How many modules a schedule weighs, and how many joins of skip tensors."""
        sites = list_sites(self.unet, METHODS[method]) if METHODS[method] else []
        joins = sum(site.kind == "skip" for site in sites)
        branches = [branch_modules(self.unet.get_submodule(s.path), s.kind) for s in sites if s.kind in BRANCHES]
        return sum(map(len, branches)) + sum(s.kind not in BRANCHES for s in sites) - joins, joins


def added(config: Any, x: Tensor) -> dict[str, Any]:
    """What SDXL's U-Net is told besides, for rows like `x`: picture sizes and pooled text."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    told = {"text_embeds": x.new_ones(len(x), pooled), "time_ids": x.new_full((len(x), 6), 512)}
    return {"added_cond_kwargs": told}


def spread(ratios: Sequence[float]) -> dict[str, Any]:
    """Median of paired ratios, with a 95 % interval that resamples rounds."""
    if not ratios:
        return {"ratio": None, "low": None, "high": None, "rounds": 0}
    table = np.array(ratios)
    draws = np.median(table[np.random.default_rng(0).integers(len(table), size=(4000, len(table)))], axis=1)
    low, high = (round(float(np.quantile(draws, q)), 4) for q in (0.025, 0.975))
    return {"ratio": round(float(np.median(table)), 4), "low": low, "high": high, "rounds": len(table)}


def reason(error: BaseException) -> str:
    """Why something could not be measured, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    short = isinstance(error, torch.cuda.OutOfMemoryError)
    return f"out of memory ({text[:120]})" if short else f"{type(error).__name__}: {text[:200]}"
