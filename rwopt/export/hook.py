"""Weighs a pipeline by a schedule file with plain torch hooks: what the export to `diffusers` adds to the reader.

Its text from `PART` on stands behind that of `rwopt.export.reader` in one file that needs no rwopt.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch

from rwopt.export.reader import SAME, Table, load, need

PART = {"self": "attn1", "cross": "attn2", "ff": "ff"}
STOCK: dict[str, Any] = {}  # of a file with steps: "scheduler", a class of diffusers, its "options", and "call"


class Hooks:
    """A schedule on a pipeline's U-Net; `remove()` takes it off. `strength` may be changed between pictures."""

    def __init__(self, pipe: Any, table: Table, strength: float, high: float, low: float) -> None:
        self.pipe, self.table, self.strength, self.high, self.low = pipe, table, strength, high, low
        self.unet, self.now, self.handles = pipe.unet, dict.fromkeys(table.sites, 1.0), []
        modules = dict(self.unet.named_modules())
        need(not hasattr(self.unet, "_orig_mod"), "the U-Net is compiled: apply first, compile afterwards")
        need(table.cfg_branch == "both", "weights of one side of guidance need rwopt")
        need(hasattr(pipe.scheduler, "alphas_cumprod"), f"{type(pipe.scheduler).__name__} has no noise table")
        self.check_scheduler()
        self.told = bool(table.steps and "told" in table.steps)
        for site in table.sites:
            path, _, kind = site.rpartition(".") if not site[-1].isdigit() else (site, "", "")
            need(path in modules, f"the U-Net has no {site}")
            module = modules[path]
            if kind == "skip":
                joined = self.joined(site, self.stream(path))
                self.handles.append(module.register_forward_pre_hook(joined, with_kwargs=True))
                continue
            need(not (kind in PART and table.mode == "output") and kind in ("", "resnet", *PART), f"{site} needs rwopt")
            blocks = [getattr(block, PART[kind], None) for block in module.transformer_blocks] if kind in PART else []
            inner = [module.conv2] if kind == "resnet" and table.mode == "residual" else blocks or [module]
            hook = self.weigh(site, blend=not kind and table.mode == "residual")
            self.handles += [part.register_forward_hook(hook, with_kwargs=True) for part in inner if part is not None]
        self.handles.append(self.unet.register_forward_pre_hook(self.look_up, with_kwargs=True))

    def levels(self) -> Any:
        """ln sigma of the training timesteps, rising."""
        abar = self.pipe.scheduler.alphas_cumprod.detach().double().cpu().clamp_min(2.0**-24)
        return ((1 - abar) / abar).log() / 2

    def timestep(self, sigma: float) -> float:
        """The training timestep of a VE level, which may be fractional."""
        levels, x = self.levels(), math.log(sigma)
        i = int(torch.searchsorted(levels, x).clamp(1, len(levels) - 1))
        share = (x - levels[i - 1]) / (levels[i] - levels[i - 1])
        return i - 1 + min(max(float(share), 0.0), 1.0)

    def look_up(self, module: Any, args: Any, kwargs: Any) -> Any:
        given = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        t = given.double().flatten().cpu()
        need((t == t[0]).all(), "the rows of a call are at several timesteps: that needs rwopt")
        levels = self.levels()
        place = t[0].clamp(0, len(levels) - 1)
        i = int(place)
        sigma = math.exp(levels[i] + (place - i) * (levels[min(i + 1, len(levels) - 1)] - levels[i]))
        self.now = dict(zip(self.table.sites, self.table.at(sigma, self.strength, self.high, self.low), strict=True))
        steps = self.table.steps
        if steps and all(abs(math.log(sigma / level)) > SAME for level in steps["sigmas"]):
            warnings.warn("this picture has other steps than the file: call it with **hooks.arguments", stacklevel=2)
        elif self.told:
            told = torch.tensor(self.timestep(self.table.dials(sigma)["told"])).float().to(given.device)
            told = told.expand(given.shape)
            return ((args[0], told, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "timestep": told})
        return None

    def check_scheduler(self) -> None:
        has, options = self.pipe.scheduler, STOCK.get("options", {})
        wrong = [name for name, value in options.items() if (has.config.get(name) or False) != (value or False)]
        wrong += ["start"] if type(has).__name__[:5] == "Euler" and has.config.timestep_spacing == "leading" else []
        line = f"pipe.scheduler = {STOCK.get('scheduler')}.from_config(pipe.scheduler.config, **{options})"
        fits = not self.table.steps or (type(has).__name__ == STOCK["scheduler"] and not wrong)
        need(fits, f"the file's steps need another sampler: {line[:-1]}, timestep_spacing='trailing')")

    @property
    def arguments(self) -> dict[str, Any]:
        """The file's steps for the pipeline's call, `pipe("a cat", **hooks.arguments)`; {} for a file without."""
        steps, name = self.table.steps, type(self.pipe).__name__
        if not steps:
            return {}
        takes = inspect.signature(type(self.pipe).__call__).parameters
        need("timesteps" in takes and "mask_image" not in takes, f"the call of {name} takes no grid")
        times = [self.timestep(sigma) for sigma in steps["sigmas"]]
        grid = [round(t) for t in times]
        near = all(abs(t - whole) < 0.25 for t, whole in zip(times, grid, strict=True))
        need(near and len({*grid}) == len(grid), "the steps are at no whole timesteps of this model's noise")
        given = {"timesteps": grid, **{key: value for key, value in STOCK["call"].items() if key in takes}}
        given |= {"strength": 1.0} if "strength" in takes else {}  # the grid starts at the level of the edit
        scales = steps.get("guidance", [])
        if len({*scales}) > 1:
            asks = "self.guidance_scale *" in inspect.getsource(type(self.pipe).__call__)
            need(asks and "callback_on_step_end" in takes, f"{name} guides all calls by one scale")

            def next_scale(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                pipe._guidance_scale = scales[min(i + 1, len(scales) - 1)]
                return tensors

            given |= {"callback_on_step_end": next_scale, "callback_on_step_end_tensor_inputs": []}
        return {**given, **({"guidance_scale": scales[0]} if scales else {})}

    def weigh(self, site: str, blend: bool) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            w, y = self.now[site], output if isinstance(output, torch.Tensor) else output[0]
            if w == 1:
                return output
            base = args[0] if args else kwargs.get("hidden_states")
            y = torch.lerp(y, base.to(y.dtype), 1 - w) if blend else y * w
            return y if isinstance(output, torch.Tensor) else (y, *output[1:])

        return hook

    def joined(self, site: str, stream: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs.pop("hidden_states" if "hidden_states" in kwargs else "input_tensor")
            return (torch.cat([x[:, :stream], x[:, stream:] * self.now[site]], 1), *args[1:]), kwargs

        return hook

    def stream(self, path: str) -> int:
        """Channels of the stream where a skip tensor joins it: those that the resnet before gives."""
        before = self.unet.mid_block.resnets[-1].out_channels
        for i, block in enumerate(self.unet.up_blocks):
            for j, resnet in enumerate(block.resnets):
                if path == f"up_blocks.{i}.resnets.{j}":
                    return int(before)
                before = resnet.out_channels
        raise ValueError(f"no skip tensor joins at {path}")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def apply(pipe: Any, file: str, strength: float = 1.0, high: float = math.inf, low: float = 0.0) -> Hooks:
    """Weigh `pipe` by a schedule file, between the VE sigmas `high` and `low`, scaled towards 1 by `strength`."""
    return Hooks(pipe, load(file), strength, high, low)
