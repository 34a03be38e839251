"""Stand-ins for hosts: a U-Net laid out as LDM's, ComfyUI's ModelPatcher, Forge's UnetPatcher, A1111's modules.

Written from the documented interfaces, a few lines each. They show that our own arithmetic is right where the host
calls it as documented; only the host's own code can show that it does (ComfyUI's: `helpers.comfy`; none of Forge and
A1111).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table

WIDTH, TEXT = 8, 6


class Resnet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(4, WIDTH), nn.SiLU(), nn.Dropout(0), nn.Conv2d(WIDTH, WIDTH, 1))
        self.skip_connection = nn.Conv2d(channels, WIDTH, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + emb[:, :, None, None])


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(context, WIDTH), nn.Linear(context, WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(torch.softmax(self.to_q(x) @ self.to_k(context).mT, -1) @ self.to_v(context))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH), Attention(TEXT)
        self.ff = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        for name, own in (("attn1", None), ("attn2", context)):
            n = getattr(self, name)(x, own)
            for patch in options.get("patches", {}).get(f"{name}_output_patch", []):
                n = patch(n, options)
            x = x + n
        return x + self.ff(x)


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any] | None = None) -> Tensor:
        y = x.flatten(2).mT
        for block in self.transformer_blocks:
            y = block(y, context, transformer_options or {})
        return x + torch.tanh(y.mT.reshape(x.shape))


class Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class UNet(nn.Module):
    """Two levels of one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_blocks = nn.ModuleList([
            nn.ModuleList([nn.Conv2d(4, WIDTH, 1)]), nn.ModuleList([Resnet(WIDTH), SpatialTransformer()]),
            nn.ModuleList([Halve()]), nn.ModuleList([Resnet(WIDTH), SpatialTransformer()]),
        ])  # fmt: skip
        self.middle_block = nn.ModuleList([Resnet(WIDTH), SpatialTransformer(), Resnet(WIDTH)])
        self.output_blocks = nn.ModuleList([nn.ModuleList([Resnet(2 * WIDTH), SpatialTransformer()]) for _ in range(4)])
        self.output_blocks[1].append(nn.Upsample(scale_factor=2))
        self.out = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        emb = torch.sin(timesteps.float()[:, None] / torch.arange(1, WIDTH + 1))

        def run(block: Any, h: Tensor) -> Tensor:
            for i, layer in enumerate(block):
                for modifier in options.get("block_inner_modifiers", []):
                    h = modifier(h, "before", layer, i, block, options)
                if isinstance(layer, Resnet):
                    h = layer(h, emb)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, options)
                else:
                    h = layer(h)
                for modifier in options.get("block_inner_modifiers", []):
                    h = modifier(h, "after", layer, i, block, options)
            return h

        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            options["block"] = ("input", i)
            h = run(block, h)
            skips.append(h)
        options["block"] = ("middle", 0)
        h = run(self.middle_block, h)
        for i, block in enumerate(self.output_blocks):
            options["block"] = ("output", i)
            skip = skips.pop()
            for patch in options.get("patches", {}).get("output_block_patch", []):
                h, skip = patch(h, skip, options)
            h = run(block, torch.cat([h, skip], 1))
        return self.out(h)


SIGMAS = torch.linspace(0.03**0.25, 14.6**0.25, 1000) ** 4


class Predictor:
    log_sigmas = SIGMAS.log()

    def percent_to_sigma(self, percent: float) -> float:
        return 1e9 if percent <= 0 else 0.0 if percent >= 1 else float(SIGMAS[round((1 - percent) * 999)])


class Patcher:
    """Of ModelPatcher what our nodes use. `call` makes a U-Net call as samplers do."""

    def __init__(self, unet: nn.Module) -> None:
        self.model = types.SimpleNamespace(diffusion_model=unet, model_sampling=Predictor(), predictor=Predictor())
        self.object_patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = Patcher(self.model.diffusion_model)
        other.object_patches = dict(self.object_patches)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def get_model_object(self, name: str) -> Any:
        found: Any = self.model
        for part in name.split("."):
            found = getattr(found, part)
        return self.object_patches.get(name, found)

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def add_wrapper_with_key(self, kind: str, key: str, function: Any) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(function)

    def _append(self, name: str, patch: Any) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_output_block_patch(self, patch: Any) -> None:
        self._append("output_block_patch", patch)

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self._append("attn1_output_patch", patch)

    def set_model_attn2_output_patch(self, patch: Any) -> None:
        self._append("attn2_output_patch", patch)

    def add_block_inner_modifier(self, modifier: Any, ensure_uniqueness: bool = False) -> None:
        self.model_options["transformer_options"].setdefault("block_inner_modifiers", []).append(modifier)

    def call(self, x: Tensor, sigma: float, context: Tensor, sides: list[int]) -> Tensor:
        options = dict(self.model_options["transformer_options"])
        t = torch.full((len(x),), sigma)
        options |= {"sigmas": t[: len(x) // len(sides)], "cond_or_uncond": sides}
        owners = {}
        for name, value in self.object_patches.items():
            module = self.model.diffusion_model.get_submodule(name.removeprefix("diffusion_model.").rpartition(".")[0])
            owners[module] = module.forward = value
        wrappers = options.get("wrappers", {})

        def apply(x: Tensor, t: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
            return chain(wrappers.get("diffusion_model", {}), inner)(x, t * 50, context, options)

        def inner(x: Tensor, t: Tensor, context: Tensor, options: Any) -> Tensor:
            out: Tensor = self.model.diffusion_model(x, t, context, options)
            return out

        try:
            return chain(wrappers.get("apply_model", {}), apply)(x, t, None, context, None, options)
        finally:
            for module in owners:
                del module.forward


def chain(wrappers: dict[str, list[Any]], function: Any) -> Any:
    for wrapper in reversed([w for group in wrappers.values() for w in group]):
        function = functools.partial(wrapper, function)
    return function


def load_package(folder: Path, name: str) -> Any:
    """A folder as a package of that name, as ComfyUI loads it."""
    where = [str(folder)]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TABLE = noise_table(NOISE)


def random_schedule(sites: list[str], mode: str = "residual", seed: int = 0, **fields: Any) -> Schedule:
    """Weights about 1, some of them 0 and 1."""
    weights = np.random.default_rng(seed).uniform(0.6, 1.4, (4, len(sites)))
    weights[:, 1::5] = 1
    weights[2, ::6] = 0
    fields = {"noise": NOISE, **fields}
    return Schedule(tuple(sites), np.array([14.6146, 3.0, 0.9, 0.0292]), weights.round(5), mode, **fields)


MINI = ["down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0",
        "up_blocks.0.attentions.1", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]  # fmt: skip
FINE = ["down_blocks.0.attentions.0.self", "down_blocks.1.attentions.0.cross", "mid_block.attentions.0.ff",
        "mid_block.resnets.1.resnet", "up_blocks.0.resnets.0.resnet", "up_blocks.1.resnets.1.skip"]  # fmt: skip


def weighed_by_hooks(unet: Any, modes: dict[str, tuple[str, str]], schedule: Schedule, sigma: float, run: Any) -> Any:
    """`run()` with torch hooks at named modules: what each site should do, by its formula."""
    weights = dict(zip(schedule.sites, schedule.at(sigma), strict=True))
    hooks = []
    for site, (how, path) in modes.items():
        def hook(module: Any, args: Any, out: Any, w: float = weights[site], how: str = how) -> Any:
            return args[0] + w * (out - args[0]) if how == "blend" else w * out

        def front(module: Any, args: Any, w: float = weights[site]) -> Any:
            return (torch.cat([args[0][:, : WIDTH], w * args[0][:, WIDTH :]], 1), *args[1:])

        for part in path.split(","):
            m = unet.get_submodule(part)
            hooks.append(m.register_forward_pre_hook(front) if how == "skip" else m.register_forward_hook(hook))
    try:
        return run()
    finally:
        for handle in hooks:
            handle.remove()


MINI_PLACES = ["input_blocks.1.1", "input_blocks.3.1", "middle_block.1", "output_blocks.1.1", "output_blocks.2.1",
               "output_blocks.3.1"]  # fmt: skip
BY_HOOKS = {
    "residual": {site: ("blend", path) for site, path in zip(MINI, MINI_PLACES, strict=True)},
    "output": {site: ("scale", path) for site, path in zip(MINI, MINI_PLACES, strict=True)},
    "fine": dict(zip(FINE, [
        ("scale", "input_blocks.1.1.transformer_blocks.0.attn1,input_blocks.1.1.transformer_blocks.1.attn1"),
        ("scale", "input_blocks.3.1.transformer_blocks.0.attn2,input_blocks.3.1.transformer_blocks.1.attn2"),
        ("scale", "middle_block.1.transformer_blocks.0.ff,middle_block.1.transformer_blocks.1.ff"),
        ("scale", "middle_block.2.out_layers"), ("scale", "output_blocks.0.0.out_layers"),
        ("skip", "output_blocks.3.0"),
    ], strict=True)),
}  # fmt: skip
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 5, TEXT, generator=torch.Generator().manual_seed(1))
