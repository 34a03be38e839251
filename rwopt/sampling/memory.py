"""What one update of a gradient search takes at its peak, told on a computer without a GPU.

Nothing is computed: sampler, decoder and their backward pass run on fake tensors (`rwopt.models.memory`). For Stable
Diffusion 1.5 at 512 x 512 such estimates lie between 8 % below and 6 % above what an H100 counted
(`tests/sampling/test_update_memory.py`). In float16, in GiB: 3.3 for one picture, 3.5 for any number of them; Stable
Diffusion XL at 1024 x 1024, with a bfloat16 VAE, 11; both with `model.checkpointing=on`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from rwopt.models import Model
from rwopt.models.memory import counting, twin
from rwopt.sampling.backprop import GradientPath, unroll
from rwopt.sampling.course import course_at
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment


class Update(NamedTuple):
    """Bytes: `weights` of U-Net and VAE, which lie there all the time; peaks, these included, up to the end of the
    decoder's backward pass, and in the sampler's, which comes after it.
    """

    weights: int
    decoder: int
    sampler: int

    @property
    def peak(self) -> int:
        return max(self.decoder, self.sampler)


def update_memory(
    model: Model,
    sites: Sequence[str],
    pictures: int = 1,
    path: GradientPath = GradientPath(),  # noqa: B008 (frozen)
    steps: int = 1,
    tokens: int = 77,
    guided: bool = True,
) -> Update:
    """What one update with weights at `sites` takes, for `pictures` at once, in some seconds.

    model: of its networks only classes, configurations and number formats are looked at, so they may lie on the meta
    device; its `checkpointing` counts as off if it is auto. The reward is the pictures' mean square: add what a reward
    network takes. steps: each adds its latents, 0.06 MiB a picture at 512 x 512, and nothing else. tokens: length of a
    prompt's embedding.
    """
    noise = SimpleNamespace(alphas_cumprod=model.scheduler.alphas_cumprod.tolist(), config=model.scheduler.config)
    with torch.enable_grad(), counting() as live:
        fake = replace(model, unet=twin(model.unet), vae=twin(model.vae), scheduler=noise, device=torch.device("cpu"))
        live.peak = weights = live.now
        table = torch.ones(steps, len(sites), requires_grad=True)
        text = torch.empty(pictures, tokens, fake.unet.config.cross_attention_dim)
        beside = torch.empty(pictures, fake.extra_channels, *fake.latent_shape[1:])
        shown = 1.5 if fake.extra_channels == fake.latent_shape[0] else None  # InstructPix2Pix: three rows a picture
        cond = Condition(text, text if guided else None, 7.5, extra=beside, image_guidance=shown)
        course = course_at(fake, [len(noise.alphas_cumprod) * (steps - i) // (steps + 1) for i in range(steps)])
        rows = {sigma: i for i, sigma in enumerate(course.sigmas)}
        decoder = 0

        def decoded(_: Tensor) -> None:
            nonlocal decoder
            decoder, live.peak = live.peak, live.now

        with Attachment(fake.unet, sites) as attachment:
            x = torch.empty(pictures, *fake.latent_shape, requires_grad=True)  # as that of a later step would
            end = unroll(fake, attachment, x, cond, course, lambda sigma: table[rows[sigma]], path)
            end.register_hook(decoded)  # type: ignore[no-untyped-call]
            torch.autograd.grad(fake.decode(end).square().mean(), [table, x])
        return Update(weights, decoder, live.peak)
